"""``dino-mm`` and ``python -m dino_mm``: the tools under one name."""

import json
from pathlib import Path

import pytest
import torch
from commands import ROOT, TINY, data_options, options, python
from forked import run_tool
from PIL import Image
from test_env import without

import dino_mm
from dino_mm import cli
from dino_mm.datasets.digits import make_digits

BROKEN = 'model = dict(a=[1\n'
SCRIPT = 'import sys\nfrom dino_mm.cli import main\nif __name__ == "__main__":\n    sys.exit(main())\n'


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The console script, as pip writes it."""
    (tmp_path / 'dino-mm').write_text(SCRIPT)
    return tmp_path / 'dino-mm'


@pytest.mark.parametrize('arguments', [['--help'], ['--version'], ['models', 'swin*'], ['train-']])
@pytest.mark.parametrize('as_script', [True, False])
def test_starts_without_torch(arguments: list[str], as_script: bool, script: Path) -> None:
    start = [script] if as_script else ['-m', 'dino_mm']
    status = 2 if arguments == ['train-'] else 0
    done = python('-X', 'importtime', *start, *arguments, status=status, PYTHONPATH=str(ROOT))
    imported = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
    assert 'dino_mm.cli' in imported or not as_script
    assert not imported & {'torch', 'numpy', 'mmcv', 'mmengine', 'mmdet'}


def test_overview_names_every_command() -> None:
    done = python('-m', 'dino_mm', '--help')
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith('  ')]
    names = ['models', 'new', 'train', 'test', 'report', 'predict', 'check', 'convert', 'export', 'benchmark', 'env']
    assert listed == list(cli.COMMANDS) == names
    assert 'example: dino-mm train dino_r50_4scale_12ep' in done.stdout
    done = python('-m', 'dino_mm', status=2)
    assert 'usage: dino-mm COMMAND' in done.stderr
    assert python('-m', 'dino_mm', '--version').stdout == f'dino-mm {dino_mm.__version__}\n'


@pytest.mark.parametrize(
    ('typed', 'meant'), [('trian', 'train'), ('chekc', 'check'), ('xyz', 'are models, new, train')]
)
def test_unknown_command_is_one_line(typed: str, meant: str) -> None:
    done = python('-m', 'dino_mm', typed, status=2)
    assert done.stdout == ''
    assert len(done.stderr.splitlines()) == 1
    assert meant in done.stderr


def test_models_prints_a_table() -> None:
    lines = python('-m', 'dino_mm', 'models', 'r50*12ep*').stdout.splitlines()
    assert lines[0].split() == ['name', 'box', 'AP', '(detrex)', 'weights']
    assert ['dino_r50_4scale_12ep', '49.2', 'yes'] in [line.split() for line in lines]
    assert ['dino_r50_4scale_12ep_amp', '49.1', 'no'] in [line.split() for line in lines]
    assert ['dino_r50_4scale_12ep_no_frozen', '-', 'no'] in [line.split() for line in lines]
    assert len(lines) == 1 + len(dino_mm.list_models('r50*12ep*')) == 9
    assert len({line.rindex(line.split()[1]) + len(line.split()[1]) for line in lines[1:]}) == 1  # one column
    assert len(python('-m', 'dino_mm', 'models').stdout.splitlines()) == 41
    done = python('-m', 'dino_mm', 'models', 'yolo*', status=1)
    assert done.stderr == "error: no model fits 'yolo*'; `dino-mm models` lists all.\n"


@pytest.mark.parametrize('name', list(cli.COMMANDS))
def test_help_has_an_example(name: str, script: Path) -> None:
    done = run_tool(script, name, '--help')
    assert f'usage: dino-mm {name} ' in done.stdout
    assert done.stdout.splitlines()[-1] == f'example: dino-mm {name} {cli.COMMANDS[name].example}'.rstrip()


def test_tools_get_their_arguments_and_pass_their_status_on(script: Path, tmp_path: Path) -> None:
    image = dict(id=1, file_name='a.jpg', height=4, width=4)
    box = dict(id=1, image_id=1, bbox=[0, 0, 2, 2], area=4, iscrowd=0)
    for name, category in (('good', 1), ('bad', 9)):
        content = dict(
            images=[image], categories=[dict(id=1, name='x')], annotations=[box | dict(category_id=category)]
        )
        (tmp_path / f'{name}.json').write_text(json.dumps(content))
    for name, status in (('good', 0), ('bad', 1)):
        arguments = (f'{name}.json', '--picture', 'out.png')
        more = dict(cwd=tmp_path, status=status)
        done = run_tool(script, 'check', *arguments, **more)
        assert done.stdout == run_tool(ROOT / 'tools/check_dataset.py', *arguments, **more).stdout
        assert done.stdout.endswith('picture: out.png\n')
    assert 'unrecognized arguments: --no' in run_tool(script, 'check', 'x', '--no', status=2).stderr


def test_trains_and_tests_by_name(script: Path, tmp_path: Path) -> None:
    data = tmp_path / 'data'
    make_digits(data, num_train=4, num_val=2)
    settings = options(TINY | data_options(data) | {'train_cfg.max_iters': 2, 'train_cfg.val_interval': 2})
    python('-m', 'dino_mm', 'train', 'dino_digits', *settings, cwd=tmp_path, PYTHONPATH=str(ROOT))
    checkpoint = tmp_path / 'work_dirs/dino_digits/iter_2.pth'
    done = run_tool(script, 'test', 'dino-demo/dino_digits', checkpoint, *settings, cwd=tmp_path)
    assert 'coco/bbox_mAP:' in done.stdout
    done = run_tool(script, 'train', 'dino_digit', status=1, cwd=tmp_path)
    assert done.stderr.splitlines()[-1].startswith(
        "error: dino_mm ships no config 'dino_digit'. Near to it: dino_digits; "
    )
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(
    ('arguments', 'status', 'said'),
    [
        (
            ('train.py', 'dino_digits', '--cfg-options', 'epochs', '3'),
            2,
            'error: --cfg-options epochs: write key=value, ',
        ),
        (('benchmark.py', '--cfg-options', 'a b=1', 'c'), 2, 'error: --cfg-options c: write key=value, '),
        (('test.py', 'dino_digits', 'zoo', '--work-dir', 'work'), 1, 'error: The zoo has no weights of dino_digits; '),
        (('train.py', 'broken.py'), 1, 'error: broken.py, or a file of its `_base_`, is not valid Python: '),
        (('export.py', 'broken.py'), 1, 'error: broken.py, or a file of its `_base_`, is not valid Python: '),
        (('predict.py', 'broken.py', 'a.png', '--weights', 'a.pth'), 1, 'error: broken.py, or a file of its '),
    ],
)
def test_what_was_typed_wrong_is_one_line(arguments: tuple, status: int, said: str, tmp_path: Path) -> None:
    (tmp_path / 'broken.py').write_text(BROKEN)
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
    tool, *more = arguments
    done = run_tool(ROOT / 'tools' / tool, *more, cwd=tmp_path, status=status)
    assert said in done.stderr.splitlines()[-1]
    assert 'Traceback' not in done.stderr


def test_a_broken_config_is_one_line_for_every_command(script: Path, tmp_path: Path) -> None:
    """Also for those whose tool does not say so itself."""
    (tmp_path / 'broken.py').write_text(BROKEN)
    torch.save({'backbone.weight': torch.zeros(1)}, tmp_path / 'a.pth')
    done = run_tool(script, 'convert', 'a.pth', 'b.pth', '--config', 'broken.py', cwd=tmp_path, status=1)
    assert done.stderr.splitlines()[-1].startswith('error: broken.py, or a file of its `_base_`, is not valid Python: ')
    assert 'Traceback' not in done.stderr


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    done = python('-m', 'dino_mm', 'train', 'x', status=1, **without(tmp_path, 'mmdet'))
    last = done.stderr.splitlines()[-1]
    assert last.startswith('error: ')
    assert 'mmdet' in last
    assert 'Traceback' not in done.stderr
    assert python('-m', 'dino_mm', 'models', 'eva*', **without(tmp_path, 'mmdet')).stdout.count('\n') == 2
