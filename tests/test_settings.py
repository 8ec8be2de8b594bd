"""Settings: one value that reaches every place of a config, whoever reads it."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, python
from mmengine.config import Config
from zoo import ENTRIES

import dino_mm
from dino_mm.engine.launch import load_config
from dino_mm.settings import SETTINGS, SettingError, apply_settings, read_config

R50 = 'dino_r50_4scale_12ep'
#: The first of the zoo's configs of each schedule.
RECIPES: dict[str, Any] = {}
for _entry in ENTRIES:
    _schedule = re.search(r"'\.\./_base_/schedules/(\w+)\.py'", (ROOT / _entry.config).read_text())
    assert _schedule is not None
    RECIPES.setdefault(_schedule[1], _entry)


def child(folder: Path, text: str, base: str = R50) -> Path:
    """A config in a file that inherits ours."""
    return write(folder, f"_base_ = 'dino_mm::{base}'\n{text}\n")


def write(folder: Path, text: str) -> Path:
    path = folder / 'config.py'
    path.write_text(text)
    return path


def lengths(config: Config) -> dict[str, Any]:
    """Every length in pixels of the pipelines, by where it stands."""
    train = config.train_dataloader.dataset.pipeline[3].transforms
    return {
        'train': [list(scale) for scale in train[0][0].scales],
        'before crop': [scale[0] for scale in train[1][0].scales],
        'crop': list(train[1][1].crop_size),
        'after crop': [list(scale) for scale in train[1][2].scales],
        'val': list(config.val_dataloader.dataset.pipeline[1].scale),
        'test': list(config.test_dataloader.dataset.pipeline[1].scale),
        'tta': [list(t.scale) for t in config.tta_pipeline[1].transforms[0]],
    }


@pytest.mark.parametrize(('size', 'longest'), [(400, 667), (640, 1066), (800, 1333), (1200, 2000)])
def test_image_size_reaches_all_pipelines(size: int, longest: int) -> None:
    config = read_config(dino_mm.cfg(R50), {'image_size': size})
    train = [[int(short * size / 800 + 0.5), longest] for short in range(480, 801, 32)]
    assert lengths(config) == {
        'train': train,
        'before crop': [int(short * size / 800 + 0.5) for short in (400, 500, 600)],
        'crop': [int(384 * size / 800 + 0.5), int(600 * size / 800 + 0.5)],
        'after crop': train,
        'val': [size, longest],
        'test': [size, longest],
        'tta': [[size, longest]],
    }
    for name in ('train_pipeline', 'test_pipeline'):  # what a project may inherit by its name
        assert config[name] == config[name.replace('pipeline', 'dataloader')].dataset.pipeline


def test_image_size_reaches_wrapped_data_sets_and_a_project_s_own_pipelines(tmp_path: Path) -> None:
    text = """
resize = dict(type='RandomResize', scale=[(1333, 400), (1333, 600)], keep_ratio=True)
crop = dict(type='RandomCrop', crop_type='relative_range', crop_size=(0.5, 0.5))
part = dict(type='dino_mm.CheckedCocoDataset', pipeline=[resize, crop, dict(type='Pad', size=(800, -1))])
train_dataloader = dict(dataset=dict(_delete_=True, type='RepeatDataset', times=2,
                                     dataset=dict(type='ConcatDataset', datasets=[part, part])))
image_size = 400
"""
    config = Config.fromfile(child(tmp_path, text))
    for part in config.train_dataloader.dataset.dataset.datasets:
        assert part.pipeline[0].scale == [(667, 200), (667, 300)]
        assert part.pipeline[1].crop_size == (0.5, 0.5)
        assert part.pipeline[2].size == (400, -1)


@pytest.mark.parametrize('entry', RECIPES.values(), ids=RECIPES)
def test_epochs_of_every_recipe(entry: Any) -> None:
    """Milestones keep their share; the recipe's own number of epochs gives its own milestones."""
    recipe = Config.fromfile(ROOT / entry.config)
    epochs = recipe.train_cfg.max_iters // 7500
    config = read_config(ROOT / entry.config, {'epochs': epochs})
    assert config.train_cfg == dict(type='dino_mm.EpochBasedTrainLoop', max_epochs=epochs, val_interval=1)
    last, before = config.param_scheduler[-1], recipe.param_scheduler[-1]
    assert (last.by_epoch, last.begin, last.end) == (True, 0, epochs)
    assert last.milestones == [min(epochs - 1, int(before.milestones[0] / 7500 + 0.5))]
    assert config.param_scheduler[:-1] == recipe.param_scheduler[:-1]  # a warm-up keeps its iterations
    assert config.train_dataloader.sampler == dict(type='DefaultSampler', shuffle=True)
    assert config.default_hooks.checkpoint.by_epoch is config.default_hooks.logger.log_metric_by_epoch is True
    assert (config.default_hooks.checkpoint.interval, config.log_processor.by_epoch) == (1, True)


