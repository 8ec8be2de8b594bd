"""The command-line tools, from the repository: train, resume, test, show, distributed."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, TINY, data_options, options, python, run, scalars
from PIL import Image

from dino_mm.datasets.digits import make_digits

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
    python('tools/train.py', CONFIG, '--work-dir', tmp_path, '--resume', trained / 'iter_2.pth', *settings)
    resumed, straight = (torch.load(d / 'iter_4.pth', weights_only=True) for d in (tmp_path, trained))
    assert resumed['meta']['iter'] == straight['meta']['iter'] == 4
    groups = [checkpoint['optimizer']['param_groups'] for checkpoint in (resumed, straight)]
    assert groups[0] == groups[1]
    steps = {int(state['step']) for state in resumed['optimizer']['state'].values()}
    assert steps == {4}
    assert [line['step'] for line in scalars(tmp_path) if 'loss' in line] == [3, 4]


def test_test_evaluates_dumps_and_shows(trained: Path, data: Path, tmp_path: Path) -> None:
    done = python(
        *('tools/test.py', CONFIG, trained / 'iter_4.pth', '--work-dir', tmp_path),
        *('--out', tmp_path / 'out.pkl', '--show-dir', 'shown'),
        *options(TINY | data_options(data)),
    )
    assert 'coco/bbox_mAP:' in done.stdout
    results = pickle.loads((tmp_path / 'out.pkl').read_bytes())
    assert [r['img_id'] for r in results] == [1, 2, 3]
    assert all(0 < len(r['pred_instances']['scores']) <= 40 for r in results)
    pictures = sorted(tmp_path.glob('*/shown/*.png'))
    assert len(pictures) == 3
    assert np.array(Image.open(pictures[0])).shape == (128, 256, 3)  # truth and predictions side by side


def test_test_time_augmentation_runs_every_size(trained: Path, data: Path, tmp_path: Path) -> None:
    done = python(
        *('tools/test.py', CONFIG, trained / 'iter_4.pth', '--work-dir', tmp_path, '--tta'),
        *('--out', tmp_path / 'out.pkl', *options(TINY | data_options(data))),
    )
    assert 'coco/bbox_mAP:' in done.stdout
    boxes = torch.cat([r['pred_instances']['bboxes'] for r in pickle.loads((tmp_path / 'out.pkl').read_bytes())])
    assert 0 < boxes.max() <= 128  # in pixels of the original image, whatever the size


def test_faster_backend_gives_the_same_ap(trained: Path, data: Path, tmp_path: Path) -> None:
    figures = []
    for backend in ('pycocotools', 'faster-coco-eval'):
        done = python(
            *('tools/test.py', CONFIG, trained / 'iter_4.pth', '--work-dir', tmp_path),
            *options(TINY | data_options(data) | {'test_evaluator.backend': backend}),
        )
        figures.append([line.split('coco/')[1] for line in done.stdout.splitlines() if 'coco/bbox_mAP:' in line])
        figures[-1] = [line.split('  data_time')[0] for line in figures[-1]]
    assert figures[0] == figures[1]
    assert len(figures[0]) == 1


def test_distributed_scripts_train_and_test_on_two_processes(data: Path, tmp_path: Path) -> None:
    settings = options(TINY | data_options(data))
    run('tools/dist_train.sh', CONFIG, '2', '--work-dir', tmp_path, *settings, PORT='29617', OMP_NUM_THREADS='1')
    assert (tmp_path / 'iter_4.pth').exists()
    assert len([line for line in scalars(tmp_path) if 'loss' in line]) == 4
    done = run(
        *('tools/dist_test.sh', CONFIG, tmp_path / 'iter_4.pth', '2', '--work-dir', tmp_path, *settings),
        PORT='29618',
        OMP_NUM_THREADS='1',
    )
    assert 'coco/bbox_mAP:' in done.stdout + done.stderr


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh'])
def test_scripts_tell_their_usage(script: str) -> None:
    assert 'usage: ' in run(ROOT / 'tools' / script, status=2).stderr


def test_missing_annotations_end_with_the_remedy(tmp_path: Path) -> None:
    settings = options(TINY | data_options(tmp_path))
    done = python('tools/train.py', CONFIG, '--work-dir', tmp_path, *settings, status=1)
    assert f'There is no annotation file {tmp_path}' in done.stderr.splitlines()[-1]


def test_unknown_config_names_the_closest() -> None:
    done = python('tools/train.py', 'dino-demo/dino_digit.py', status=1)
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
