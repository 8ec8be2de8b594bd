"""Checkpoints of ours are plain data: they open without this package, and resuming from them loses nothing."""

import copy
import enum
import itertools
import json
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import mmengine.optim
import numpy as np
import pytest
import torch
from commands import MMDET_TOOLS, TINY, data_options, python
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner import Runner
from mmengine.utils import apply_to

import dino_mm
from dino_mm.datasets.digits import make_digits
from dino_mm.engine.plain_checkpoints import PlainCheckpointHook, from_plain, restore_dataset_meta, to_plain

NAMES = itertools.count()
ITERATIONS = 4
PLAIN = {one.__name__ for one in (dict, OrderedDict, Counter, list, tuple, int, float, str, bool, type(None))}
PLAIN |= {'Tensor', 'Size'}


class Notes(Hook):
    """Adds what no plain file holds, after all other hooks: numbers, arrays, and values of every process."""

    priority = 'LOWEST'

    def __init__(self, form: type = ConfigDict) -> None:
        self.form = form

    def after_train_iter(self, runner: Runner, batch_idx: int, **_) -> None:
        runner.message_hub.update_info('notes', dict(best=np.float32(batch_idx), curve=np.arange(batch_idx + 1) / 3))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        assert isinstance(checkpoint['message_hub']['log_scalars']['train/loss'], HistoryBuffer)
        checkpoint['notes'] = self.form(array=np.eye(2), numbers=[np.int64(3), np.bool_(True)])

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.hub, self.notes = copy.deepcopy(checkpoint['message_hub']), checkpoint['notes']


class Loaded(Hook):
    """What is known when everything is loaded."""

    priority = 'LOWEST'

    def before_train(self, runner: Runner) -> None:
        self.hub = copy.deepcopy(runner.message_hub)
        self.best = [hook.best_ckpt_path for hook in runner.hooks if hasattr(hook, 'best_ckpt_path')]


@pytest.fixture(scope='module')
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four iterations of the tiny digits detector, with moving averages, the best checkpoint and an early loaded."""
    folder = tmp_path_factory.mktemp('plain')
    data = make_digits(folder / 'data', num_train=5, num_val=2)
    cfg = Config.fromfile(dino_mm.cfg('dino-demo/dino_digits.py'))
    settings = {**TINY, **data_options(data), 'model.neck.in_channels': [8, 16, 32], 'train_cfg.val_interval': 2}
    cfg.merge_from_dict({key: str(v) if isinstance(v, Path) else v for key, v in settings.items()})
    cfg.default_hooks.checkpoint.update(save_best='coco/bbox_mAP', rule='greater')
    cfg.train_dataloader.dataset.metainfo = {**cfg.train_dataloader.dataset.get('metainfo', {}), 'more': dict(a=(1,))}
    cfg.custom_hooks = [
        *cfg.custom_hooks,
        dict(type='EMAHook', momentum=0.1),
        dict(type='EarlyStoppingHook', monitor='coco/bbox_mAP', patience=50),
    ]
    cfg.dump(folder / 'config.py')
    return folder / 'config.py'


def train(
    config: Path, work_dir: Path, checkpoint: Path | None = None, form: type = ConfigDict
) -> tuple[Runner, Loaded]:
    cfg = Config.fromfile(config)
    if form is dict:
        del cfg.train_dataloader.dataset.metainfo.more
    cfg.update(work_dir=str(work_dir), experiment_name=f'plain{next(NAMES)}', randomness=dict(seed=3))
    cfg.update(resume=checkpoint is not None, load_from=checkpoint and str(checkpoint))
    runner, loaded = Runner.from_cfg(cfg), Loaded()
    runner.register_hook(loaded)
    runner.register_hook(Notes(form))
    runner.train()
    return runner, loaded


@pytest.fixture(scope='module')
def straight(config: Path) -> tuple[Runner, Path]:
    """A training that was never stopped; its checkpoints are those of the tests."""
    work_dir = config.parent / 'straight'
    return train(config, work_dir)[0], work_dir


OPEN = """
import json, sys
import torch

