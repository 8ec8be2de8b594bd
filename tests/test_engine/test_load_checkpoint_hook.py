"""Checkpoints through mmengine's runner: other libraries' weights and progress, other classes, our own bit by bit."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from commands import TINY, data_options
from foreign import as_detrex, randomize
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import Tensor

import dino_mm
from dino_mm.checkpoints.errors import CheckpointError
from dino_mm.datasets.digits import make_digits
from dino_mm.engine import LoadCheckpointHook
from dino_mm.registry import MODELS


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp('digits') / 'data', num_train=6, num_val=2)


@pytest.fixture
def cfg(data: Path, tmp_path: Path) -> Config:
    """Training of four iterations of a tiny detector of ten digits; no evaluation."""
    cfg = Config.fromfile(dino_mm.cfg('dino-demo/dino_digits.py'))
    settings = {**TINY, **data_options(data), 'model.neck.in_channels': [8, 16, 32], 'val_cfg': None}
    settings |= {'val_dataloader': None, 'val_evaluator': None, 'work_dir': str(tmp_path / 'work')}
    cfg.merge_from_dict({key: str(v) if isinstance(v, Path) else v for key, v in settings.items()})
    for key in ('val_cfg', 'val_dataloader', 'val_evaluator'):
        cfg[key] = None
    cfg.default_hooks.checkpoint.interval = 2
    return cfg


class Snapshot(Hook):
    """What there is when everything is loaded, before the first iteration; training then ends unless told to go on."""

    def __init__(self, go_on: bool = False) -> None:
        self.go_on = go_on

    def before_train(self, runner: Runner) -> None:
        self.weights = {name: tensor.clone() for name, tensor in runner.model.state_dict().items()}
        self.optimizer = copy.deepcopy(runner.optim_wrapper.state_dict())
        self.schedulers = [scheduler.state_dict() for scheduler in runner.param_schedulers]
        self.iteration = runner.iter
        runner.train_loop.stop_training = not self.go_on


def train(cfg: Config, name: str, go_on: bool = False, **settings: object) -> Snapshot:
    cfg = copy.deepcopy(cfg)
    cfg.merge_from_dict(settings)
    cfg.experiment_name = name
    runner = Runner.from_cfg(cfg)
    snapshot = Snapshot(go_on)
    runner.register_hook(snapshot)
    runner.train()
    return snapshot


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit by bit."""
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def weights(cfg: Config, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of the config's model."""
    init_default_scope('mmdet')
    return randomize(MODELS.build(cfg.model).state_dict(), seed)


def without_counts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.endswith('num_batches_tracked')}


def test_our_own_resumes_bit_by_bit(cfg: Config) -> None:
    train(cfg, 'straight', go_on=True)
    path = Path(cfg.work_dir) / 'iter_2.pth'
    saved = torch.load(path, weights_only=True)
    resumed = train(cfg, 'resumed', resume=True, load_from=str(path))
    assert resumed.iteration == 2
    assert_same(resumed.weights, saved['state_dict'])
    assert resumed.optimizer['param_groups'] == saved['optimizer']['param_groups']
    assert resumed.optimizer['state'].keys() == saved['optimizer']['state'].keys()
    assert len(resumed.optimizer['state']) > 100
    for index, state in resumed.optimizer['state'].items():
        assert_same(state, saved['optimizer']['state'][index])
    assert resumed.schedulers == saved['param_schedulers']


def test_load_from_detrex(cfg: Config, tmp_path: Path) -> None:
    state = weights(cfg)
    torch.save(dict(model=as_detrex(state), iteration=89999), tmp_path / 'detrex.pth')
    snapshot = train(cfg, 'loaded', load_from=str(tmp_path / 'detrex.pth'))
    assert snapshot.iteration == 0
    assert_same(without_counts(snapshot.weights), without_counts(state))


@pytest.mark.parametrize(
    ('progress', 'iteration'), [(dict(iteration=1), 2), (dict(epoch=0), 3), (dict(meta=dict(iter=2, epoch=1)), 2)]
)
def test_resume_elsewhere(cfg: Config, tmp_path: Path, progress: dict, iteration: int) -> None:
    """By detectron2's count, by epochs of three iterations, by MMDetection's count; the schedule follows."""
    cfg.param_scheduler = [dict(type='MultiStepLR', by_epoch=False, milestones=[2, 3], gamma=0.1)]
    state = weights(cfg)
    torch.save(dict(model=as_detrex(state), **progress), tmp_path / 'detrex.pth')
    snapshot = train(cfg, 'elsewhere', go_on=True, resume=True, load_from=str(tmp_path / 'detrex.pth'))
    assert snapshot.iteration == iteration
    assert_same(without_counts(snapshot.weights), without_counts(state))
    assert snapshot.optimizer['state'] == {}
    base = cfg.optim_wrapper.optimizer.lr
    assert snapshot.optimizer['param_groups'][0]['lr'] == pytest.approx(base * 0.1 ** (iteration - 1))
    final = torch.load(Path(cfg.work_dir) / 'iter_4.pth', weights_only=True)
    assert final['meta']['iter'] == 4
    assert {int(s['step']) for s in final['optimizer']['state'].values()} == {4 - iteration}