def test_epochs_write_what_the_recipe_by_epochs_states() -> None:
    stated = dino_mm.get_config('dino_r50_4scale_12ep_by_epoch').to_dict()
    made = read_config(dino_mm.cfg(R50), {'epochs': 12}).to_dict()
    assert {key for key in stated if stated[key] != made.get(key)} == {'max_epochs', 'epochs'} & stated.keys()


@pytest.mark.parametrize(
    ('length', 'milestones'), [({'epochs': n}, [m]) for n, m in ((1, 1), (2, 1), (5, 4), (24, 22), (100, 92))]
)
def test_a_drop_comes_before_the_end(length: dict, milestones: list[int]) -> None:
    assert read_config(dino_mm.cfg(R50), length).param_scheduler[0].milestones == milestones


def test_max_iters_bounds_intervals_and_moves_schedules(tmp_path: Path) -> None:
    config = read_config(dino_mm.cfg(R50), {'max_iters': 1000})
    assert config.train_cfg == dict(type='dino_mm.IterBasedTrainLoop', max_iters=1000, val_interval=1000)
    assert config.param_scheduler == [
        dict(type='MultiStepLR', begin=0, end=1000, by_epoch=False, milestones=[917], gamma=0.1)
    ]
    assert config.default_hooks.checkpoint.interval == 1000
    assert read_config(dino_mm.cfg(R50), {'max_iters': 180000}).train_cfg.val_interval == 5000
    digits = read_config(dino_mm.cfg('dino_digits'), {'max_iters': 400}).param_scheduler
    assert [(s.begin, s.end, s.get('T_max')) for s in digits] == [(0, 15, None), (15, 400, 385)]
    # From epochs back to iterations; of a warm-up by iterations a tenth of the training is left.
    by_epoch = read_config(dino_mm.cfg('dino_vitdet_large_4scale_12ep'), {'epochs': 10})
    by_epoch.dump(tmp_path / 'by_epoch.py')
    config = read_config(tmp_path / 'by_epoch.py', {'max_iters': 100})
    assert config.train_cfg == dict(type='dino_mm.IterBasedTrainLoop', max_iters=100, val_interval=100)
    assert [(s.end, s.by_epoch) for s in config.param_scheduler] == [(10, False), (100, False)]
    assert config.param_scheduler[1].milestones == [80]
    assert config.default_hooks.checkpoint.by_epoch is config.log_processor.by_epoch is False


def test_val_interval_counts_in_the_unit_of_the_training(tmp_path: Path) -> None:
    for length in ({'epochs': 30}, {'max_iters': 100}, {}):
        config = read_config(dino_mm.cfg(R50), length | {'val_interval': 7})
        assert config.train_cfg.val_interval == config.default_hooks.checkpoint.interval == 7
        assert config.default_hooks.checkpoint.by_epoch is ('epochs' in length)


def test_options_for_a_place_go_over_settings(tmp_path: Path) -> None:
    places = {'train_cfg.val_interval': 3, 'train_dataloader.num_workers': 9, 'param_scheduler.0.milestones': [5]}
    config = read_config(child(tmp_path, 'epochs = 24\nbatch_size = 4'), {'image_size': 640, **places})
    assert (config.train_cfg.val_interval, config.train_dataloader.num_workers) == (3, 9)
    assert config.param_scheduler[0].milestones == [5]
    assert config.train_cfg.max_epochs == 24
    for key, way in (('max_iters', 'max_iters=20'), ('max_epochs', 'epochs=20')):
        with pytest.raises(
            SettingError, match=f'train_cfg.{key}` contradicts the setting `epochs=24`. Give `{way}` instead.'
        ):
            read_config(child(tmp_path, 'epochs = 24'), {f'train_cfg.{key}': 20})