def types(value):
    yield type(value).__name__
    if isinstance(value, dict):
        for key, one in value.items():
            yield from types(key)
            yield from types(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from types(one)

for path in sys.argv[1:]:
    content = torch.load(path)
    print(json.dumps([sorted(set(types(content))), sorted(content)]))
assert not {'dino_mm', 'mmengine', 'mmdet'} & set(sys.modules)
"""


def test_they_open_in_any_process(straight: tuple[Runner, Path]) -> None:
    """By torch alone: those of a number of iterations and the best."""
    files = sorted(straight[1].glob('*.pth'))
    assert [path.name for path in files if 'best' not in path.name] == ['iter_2.pth', 'iter_4.pth']
    assert len(files) == 3
    for path, line in zip(files, python('-c', OPEN, *files).stdout.splitlines(), strict=True):
        types, keys = json.loads(line)
        assert set(types) <= PLAIN
        assert set(keys) >= {'meta', 'state_dict', 'message_hub', 'ema_state_dict', 'notes'}
        assert ('optimizer' in keys) == ('best' not in path.name)


def test_mmdet_publishes_them(straight: tuple[Runner, Path], tmp_path: Path) -> None:
    path = straight[1] / 'iter_4.pth'
    python(MMDET_TOOLS / 'model_converters' / 'publish_model.py', path, tmp_path / 'published.pth')
    published, saved = (torch.load(file) for file in (next(tmp_path.glob('published-*.pth')), path))
    assert published.keys() == {'meta', 'state_dict'}
    assert published['meta'] == saved['meta']
    assert all(torch.equal(published['state_dict'][name], tensor) for name, tensor in saved['state_dict'].items())


# Without the list of types that dino_mm has torch let through.
INFER = """
import sys
import torch
torch.serialization.add_safe_globals = lambda *_: None
from mmdet.apis import DetInferencer
assert 'dino_mm' not in sys.modules
weights, *model = sys.argv[1:]
inferencer = DetInferencer(model=model[0] if model else None, weights=weights, device='cpu', show_progress=False)
print('classes', inferencer.model.dataset_meta['classes'])
name = 'bbox_head.cls_branches.0.bias'
assert torch.equal(inferencer.model.state_dict()[name], torch.load(weights)['state_dict'][name])
"""


@pytest.mark.parametrize('with_config', [True, False])
def test_inferencers_load_them(straight: tuple[Runner, Path], config: Path, with_config: bool) -> None:
    done = python('-c', INFER, straight[1] / 'iter_4.pth', *([config] if with_config else []))
    assert f'classes {tuple("0123456789")}' in done.stdout


def assert_same_log(actual: MessageHub, expected: MessageHub | dict, but: tuple = ()) -> None:
    """Histories, counts, what is smoothed from them, and their types; entries in ``but`` by their number alone."""
    if isinstance(expected, MessageHub):
        expected = dict(
            log_scalars=expected.log_scalars, runtime_info=expected.runtime_info, resumed_keys=expected._resumed_keys
        )
    assert actual.log_scalars.keys() == expected['log_scalars'].keys()
    for name, buffer in actual.log_scalars.items():
        other = expected['log_scalars'][name]
        for array, wanted in zip(buffer.data, other.data, strict=True):
            assert (array.shape, array.dtype) == (wanted.shape, wanted.dtype), name
            if name not in but:
                np.testing.assert_array_equal(array, wanted, err_msg=name)
        assert buffer.max_length == other.max_length
        for window in () if name in but else (1, 2, 20, None):
            assert buffer.statistics('mean', window) == other.statistics('mean', window), (name, window)
    assert actual._resumed_keys == expected['resumed_keys']


TIMES = ('train/time', 'train/data_time', 'val/time', 'val/data_time')
#: Entries of a run, not of a training.
OF_A_RUN = {'eta', 'cfg', 'experiment_name', 'last_ckpt', 'best_ckpt'}


@pytest.mark.parametrize('form', [ConfigDict, dict], ids=['plain', "mmengine's"])
def test_the_log_goes_on_where_it_was(
    form: type, straight: tuple[Runner, Path], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a checkpoint of today and from one as mmengine writes it, which has no config's dict."""
    runner, work_dir = straight
    if form is dict:
        with monkeypatch.context() as patch:
            patch.setattr(PlainCheckpointHook, 'before_save_checkpoint', lambda *_, **__: None)
            runner, _ = train(config, tmp_path / 'old', form=dict)
        work_dir = tmp_path / 'old'
    saved = torch.load(work_dir / 'iter_2.pth', weights_only=True)
    assert isinstance(saved['message_hub']['log_scalars']['train/loss'], HistoryBuffer) == (form is dict)

    resumed, loaded = train(config, tmp_path / 'on', work_dir / 'iter_2.pth', form)
    noted = next(hook for hook in resumed.hooks if isinstance(hook, Notes))
    assert_same_log(loaded.hub, noted.hub)
    assert len(loaded.hub.get_scalar('train/loss').data[0]) == 2
    assert_same_log(resumed.message_hub, runner.message_hub, TIMES)
    assert len(resumed.message_hub.get_scalar('train/loss').data[0]) == ITERATIONS
    times, others = (one.message_hub.get_scalar('train/time').data[0][:2] for one in (resumed, runner))
    assert times.tolist() == others.tolist()
    infos, others = (dict(one.message_hub.runtime_info) for one in (resumed, runner))
    notes, wanted = infos.pop('notes'), others.pop('notes')
    np.testing.assert_array_equal(notes['curve'], wanted['curve'])
    assert infos.keys() == others.keys()
    assert all(info == others[name] for name, info in infos.items() if name not in OF_A_RUN)
    assert loaded.best == [saved['message_hub']['runtime_info']['best_ckpt']]
    assert type(noted.hub['runtime_info']['notes']['curve']) is np.ndarray
    np.testing.assert_array_equal(noted.notes['array'], np.eye(2), strict=True)
    log = next((tmp_path / 'on').glob('*/*.log')).read_text()
    assert 'dataset metainfo from the resumed checkpoint' not in log
    assert 'message_hub' not in log  # of what mmengine could not resume

    first, second = (torch.load(folder / 'iter_4.pth') for folder in (work_dir, tmp_path / 'on'))
    for key in ('state_dict', 'ema_state_dict'):
        assert all(torch.equal(first[key][name], tensor) for name, tensor in second[key].items())


def test_a_runner_without_the_hook_reads_all_but_the_log(straight: tuple[Runner, Path]) -> None:
    """As mmengine alone does; its message hub takes the rest."""
    saved = torch.load(straight[1] / 'iter_2.pth')
    hub = MessageHub(f'plain{next(NAMES)}')
    hub.load_state_dict(saved['message_hub'])
    assert not hub.log_scalars
    assert hub.get_info('iter') == 1
    assert hub.get_info('seed') == 3


class Colour(enum.IntEnum):
    RED = 1


def buffer(length: int, whole: bool = False, **more: int) -> HistoryBuffer:
    made = HistoryBuffer(**more)
    for i in range(length):
        made.update(i if whole else i / 7, i + 1)
    return made


VALUES = {
    'number': (np.float32(0.1), float(np.float32(0.1))),
    'nan': (np.float64('nan'), float('nan')),
    'count': (np.int64(2**40), 2**40),
    'truth': (np.bool_(True), True),
    'text': (np.str_('a'), 'a'),
    'enumeration': (Colour.RED, 1),
    'config': (ConfigDict(a=ConfigDict(b=[1])), dict(a=dict(b=[1]))),
    'subclass': (defaultdict(int, a=(1, [np.int8(2)])), dict(a=(1, [2]))),
    'keys': ({np.int64(1): 'a', np.str_('b'): 2}, {1: 'a', 'b': 2}),
    'milestones': (Counter([1, 1, 2]),) * 2,
    'ordered': (OrderedDict(b=1, a=np.int64(2)), OrderedDict(b=1, a=2)),
    'set': ({1, 2},) * 2,
    'nothing': (dict(a=None, b=(), c=[]),) * 2,
    'torch': ((torch.Size([2]), torch.float16, torch.device('cpu')),) * 2,
}
ARRAYS = {
    'float': np.array([0.1, np.nan]),
    'half': np.ones((2, 1), np.float16),
    'no axis': np.array(3),
    'empty': np.zeros((0, 4), np.int32),
    'truths': np.array([True, False]),
    'text': np.array(['a', 'bc']),
    'backwards': np.arange(6)[::-2],
    'read only': np.broadcast_to(np.int64(1), (2, 3)),
}
HISTORIES = {
    'floats': buffer(50),
    'whole': buffer(5, whole=True),
    'nothing': buffer(0),
    'one': HistoryBuffer([2.5], [3]),
    'full': buffer(9, max_length=4),
}


def through_a_file(content: dict, path: Path) -> dict:
    """Saved as plain data, and loaded by torch with no type let through but its own."""
    to_plain(content)
    torch.save(content, path)
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        return torch.load(path, weights_only=True)
    finally:
        torch.serialization.add_safe_globals(allowed)


@pytest.mark.parametrize('value', VALUES)
@pytest.mark.parametrize('key', ['meta', 'message_hub', 'other'])
def test_values_keep_what_they_say(key: str, value: str, tmp_path: Path) -> None:
    given, expected = VALUES[value]
    loaded = through_a_file({key: dict(a=[given])}, tmp_path / 'x.pth')
    assert repr(loaded[key]) == repr(dict(a=[expected]))  # with types, and equal for what is no number
    from_plain(loaded)
    assert repr(loaded[key]) == repr(dict(a=[expected]))


@pytest.mark.parametrize('array', ARRAYS)
def test_arrays_come_back(array: str, tmp_path: Path) -> None:
    """As they were; in `meta`, which others read, they are lists."""
    given = ARRAYS[array]
    content = dict(meta=dict(a=given), message_hub=dict(runtime_info=dict(a=given, b=(given, [dict(c=given)]))))
    loaded = through_a_file(content, tmp_path / 'x.pth')
    assert repr(loaded['meta']['a']) == repr(given.tolist())
    from_plain(loaded)
    info = loaded['message_hub']['runtime_info']
    for back in (info['a'], info['b'][0], info['b'][1][0]['c']):
        np.testing.assert_array_equal(back, given, strict=True)


@pytest.mark.parametrize('name', HISTORIES)
def test_histories_come_back(name: str, tmp_path: Path) -> None:
    given = HISTORIES[name]
    loaded = through_a_file(dict(message_hub=dict(log_scalars=OrderedDict(a=given))), tmp_path / 'x.pth')
    from_plain(loaded)
    back = loaded['message_hub']['log_scalars']['a']
    assert type(back) is HistoryBuffer
    assert back.max_length == given.max_length
    for ours, wanted in zip(back.data, given.data, strict=True):
        np.testing.assert_array_equal(ours, wanted, strict=True)
    for one in (back, copy.deepcopy(given)):
        one.update(1)
    assert len(back.data[0]) == min(len(given.data[0]) + 1, given.max_length)


def test_what_is_not_plain_is_left_out_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest entry that has a name; the rest stays."""
    said: list[str] = []
    monkeypatch.setattr('dino_mm.engine.plain_checkpoints.print_log', lambda message, **_: said.append(message))
    content = dict(
        meta=dict(path=tmp_path, iter=2), message_hub=dict(runtime_info=dict(a=[1, [object()]], b=1)), extra=len
    )
    loaded = through_a_file(content, tmp_path / 'x.pth')
    assert loaded == dict(meta=dict(iter=2), message_hub=dict(runtime_info=dict(b=1)))
    assert [message.split('is not')[0] for message in said] == [
        "A checkpoint is written without its entry ['meta']['path']: pathlib.PosixPath ",
        "A checkpoint is written without its entry ['message_hub']['runtime_info']['a']: builtins.object ",
        "A checkpoint is written without its entry ['extra']: builtins.builtin_function_or_method ",
    ]


def test_tensors_are_not_touched(tmp_path: Path) -> None:
    """A state dict has versions of its modules besides its entries; schedulers and optimizers go on with theirs."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    state, optimizer = model.state_dict(), torch.optim.AdamW(model.parameters())
    content = dict(state_dict=state, optimizer=optimizer.state_dict())
    to_plain(content)
    assert content['state_dict'] is state
    assert content['state_dict']._metadata['1'] == dict(version=2)
    live = dict(a=[np.float64(1)])
    to_plain(dict(message_hub=live))
    assert type(live['a'][0]) is np.float64  # the hub goes on with it


SCHEDULERS = {
    'MultiStepLR': dict(milestones=[2, 3]),
    'LinearLR': dict(start_factor=0.1, end=3),
    'CosineAnnealingLR': dict(T_max=4),
    'PolyLR': dict(power=0.9, end=4),
    'OneCycleLR': dict(eta_max=0.1, total_steps=9),
    'StepLR': dict(step_size=2),
    'ReduceOnPlateauLR': dict(monitor='loss'),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', SCHEDULERS)
def test_schedulers_go_on(name: str, tmp_path: Path) -> None:
    def make() -> tuple:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
        return optimizer, getattr(mmengine.optim, name)(optimizer, **SCHEDULERS[name])

    (optimizer, scheduler), (other, resumed) = make(), make()
    metrics = [dict(loss=1.0)] if name == 'ReduceOnPlateauLR' else []
    for _ in range(2):
        scheduler.step(*metrics)
    content = dict(param_schedulers=[scheduler.state_dict()], optimizer=optimizer.state_dict())
    loaded = through_a_file(content, tmp_path / 'x.pth')
    from_plain(loaded)
    other.load_state_dict(loaded['optimizer'])
    resumed.load_state_dict(loaded['param_schedulers'][0])
    for _ in range(3):
        scheduler.step(*metrics)
        resumed.step(*metrics)
        assert other.param_groups[0]['lr'] == optimizer.param_groups[0]['lr']


@pytest.mark.parametrize(('own', 'same'), [(('a', 'b'), True), (('a', 'c'), False), (('a',), False)])
def test_the_data_set_is_the_same_where_it_says_the_same(own: tuple, same: bool, tmp_path: Path) -> None:
    """Whatever the types, which mmengine compares."""
    metainfo = dict(classes=('a', 'b'), palette=np.zeros((2, 3), int), more=ConfigDict(a=1))
    loaded = through_a_file(dict(meta=dict(dataset_meta=metainfo)), tmp_path / 'x.pth')
    of_run = {**metainfo, 'classes': own}
    restore_dataset_meta(loaded, of_run)
    assert (loaded['meta']['dataset_meta'] is of_run) == same
    for other in (dict(), dict(meta=None), dict(meta=dict(iter=1))):
        before = copy.deepcopy(other)
        restore_dataset_meta(other, of_run)
        assert other == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason='mmengine resumes onto the device that there is')
def test_histories_come_back_from_a_gpu() -> None:
    content = dict(message_hub=dict(a=HistoryBuffer([0.5], [1]), b=np.arange(3)))
    to_plain(content)
    content = apply_to(content, torch.is_tensor, torch.Tensor.cuda)
    from_plain(content)
    assert content['message_hub']['a'].mean() == 0.5
    assert content['message_hub']['b'].tolist() == [0, 1, 2]