def test_resume_needs_to_know_how_far(cfg: Config, tmp_path: Path) -> None:
    torch.save(dict(model=as_detrex(weights(cfg))), tmp_path / 'detrex.pth')
    with pytest.raises(CheckpointError, match='does not tell how long it was trained'):
        train(cfg, 'unknown', resume=True, load_from=str(tmp_path / 'detrex.pth'))


def test_averaged_weights_when_asked(cfg: Config, tmp_path: Path) -> None:
    state, average = weights(cfg), weights(cfg, seed=5)
    torch.save(dict(model=as_detrex(state), ema_state=as_detrex(average)), tmp_path / 'ema.pth')
    path = str(tmp_path / 'ema.pth')
    plain = train(cfg, 'plain', load_from=path)
    assert_same(without_counts(plain.weights), without_counts(state))
    asked = train(cfg, 'asked', load_from=path, **{'default_hooks.loading.ema': True})
    assert_same(without_counts(asked.weights), without_counts(average))


def test_class_transfer_is_one_line(cfg: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From five classes of the checkpoint, three of which the ten digits have."""
    few = copy.deepcopy(cfg)
    few.model.bbox_head.num_classes = 5
    state = weights(few)
    classes = ('7', 'cat', '0', 'zero', '3')
    checkpoint = dict(state_dict=state, meta=dict(dataset_meta=dict(classes=classes)))
    torch.save(checkpoint, tmp_path / 'few.pth')
    path = str(tmp_path / 'few.pth')
    with pytest.raises(CheckpointError, match=r'The model has 10 classes. .* class_transfer=True'):
        train(cfg, 'refused', load_from=path)

    snapshot = train(cfg, 'kept', load_from=path, **{'default_hooks.loading.class_transfer': True})
    names = ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')
    assert tuple(cfg.train_dataloader.dataset.metainfo.classes) == names
    kept = {0: 2, 3: 4, 7: 0}
    prior = -math.log(99)
    for layer in range(len([name for name in state if name.endswith('.bias') and 'cls_branches' in name])):
        bias = snapshot.weights[f'bbox_head.cls_branches.{layer}.bias']
        source = state[f'bbox_head.cls_branches.{layer}.bias']
        expected = [source[kept[row]] if row in kept else prior for row in range(10)]
        torch.testing.assert_close(bias, torch.tensor(expected))
    embedding = snapshot.weights['denoising.label_embedding.weight']
    source = state['denoising.label_embedding.weight']
    assert all(torch.equal(embedding[row], source[old]) for row, old in kept.items())
    rest = [name for name in state if 'cls_branches' not in name and 'label_embedding' not in name]
    assert_same({n: snapshot.weights[n] for n in rest}, {n: state[n] for n in rest})
    log = next(Path(cfg.work_dir).glob('*kept*/*.log'), None) or max(Path(cfg.work_dir).glob('*/*.log'))
    assert '3 of 10 classes are taken over' in log.read_text()


def test_class_transfer_by_an_explicit_map(cfg: Config, tmp_path: Path) -> None:
    few = copy.deepcopy(cfg)
    few.model.bbox_head.num_classes = 2
    state = weights(few)
    torch.save(dict(model=as_detrex(state)), tmp_path / 'few.pth')
    options = dict(classes=['null', 'eins'], renamed={'1': 'eins', '0': 'null'})
    settings = {'load_from': str(tmp_path / 'few.pth'), 'default_hooks.loading.class_transfer': options}
    snapshot = train(cfg, 'mapped', **settings)
    assert torch.equal(
        snapshot.weights['bbox_head.cls_branches.0.weight'][:2], state['bbox_head.cls_branches.0.weight']
    )
    with pytest.raises(CheckpointError, match='has 2 classes and does not tell their names'):
        train(cfg, 'unnamed', **{**settings, 'default_hooks.loading.class_transfer': True})


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r'`class_transfer` has no map; it has `renamed` and `classes`'):
        LoadCheckpointHook(class_transfer=dict(map={}))


def log_of(cfg: Config) -> str:
    """All that was logged in the work folder."""
    return ''.join(path.read_text() for path in Path(cfg.work_dir).glob('*/*.log'))


@pytest.mark.parametrize('names', ['ours', "detrex's"])
def test_part_of_a_model_is_a_start_and_nothing_else(cfg: Config, tmp_path: Path, names: str) -> None:
    """A training starts from it with one warning; a test or a resumed training does not."""
    state = weights(cfg)
    given = state if names == 'ours' else as_detrex(state)
    part = {f'module.{name}': tensor for name, tensor in given.items() if 'encoder.' in name}
    path = tmp_path / 'part.pth'
    torch.save(dict(state_dict=part, meta=dict(iter=1, epoch=0)), path)
    snapshot = train(cfg, 'part', load_from=str(path))
    own = {name for name in state if name.startswith('encoder.')}
    assert len(own) == len(part)
    assert_same({name: snapshot.weights[name] for name in own}, {name: state[name] for name in own})
    assert not torch.equal(snapshot.weights['level_embed'], state['level_embed'])
    log = log_of(cfg)
    missing = len(state) - len(part)
    assert log.count('tensors of the model are not in it and stay as they are') == 1
    assert f'WARNING - The checkpoint is part of a DINO detector of {"dino_mm" if names == "ours" else "detrex"}' in log
    assert f'{missing} tensors of the model' in log

    with pytest.raises(CheckpointError, match=rf'It does not fit the model: {missing} tensors not in the checkpoint'):
        train(cfg, 'resumed', load_from=str(path), resume=True)
    tested = Config.fromfile(dino_mm.cfg('dino-demo/dino_digits.py'))
    cfg.test_cfg, cfg.test_evaluator = (
        tested.test_cfg,
        dict(type='DumpDetResults', out_file_path=str(tmp_path / 'x.pkl')),
    )
    cfg.load_from, cfg.experiment_name = str(path), 'tested'
    with pytest.raises(CheckpointError, match=rf'It does not fit the model: {missing} tensors not in the checkpoint'):
        Runner.from_cfg(cfg).test()


def test_class_transfer_takes_a_part_without_classes(cfg: Config, tmp_path: Path) -> None:
    state = weights(cfg)
    torch.save({name: state[name] for name in state if name.startswith('encoder.')}, tmp_path / 'part.pth')
    settings = {'load_from': str(tmp_path / 'part.pth'), 'default_hooks.loading.class_transfer': True}
    snapshot = train(cfg, 'without', **settings)
    name = 'encoder.layers.0.norms.0.weight'
    assert torch.equal(snapshot.weights[name], state[name])


@pytest.mark.parametrize('other', [True, False])
def test_the_config_in_a_checkpoint_is_compared_and_taken_out(cfg: Config, tmp_path: Path, other: bool) -> None:
    """By `runner.resume` too, of which the config does not tell; another place is no other config."""
    saved = copy.deepcopy(cfg)
    saved.work_dir, saved.load_from, saved.resume, saved.launcher = 'elsewhere', 'a.pth', True, 'none'
    saved.train_cfg.max_iters += other
    text = saved.pretty_text
    hook, runner = LoadCheckpointHook(), Runner.from_cfg(cfg)
    runner.cfg.load_from = 'b'
    runner._resume = True
    meta = dict(config=text, iter=1, epoch=0)
    checkpoint = dict(state_dict=runner.model.state_dict(), meta=meta, message_hub={})
    hook.after_load_checkpoint(runner, checkpoint)
    assert checkpoint['meta'] == dict(iter=1, epoch=0)
    assert ('differs from this run' in log_of(cfg)) == other
    for iterations in (cfg.train_cfg.max_iters, cfg.train_cfg.max_iters + 1):
        assert (re.search(rf'^[-+].*max_iters={iterations}\b', log_of(cfg), re.MULTILINE) is not None) == other
    runner._resume = False
    checkpoint['meta']['config'] = text
    hook.after_load_checkpoint(runner, checkpoint)
    assert 'config' not in checkpoint['meta']


def test_a_strangers_config_fills_no_log_and_steers_no_terminal(cfg: Config) -> None:
    hook, runner = LoadCheckpointHook(), Runner.from_cfg(cfg)
    runner._resume = True
    text = '\x1b[2J' + '\n'.join(f'line_{i} = {"x" * 10_000}' for i in range(1000))
    meta = dict(config=text, iter=1, epoch=0)
    checkpoint = dict(state_dict=runner.model.state_dict(), meta=meta, message_hub={})
    before = len(log_of(cfg))
    hook.after_load_checkpoint(runner, checkpoint)
    said = log_of(cfg)[before:]
    assert r'-\x1b[2J' in said
    assert '\x1b' not in said
    assert len(said) < 1500
    assert re.search(r'^and \d{4} more$', said, re.MULTILINE)
