"""The command-line tools, from the repository: train, resume, test, show, distributed."""

import os
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, TINY, data_options, options, python, run, scalars
from forked import run_tool
from mmengine.config import Config
from PIL import Image

from dino_mm.datasets.digits import make_digits
from dino_mm.projects.config_text import launch_command

CONFIG = 'configs/dino-demo/dino_digits.py'


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp('digits') / 'data', num_train=8, num_val=3)


@pytest.fixture(scope='module')
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work directory of a training of four iterations."""
    work_dir = tmp_path_factory.mktemp('trained')
    python('tools/train.py', CONFIG, '--work-dir', work_dir, *options(TINY | data_options(data)))
    return work_dir


def test_training_logs_mmdets_loss_names_and_evaluates(trained: Path) -> None:
    lines = scalars(trained)
    training = [line for line in lines if 'loss' in line]
    assert [line['step'] for line in training] == [1, 2, 3, 4]
    parts = ('loss_cls', 'loss_bbox', 'loss_iou')
    prefixes = ('d0.', 'd1.', '', 'd0.dn_', 'd1.dn_', 'dn_', 'enc_')
    assert {f'{p}{n}' for p in prefixes for n in parts} <= training[0].keys()
    total = sum(v for k, v in training[0].items() if 'loss_' in k)
    assert training[0]['loss'] == pytest.approx(total, rel=1e-5)
    evaluation = [line for line in lines if 'coco/bbox_mAP' in line]
    assert [line['step'] for line in evaluation] == [4]
    assert 0 <= evaluation[0]['coco/bbox_mAP'] <= evaluation[0]['coco/bbox_mAP_50'] <= 1


def test_resume_goes_on_as_if_never_interrupted(trained: Path, data: Path, tmp_path: Path) -> None:
    """From iteration 2 of 4, with the same weights, optimizer and learning rate at the end."""
    settings = options(TINY | data_options(data))
    done = run_tool('tools/train.py', CONFIG, '--work-dir', tmp_path, '--resume', trained / 'iter_2.pth', *settings)
    assert 'config that lies in the checkpoint' not in done.stdout + done.stderr  # it is the same
    resumed, straight = (torch.load(d / 'iter_4.pth', weights_only=True) for d in (tmp_path, trained))
    assert resumed['meta']['iter'] == straight['meta']['iter'] == 4
    groups = [checkpoint['optimizer']['param_groups'] for checkpoint in (resumed, straight)]
    assert groups[0] == groups[1]
    steps = {int(state['step']) for state in resumed['optimizer']['state'].values()}
    assert steps == {4}
    assert [line['step'] for line in scalars(tmp_path) if 'loss' in line] == [3, 4]


@pytest.mark.parametrize('resume', [True, False])
def test_resume_without_a_checkpoint_starts_from_load_from(
    trained: Path, data: Path, tmp_path: Path, resume: bool
) -> None:
    """As without ``--resume``: with a learning rate of zero, the weights stay what they were."""
    settings = TINY | data_options(data) | {'load_from': trained / 'iter_4.pth', 'optim_wrapper.optimizer.lr': 0.0}
    done = run_tool(
        *('tools/train.py', CONFIG, '--work-dir', tmp_path, *options(settings | {'train_cfg.max_iters': 2})),
        *(['--resume'] if resume else []),
    )
    start, end = (
        torch.load(p, weights_only=True)['state_dict'] for p in (trained / 'iter_4.pth', tmp_path / 'iter_2.pth')
    )
    parameters = [name for name in start if 'running' not in name and 'num_batches' not in name]
    assert all(torch.equal(start[name], end[name]) for name in parameters)
    assert [line['step'] for line in scalars(tmp_path) if 'loss' in line] == [1, 2]
    said = f'no checkpoint in {tmp_path}. Training starts from `load_from`, {trained / "iter_4.pth"}.'
    assert (said in done.stdout + done.stderr) == resume


@pytest.fixture(scope='module', params=['with the hook', 'without it'])
def config_file(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny config in a file, with and without ``LoadCheckpointHook``."""
    config = Config.fromfile(ROOT / CONFIG)
    settings = {**TINY, **data_options(data), 'model.neck.in_channels': [8, 16, 32]}
    config.merge_from_dict({key: str(v) if isinstance(v, Path) else v for key, v in settings.items()})
    if request.param == 'without it':
        del config.default_hooks['loading']
    path = tmp_path_factory.mktemp('config') / 'tiny.py'
    config.dump(path)
    return path