def test_batch_size_reaches_loader_workers_and_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('os.cpu_count', lambda: 6)
    for size, workers in ((1, 2), (4, 4), (16, 6)):
        config = read_config(dino_mm.cfg(R50), {'batch_size': size})
        assert (config.train_dataloader.batch_size, config.train_dataloader.num_workers) == (size, workers)
        assert config.auto_scale_lr == dict(enable=True, base_batch_size=16)
        assert (config.val_dataloader.batch_size, config.optim_wrapper.optimizer.lr) == (1, 1e-4)
    assert read_config(dino_mm.cfg('dino_digits'), {'batch_size': 4}).train_dataloader.num_workers == 0


@pytest.mark.parametrize('settings', [{'image_size': 640, 'batch_size': 3, 'epochs': 7}, {'max_iters': 333}, {}])
@pytest.mark.parametrize('name', ['dino_digits', 'dino_vitdet_large_4scale_50ep'])
def test_all_ways_agree_and_a_second_time_changes_nothing(name: str, settings: dict, tmp_path: Path) -> None:
    """A file that inherits, and options of a tool."""
    text = '\n'.join(f'{key} = {value}' for key, value in settings.items())
    read = Config.fromfile(child(tmp_path, text, name))
    given = argparse.Namespace(
        config=name, work_dir='x', cfg_options=settings or None, launcher='none', trust=False, local_rank=0
    )
    by_tool = load_config(given).to_dict()
    assert read.to_dict() == {key: value for key, value in by_tool.items() if key not in ('launcher', 'work_dir')}
    before = read.to_dict()
    apply_settings(read)
    assert read.to_dict() == before


def test_the_config_that_a_run_writes_down_is_read_as_it_is(tmp_path: Path) -> None:
    config = read_config(dino_mm.cfg(R50), {'image_size': 333, 'batch_size': 3, 'epochs': 7})
    config.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == config.to_dict()


def test_without_settings_recipes_stay_as_they_are() -> None:
    for entry in RECIPES.values():
        config = Config.fromfile(ROOT / entry.config)
        assert all(config[name] is None for name in SETTINGS)
        assert config.auto_scale_lr.enable is False
        assert config.to_dict() == Config.fromfile.__wrapped__(ROOT / entry.config).to_dict()


def test_options_replace_the_other_length_of_a_file(tmp_path: Path) -> None:
    path = child(tmp_path, 'epochs = 7')
    assert read_config(path, {'max_iters': 90000}).param_scheduler[0].milestones == [82500]  # rounded once
    path = child(tmp_path, 'max_iters = 100')
    assert read_config(path, {'epochs': 3}).train_cfg.max_epochs == 3


@pytest.mark.parametrize(
    ('text', 'said'),
    [
        ('image_size = (640, 640)', r'`image_size` is \(640, 640\). It is a whole number from 1 on, or None.'),
        ('epochs = 0', '`epochs` is 0.'),
        ('batch_size = True', '`batch_size` is True.'),
        ('val_interval = -1', '`val_interval` is -1.'),
        ('max_iters = 1e4', '`max_iters` is 10000.0.'),
        ('epochs = 3; max_iters = 4', '`epochs` is 3 and `max_iters` 4. Set one of them to None.'),
        ('batch_size = 2; auto_scale_lr = dict(_delete_=True)', '`batch_size` needs `auto_scale_lr.base_batch_size`'),
    ],
)
def test_what_is_wrong_is_one_line_with_the_file(text: str, said: str, tmp_path: Path) -> None:
    path = child(tmp_path, text)
    with pytest.raises(SettingError, match=said) as caught:
        Config.fromfile(path)
    assert str(caught.value).startswith(f'{path}: ')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('text', 'said'),
    [
        ('model = dict(a=[1', r'config.py, or a file of its `_base_`, is not valid Python: .* \(line 1\)\.$'),
        ("_base_ = 'none.py'", r'config.py: .*none\.py'),
        (
            "_base_ = 'dino_mm::r50_4scale_13ep'",
            "config.py: .*ships no config 'r50_4scale_13ep'. Near to it: dino_r50_",
        ),
        (
            "_base_ = 'dino_mm::dino_digits'\nmodel = dict(backbone=dict(init_cfg=dict(type='Pretrained')))",
            r'config.py: .*init_cfg.*is a dict in the child config but is of type .*`_delete_=True`',
        ),
    ],
)
@pytest.mark.parametrize('read', [read_config, dino_mm.get_config])
def test_what_is_no_config_is_one_line_with_the_file(
    text: str, said: str, read: Callable[[Path], Config], tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=said) as caught:
        read(write(tmp_path, text))
    assert '\n' not in str(caught.value)


