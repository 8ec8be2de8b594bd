"""A short version of ``make demo``: the same commands, fewer iterations."""

import json
from pathlib import Path

import pytest
from commands import python
from PIL import Image

#: Iterations of the short version, and the box AP that it must reach. AP rises steeply by then, so that rounding, which
#: differs from CPU to CPU, decides how far it is: with 300 iterations some CPUs reach it and some do not.
ITERATIONS, MIN_MAP, MIN_AP50 = 450, 0.15, 0.25


@pytest.mark.slow
def test_short_demo_learns(tmp_path: Path) -> None:
    done = python(
        *('tools/demo.py', '--work-dir', tmp_path / 'work', '--data-dir', tmp_path / 'data'),
        *('--num-val', '40', '--min-map', MIN_MAP, '--min-ap50', MIN_AP50),
        *('--cfg-options', f'train_cfg.max_iters={ITERATIONS}', f'train_cfg.val_interval={ITERATIONS}'),
        *(f'param_scheduler.1.T_max={ITERATIONS - 30}', f'param_scheduler.1.end={ITERATIONS}'),
    )
    content = json.loads((tmp_path / 'work/metrics.json').read_text())
    assert content['iterations'] == ITERATIONS
    assert content['metrics']['coco/bbox_mAP'] >= MIN_MAP
    assert content['metrics']['coco/bbox_mAP_50'] >= MIN_AP50
    assert f'mAP             {content["metrics"]["coco/bbox_mAP"]:.3f}' in done.stdout
    assert [command.split()[1] for command in content['commands']] == ['tools/train.py', 'tools/test.py']
    for name in ('learning_curve.png', 'contact_sheet.png'):
        assert min(Image.open(tmp_path / 'work' / name).size) > 400
    results = json.loads((tmp_path / 'work/results.bbox.json').read_text())
    assert len({r['image_id'] for r in results}) == 40


def test_demo_below_its_floor_fails_in_one_line(tmp_path: Path) -> None:
    done = python(
        *('tools/demo.py', '--work-dir', tmp_path / 'work', '--data-dir', tmp_path / 'data'),
        *('--num-train', '8', '--num-val', '4'),
        *('--cfg-options', 'train_cfg.max_iters=1', 'train_cfg.val_interval=1', 'default_hooks.logger.interval=1'),
        status=1,
    )
    assert done.stderr.splitlines()[-1].startswith('demo failed: box AP below what is expected: mAP 0.0')