@pytest.mark.parametrize('auto', [True, False])
def test_resume_never_runs_the_config_in_a_checkpoint(
    trained: Path, config_file: Path, tmp_path: Path, auto: bool
) -> None:
    checkpoint = torch.load(trained / 'iter_2.pth', weights_only=True)
    code = f'open({str(tmp_path / "ran")!r}, "w").close()\n'
    checkpoint['meta']['config'] = checkpoint['message_hub']['runtime_info']['cfg'] = code
    torch.save(checkpoint, tmp_path / 'evil.pth')
    work_dir = tmp_path / 'work'
    if auto:
        work_dir.mkdir()
        (work_dir / 'last_checkpoint').write_text(str(tmp_path / 'evil.pth'))
    done = run_tool(
        *('tools/train.py', config_file, '--work-dir', work_dir, '--resume', *([] if auto else [tmp_path / 'evil.pth']))
    )
    assert not (tmp_path / 'ran').exists()
    assert [line['step'] for line in scalars(work_dir) if 'loss' in line] == [3, 4]
    assert "The config that lies in the checkpoint differs from this run's." in done.stdout + done.stderr
    saved = torch.load(work_dir / 'iter_4.pth', weights_only=True)
    assert 'config' not in saved['meta']
    assert 'optim_wrapper = ' in saved['message_hub']['runtime_info']['cfg']


def test_tests_never_run_the_config_in_a_checkpoint(trained: Path, config_file: Path, tmp_path: Path) -> None:
    """Nor is anything resumed where the config says so."""
    checkpoint = torch.load(trained / 'iter_2.pth', weights_only=True)
    checkpoint['meta']['config'] = f'open({str(tmp_path / "ran")!r}, "w").close()\n'
    torch.save(checkpoint, tmp_path / 'evil.pth')
    command = ('tools/test.py', config_file, tmp_path / 'evil.pth', '--work-dir', tmp_path / 'work')
    run_tool(*command, *options({'resume': True}))
    assert not (tmp_path / 'ran').exists()


def test_part_of_a_model_is_not_tested(trained: Path, config_file: Path, tmp_path: Path) -> None:
    state = torch.load(trained / 'iter_2.pth', weights_only=True)['state_dict']
    torch.save({name: tensor for name, tensor in state.items() if name.startswith('encoder')}, tmp_path / 'part.pth')
    done = run_tool('tools/test.py', config_file, tmp_path / 'part.pth', '--work-dir', tmp_path / 'work', status=1)
    assert re.match(r'error: The checkpoint is part of a DINO detector of dino_mm', done.stderr.splitlines()[-1])


def test_pictures_that_can_not_be_written_end_the_test_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    done = run_tool('tools/test.py', CONFIG, 'none.pth', '--show-dir', tmp_path / 'file' / 'shown', status=1)
    assert done.stderr.splitlines()[-1].startswith(f'--show-dir {tmp_path}/file/shown: it can not be written into (')