def test_an_option_that_does_not_fit_is_one_line_with_the_file() -> None:
    with pytest.raises(SettingError, match=r'dino_digits\.py: .*init_cfg.*`_delete_=True`'):
        read_config(dino_mm.cfg('dino_digits'), {'model.backbone.init_cfg.type': 'Pretrained'})


#: Misspelt key -> the one that is meant.
MISSPELT = {
    'imagesize': 'image_size',
    'epoch': 'epochs',
    'max_iter': 'max_iters',
    'batchsize': 'batch_size',
    'load_form': 'load_from',
    'custom_hook': 'custom_hooks',
}


@pytest.mark.parametrize(('key', 'meant'), [*MISSPELT.items(), ('modell.num_queries', 'model')])
def test_a_misspelt_option_is_refused(key: str, meant: str) -> None:
    said = f'dino_digits.py has no key `{key.split(".")[0]}`.*Did you mean `{meant}`\\?$'
    with pytest.raises(SettingError, match=said):
        read_config(dino_mm.cfg('dino_digits'), {key: 3})


@pytest.mark.parametrize(('key', 'meant'), MISSPELT.items())
def test_a_misspelt_key_of_a_file_is_refused(key: str, meant: str, tmp_path: Path) -> None:
    path = child(tmp_path, f'{key} = 3')
    with pytest.raises(SettingError, match=f'^{path}: nothing reads `{key}`. Did you mean `{meant}`\\?$'):
        Config.fromfile(path)


def test_variables_of_a_file_may_have_any_name(tmp_path: Path) -> None:
    """Where a line reads them; what a run writes down keeps them without that line."""
    config = Config.fromfile(child(tmp_path, 'epoch = 3\nepochs = epoch\nnote = 1'))
    assert (config.epochs, config.train_cfg.max_epochs) == (3, 3)
    config.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').epoch == 3


def test_options_may_bring_keys_of_their_own() -> None:
    options = {'own_pipeline': [dict(type='PackDetInputs')], 'my_note': 1, 'resume': True}
    config = read_config(dino_mm.cfg('dino_digits'), options)
    assert {name: config[name] for name in options} == options


def test_other_projects_configs_are_none_of_ours(tmp_path: Path) -> None:
    """They have variables of these names, with meanings of their own."""
    text = 'image_size = (1024, 1024)\nbatch_size = 0\nepochs = max_iters_ = 3\n'
    (tmp_path / 'other.py').write_text(text)
    assert Config.fromfile(tmp_path / 'other.py').image_size == (1024, 1024)
    with pytest.raises(SettingError, match='`epochs` is a setting of configs that inherit dino_mm'):
        read_config(tmp_path / 'other.py', {'epochs': 3})
    given = argparse.Namespace(config=R50, work_dir='x', cfg_options={'epochs': -1}, launcher='none', trust=False)
    given.local_rank = 0
    with pytest.raises(SystemExit, match=r'^error: .*`epochs` is -1'):
        load_config(given)


def test_mmengine_alone_reads_settings(tmp_path: Path) -> None:
    """As at a start of Python, where only the stand-in is known."""
    path = child(tmp_path, 'image_size = 400\nepochs = 3')
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / 'dino_mm')!r})
import standin
standin.install()
from mmengine.config import Config
config = Config.fromfile({str(path)!r})
print(config.train_cfg.max_epochs, config.test_dataloader.dataset.pipeline[1].scale)
"""
    assert python('-c', code, PYTHONPATH=str(ROOT)).stdout.splitlines()[-1] == '3 (400, 667)'
