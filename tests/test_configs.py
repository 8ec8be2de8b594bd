"""The zoo: every config is a model of detrex's, and metafiles, tables and detrex's own list agree about it."""

import ast
import importlib.util
import math
import re
from pathlib import Path

import pytest
import yaml
from commands import ROOT
from mmengine.config import Config
from parity import golden
from torch import nn
from zoo import ENTRIES, EXTRAS, ROWS, Entry, build, detrex_names, load

each_config = pytest.mark.parametrize('entry', ENTRIES, ids=[entry.name for entry in ENTRIES])
METAFILES = sorted(ROOT.glob('configs/*/metafile.yml'))
each_metafile = pytest.mark.parametrize('metafile', METAFILES, ids=[path.parent.name for path in METAFILES])
MODELS = {m['Config']: m for path in METAFILES for m in yaml.safe_load(path.read_text())['Models']}

_spec = importlib.util.spec_from_file_location('zoo_table', ROOT / 'tools/zoo_table.py')
assert _spec is not None
assert _spec.loader is not None
zoo_table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(zoo_table)


@each_config
def test_parameters_are_detrex_s(entry: Entry) -> None:
    model, keys = build(entry.config), golden(f'keys/{entry.arch}.json')
    # The affine parameters of frozen norms are buffers in detectron2.
    origin = detrex_names(entry.config, entry.arch)
    counted = [p for name, p in model.named_parameters() if origin[name] not in keys['buffers']]
    assert sum(p.numel() for p in counted) == keys['num_parameters']
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stem_trains = entry.name.endswith(('_no_frozen', '_better_hyper'))
    assert trained == keys['num_trainable_parameters'] + stem_trains * 64 * 3 * 7 * 7


@each_config
def test_every_tensor_is_one_of_detrex_s(entry: Entry) -> None:
    keys = golden(f'keys/{entry.arch}.json')
    own = build(entry.config).state_dict()
    origin = detrex_names(entry.config, entry.arch)
    theirs = set(keys['tensors']) - set(keys['aliases']) - set(keys['non_float32'])
    assert set(origin.values()) - set(keys['non_float32']) == theirs
    # Elements, not shapes: timm's FocalNet has convolutions of 1 x 1 for linear layers.
    assert {name: own[name].numel() for name in origin} == {
        name: math.prod(keys['tensors'][theirs]) for name, theirs in origin.items()
    }


def test_building_leaves_configs_as_they_are() -> None:
    for entry in ENTRIES:
        build(entry.config)
        assert load(entry.config).model == Config.fromfile(ROOT / entry.config).model


@each_config
def test_leaves_are_short_and_name_their_parts(entry: Entry) -> None:
    text = (ROOT / entry.config).read_text()
    assert 4 <= len(text.splitlines()) <= 15
    base, *changes = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    parts = [Path(part).parts[-2] for part in ast.literal_eval(base.value)[:3]]
    assert parts == ['models', 'datasets', 'schedules']
    assert ast.literal_eval(base.value)[3] == '../_base_/default_runtime.py'
    assert {node.targets[0].id for node in changes} <= {'model', 'train_dataloader', 'optim_wrapper', 'custom_hooks'}


@each_config
def test_another_backbone_takes_nothing_from_resnet(entry: Entry) -> None:
    backbone = load(entry.config).model.backbone
    of_resnet = {'depth', 'num_stages', 'norm_cfg', 'norm_eval', 'style', 'frozen_stages'}
    assert (backbone.type == 'ResNet') is (entry.config.split('/')[1] == 'dino-resnet')
    assert set(backbone) & of_resnet == (of_resnet if backbone.type == 'ResNet' else set())


@each_config
def test_pretrained_weights_are_those_of_the_table(entry: Entry) -> None:
    backbone = load(entry.config).model.backbone
    found = [part.init_cfg.checkpoint for part in (backbone, backbone.get('backbone', {})) if part.get('init_cfg')]
    assert len(found) == 1
    name = found[0].rpartition('/')[2]
    pretrain = MODELS[entry.config]['Metadata']['Pretraining']
    stem = name.removesuffix('.pth')
    if pretrain == 'IN22k to IN1k':
        assert '_22kto1k' in stem
    elif pretrain == 'IN22k':  # FocalNet's name does not say; ConvNeXt and InternImage were fine-tuned after
        assert '22k' in stem or stem.startswith('focalnet_large_lrf_384')
    else:
        assert '22k' not in stem
    for size in ('tiny', 'small', 'base', 'large'):
        initial = f'internimage_{size[0]}_' if stem.startswith('internimage') else size
        assert (f'_{size}_' in entry.name) == (initial in stem)
    if 'swin' in entry.name or 'convnext' in entry.name:
        assert ('384' in entry.name) == ('384' in stem)


def test_configs_and_metafiles_are_detrex_s_list_and_the_extras() -> None:
    configs = {entry.config for entry in ENTRIES}
    assert len(ROWS) == 33
    assert set(ROWS) <= configs == set(MODELS)
    assert {entry.name for entry in EXTRAS} == {
        'dino_eva_01_4scale_12ep',
        'dino_focal_base_lrf_fl3_4scale_12ep',
        'dino_focal_small_lrf_fl3_4scale_12ep',
        'dino_focal_tiny_lrf_fl3_4scale_12ep',
        'dino_focalnet_large_lrf_384_fl4_5scale_36ep',
        'dino_r50_4scale_12ep_better_hyper',
        'dino_r50_4scale_12ep_no_frozen',
    }