@pytest.mark.parametrize('only_written', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_test_without_a_result_ends_with_one_line(
    trained: Path, data: Path, tmp_path: Path, only_written: bool
) -> None:
    """A model whose numbers overflow detects nothing; what is only to be written down needs no result."""
    state = torch.load(trained / 'iter_2.pth', weights_only=True)['state_dict']
    torch.save({name: tensor * 1e30 if 'decoder' in name else tensor for name, tensor in state.items()},
               tmp_path / 'large.pth')  # fmt: skip
    command = ('tools/test.py', CONFIG, tmp_path / 'large.pth', '--work-dir', tmp_path / 'work')
    settings = TINY | data_options(data)
    if only_written:
        settings |= {'test_evaluator.format_only': True, 'test_evaluator.outfile_prefix': tmp_path / 'results'}
        run_tool(*command, *options(settings))
        return
    done = run_tool(*command, *options(settings), status=1)
    assert done.stderr.splitlines()[-1].startswith(f'error: {tmp_path}/large.pth: the test has no result')
    assert 'Traceback' not in done.stderr


def test_test_evaluates_dumps_and_shows(trained: Path, data: Path, tmp_path: Path) -> None:
    done = run_tool(
        *('tools/test.py', CONFIG, trained / 'iter_4.pth', '--work-dir', tmp_path),
        *('--out', tmp_path / 'out.pkl', '--show-dir', os.path.relpath(tmp_path / 'shown', ROOT)),
        *options(TINY | data_options(data)),
    )
    assert 'coco/bbox_mAP:' in done.stdout
    results = pickle.loads((tmp_path / 'out.pkl').read_bytes())
    assert [r['img_id'] for r in results] == [1, 2, 3]
    assert all(0 < len(r['pred_instances']['scores']) <= 40 for r in results)
    pictures = sorted((tmp_path / 'shown').rglob('*.png'))
    assert [path.name for path in pictures] == sorted(path.name for path in (data / 'val').glob('*.png'))
    assert {path.parent for path in pictures} == {tmp_path / 'shown'}
    assert np.array(Image.open(pictures[0])).shape == (128, 256, 3)  # truth and predictions side by side


def test_test_time_augmentation_runs_every_size(trained: Path, data: Path, tmp_path: Path) -> None:
    done = run_tool(
        *('tools/test.py', CONFIG, trained / 'iter_4.pth', '--work-dir', tmp_path, '--tta'),
        *('--out', tmp_path / 'out.pkl', *options(TINY | data_options(data))),
    )
    assert 'coco/bbox_mAP:' in done.stdout
    boxes = torch.cat([r['pred_instances']['bboxes'] for r in pickle.loads((tmp_path / 'out.pkl').read_bytes())])
    assert 0 < boxes.max() <= 128  # in pixels of the original image, whatever the size


def test_faster_backend_gives_the_same_ap(trained: Path, data: Path, tmp_path: Path) -> None:
    figures = []
    for backend in ('pycocotools', 'faster-coco-eval'):
        done = run_tool(
            *('tools/test.py', CONFIG, trained / 'iter_4.pth', '--work-dir', tmp_path),
            *options(TINY | data_options(data) | {'test_evaluator.backend': backend}),
        )
        figures.append([line.split('coco/')[1] for line in done.stdout.splitlines() if 'coco/bbox_mAP:' in line])
        figures[-1] = [line.split('  data_time')[0] for line in figures[-1]]
    assert figures[0] == figures[1]
    assert len(figures[0]) == 1


def test_two_processes_train_and_test(data: Path, tmp_path: Path) -> None:
    """Without a checkout by the command that ``dino-mm new`` names; ``dist_train.sh`` is in test_distributed.py."""
    settings = options(TINY | data_options(data))
    command = launch_command('dino_digits', 2).replace('torchrun', 'torchrun --master_port=29617').split()
    command[:1] = [sys.executable, '-m', 'torch.distributed.run']
    run(*command, *settings, cwd=tmp_path, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    work_dir = tmp_path / 'work_dirs' / 'dino_digits'
    assert len([line for line in scalars(work_dir) if 'loss' in line]) == 4
    done = run(
        *('tools/dist_test.sh', CONFIG, work_dir / 'iter_4.pth', '2', '--work-dir', tmp_path, *settings),
        PORT='29618',
        OMP_NUM_THREADS='1',
    )
    assert 'coco/bbox_mAP:' in done.stdout + done.stderr


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh'])
def test_scripts_tell_their_usage(script: str) -> None:
    assert 'usage: ' in run(ROOT / 'tools' / script, status=2).stderr


def test_missing_annotations_end_with_the_remedy(tmp_path: Path) -> None:
    settings = options(TINY | data_options(tmp_path))
    done = run_tool('tools/train.py', CONFIG, '--work-dir', tmp_path, *settings, status=1)
    assert done.stderr.splitlines()[-1].startswith(f'error: There is no annotation file {tmp_path}')
    assert 'Traceback' not in done.stderr


def test_unknown_config_names_the_closest() -> None:
    done = run_tool('tools/train.py', 'dino-demo/dino_digit.py', status=1)
    assert 'dino-demo/dino_digits.py' in done.stderr.splitlines()[-1]


def test_mmdets_inferencer_takes_config_and_checkpoint(trained: Path, data: Path, tmp_path: Path) -> None:
    config = tmp_path / 'config.py'
    settings = options(TINY | data_options(data))[1:]
    code = """
import sys
from mmengine.config import Config
from mmdet.apis import DetInferencer
config, checkpoint, image, out, *settings = sys.argv[1:]
inferencer = DetInferencer(model=config, weights=checkpoint, device='cpu')
predictions = inferencer(image, out_dir=out, pred_score_thr=0.0)['predictions'][0]
print(sorted(predictions), len(predictions['scores']))
"""
    shrink = """
import sys
from mmengine.config import Config, DictAction
cfg = Config.fromfile(sys.argv[1])
cfg.merge_from_dict({k: DictAction._parse_iterable(v) for k, v in (s.split('=', 1) for s in sys.argv[3:])})
cfg.dump(sys.argv[2])
"""
    python('-c', shrink, CONFIG, config, *settings)
    image = next((data / 'val').glob('*.png'))
    done = python('-c', code, config, trained / 'iter_4.pth', image, tmp_path / 'out')
    assert "['bboxes', 'labels', 'scores'] " in done.stdout
    assert (tmp_path / 'out' / 'vis' / image.name).exists()


def test_training_arguments_reach_the_config(tmp_path: Path) -> None:
    """``--amp`` and ``--auto-scale-lr``; the first needs a GPU to run."""
    code = """
import sys
sys.path.insert(0, 'tools')
import train
from dino_mm.engine.launch import load_config
args = train.parse_args()
config = load_config(args)
train.apply_training_arguments(config, args)
print(config.optim_wrapper.type, config.optim_wrapper.loss_scale, config.auto_scale_lr.enable, config.work_dir)
"""
    arguments = ('dino-resnet/dino_r50_4scale_12ep.py', '--amp', '--auto-scale-lr')
    done = python('-c', code, *arguments)
    assert done.stdout.split()[-4:] == ['AmpOptimWrapper', 'dynamic', 'True', 'work_dirs/dino_r50_4scale_12ep']
