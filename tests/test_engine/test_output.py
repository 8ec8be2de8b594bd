"""Output that cannot be written ends no training."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, TINY, options
from faults import SMALLER, write_config

from dino_mm.compat import found_set
from dino_mm.datasets.digits import make_digits

PRINTS = """
import logging, runpy, sys
with runpy.run_path('dino_mm/engine/output.py')['output_may_be_lost']():
    handler = logging.StreamHandler(sys.stdout)
    for number in range(3000):
        print('a line', number)
        print('a line', number, file=sys.stderr, flush=True)
        handler.emit(logging.LogRecord('a', 20, 'a', 1, 'a record', (), None))
    print('the end', flush=True)
sys.exit({status})
"""


@pytest.mark.parametrize('status', [0, 75])
@pytest.mark.parametrize('place', ['/dev/full', 'pipe', 'file'])
def test_a_program_ends_as_it_would(place: str, status: int, tmp_path: Path) -> None:
    """With its own status, whether a disk is full or nobody reads any more; what can be written is."""
    command = [sys.executable, '-c', PRINTS.format(status=status)]
    if place == 'pipe':
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        process.stderr.close()
        assert process.wait(100) == status
        return
    path = tmp_path / 'file' if place == 'file' else Path(place)
    with path.open('w') as target:
        assert subprocess.run(command, cwd=ROOT, stdout=target, stderr=target).returncode == status
    if place == 'file':
        text = (tmp_path / 'file').read_text()
        assert text.count('a line') == 6000
        assert text.splitlines()[-1] == 'the end'


@pytest.mark.skipif(
    found_set().names['mmdet'] != 'mmdet', reason="the forks' mmdet prints as it is imported, before any code of ours"
)
def test_a_training_does_without_its_output(tmp_path: Path) -> None:
    """Its evaluation prints as well. The log in the work directory is whole."""
    config = write_config(tmp_path / 'config.py', make_digits(tmp_path / 'data', num_train=2, num_val=1), [])
    command = (sys.executable, 'tools/train.py', config, '--work-dir', tmp_path / 'work', *options(TINY | SMALLER))
    env = os.environ | dict(PYTHONPATH=f'{ROOT}:{ROOT}/tests', OMP_NUM_THREADS='1')
    with open('/dev/full', 'w') as full:
        done = subprocess.run([*map(str, command)], cwd=ROOT, env=env, stdout=full, stderr=full)
    assert done.returncode == 0
    assert 'coco/bbox_mAP' in next((tmp_path / 'work').glob('*/*.log')).read_text()