@each_config
def test_metafile_states_detrex_s_figures(entry: Entry) -> None:
    stated, row = MODELS[entry.config], ROWS.get(entry.config)
    assert stated['Name'] == entry.name
    assert stated['In Collection'] == 'DINO'
    facts = stated['Metadata']
    cfg = load(entry.config)
    assert facts['Denoising Queries'] == cfg.model.denoising.num_dn_queries
    assert facts['Epochs'] == cfg.train_cfg.max_iters / 7500
    assert entry.name.rpartition('ep')[0].endswith(f'_{facts["Epochs"]}')
    if row is None:
        assert 'Results' not in stated
        assert 'Weights' not in stated
        return
    assert (facts['Backbone'], facts['Pretraining']) == (row['backbone'], row['pretrain'])
    assert (facts['Epochs'], facts['Denoising Queries']) == (row['epochs'], row['dn_queries'])
    assert stated['Results'] == [
        dict(Task='Object Detection', Dataset='COCO', Metrics={'box AP': row['box_ap_reported']})
    ]
    assert stated.get('Weights') == row['detrex_checkpoint']


@each_metafile
def test_tables_state_what_the_metafiles_state(metafile: Path) -> None:
    entries = yaml.safe_load(metafile.read_text())['Models']
    table = zoo_table.parse_table((metafile.parent / 'README.md').read_text())
    stated = [{k: v for k, v in row.items() if k not in ('parameters (M)', 'GFLOPs')} for row in table]
    assert stated == [zoo_table.row(entry) for entry in entries]
    parameters = [f'{zoo_table.count_parameters(build(entry["Config"])) / 1e6:.1f}' for entry in entries]
    assert [row['parameters (M)'] for row in table] == parameters
    assert all((metafile.parent / Path(entry['Config']).name).is_file() for entry in entries)


def test_overview_has_the_33_rows_of_detrex() -> None:
    text = zoo_table.OVERVIEW.read_text()
    published = [m for folder in zoo_table.FOLDERS for m in zoo_table.entries_of(folder) if 'Results' in m]
    assert zoo_table.parse_table(text) == [zoo_table.overview_row(entry) for entry in published]
    assert {entry['Config'] for entry in published} == set(ROWS)
    assert {f'{folder.name}/metafile.yml' for folder in zoo_table.FOLDERS} == {
        f'{path.parent.name}/{path.name}' for path in METAFILES
    }
    for target in re.findall(r'\]\((\.\./[^)]+)\)', text):
        assert (zoo_table.OVERVIEW.parent / target).exists(), target


def test_flops_of_a_table_are_those_measured() -> None:
    (entry,) = [m for m in MODELS.values() if m['Name'] == 'dino_r50_4scale_12ep']
    table = zoo_table.parse_table((ROOT / 'configs/dino-resnet/README.md').read_text())
    (row,) = [row for row in table if row['config'] == zoo_table.row(entry)['config']]
    assert zoo_table.measured(entry) == {k: row[k] for k in ('parameters (M)', 'GFLOPs')}


def test_a_multiply_add_counts_as_two_flops() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 1, device='meta')

        def forward(self, inputs: object, samples: object, mode: str) -> object:
            return self.conv(inputs)

    assert zoo_table.count_flops(Model()) == 2 * 3 * 5 * 800 * 1280
    assert zoo_table.count_parameters(Model()) == 3 * 5 + 5


def test_a_table_is_written_and_read_back(tmp_path: Path) -> None:
    (tmp_path / 'metafile.yml').write_text((ROOT / 'configs/dino-eva-01/metafile.yml').read_text())
    readme = tmp_path / 'README.md'
    readme.write_text(f'before\n{zoo_table.START}\nold\n{zoo_table.END}\nafter\n')
    zoo_table.write_table(tmp_path)
    (row,) = zoo_table.parse_table(readme.read_text())
    assert row['parameters (M)'] == '1037.2'
    assert readme.read_text().startswith('before\n')
    assert readme.read_text().endswith('\nafter\n')
    readme.write_text('no place\n')
    with pytest.raises(ValueError, match='has no place for the table'):
        zoo_table.write_table(tmp_path)


def test_the_recipe_by_epochs_is_the_one_by_iterations() -> None:
    """At 7500 iterations an epoch; nothing else differs."""
    epochs, iterations = (
        Config.fromfile(ROOT / 'configs/dino-resnet' / n)
        for n in ('by_epoch/dino_r50_4scale_12ep_by_epoch.py', 'dino_r50_4scale_12ep.py')
    )
    assert epochs.train_cfg == dict(type='dino_mm.EpochBasedTrainLoop', max_epochs=12, val_interval=1)
    assert iterations.train_cfg == dict(type='dino_mm.IterBasedTrainLoop', max_iters=12 * 7500, val_interval=5000)
    (rate,) = iterations.param_scheduler
    assert rate.milestones == [11 * 7500]
    rate.update(end=12, milestones=[11], by_epoch=True)
    changes = {'log_processor.by_epoch': True, 'train_dataloader.sampler.type': 'DefaultSampler', 'max_epochs': 12}
    hooks = {'logger.log_metric_by_epoch': True, 'checkpoint.by_epoch': True, 'checkpoint.interval': 1}
    iterations.merge_from_dict(changes | {f'default_hooks.{key}': value for key, value in hooks.items()})
    iterations.train_cfg = epochs.train_cfg
    assert epochs.to_dict() == iterations.to_dict()
