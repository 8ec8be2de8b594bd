"""A tiny DINO loads other libraries' checkpoints of itself, and refuses in words what does not fit."""

import copy
import pickle
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from conftest import make_samples
from foreign import as_detrex, as_official, randomize, share_branches
from mmdet.apis import init_detector
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModule
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import load_state_dict as mmengine_load_state_dict
from parity import golden
from torch import Tensor, nn

from dino_mm.checkpoints.classes import COCO_CATEGORY_IDS, COCO_CLASSES
from dino_mm.checkpoints.contents import take_apart
from dino_mm.checkpoints.conversion import convert_backbone, convert_detector
from dino_mm.checkpoints.errors import CheckpointError
from dino_mm.models import DINO
from dino_mm.registry import MODELS

POSITION_OF_OFFICIAL = dict(temperature=20, offset=0.0)
NUM_MAPS = 3


def build(cfg: ConfigDict, **changes: object) -> DINO:
    cfg = copy.deepcopy(cfg)
    cfg.backbone.init_cfg = None
    cfg.merge_from_dict(changes) if hasattr(cfg, 'merge_from_dict') else cfg.update(changes)
    return MODELS.build(cfg)


@pytest.fixture
def state(tiny_cfg: ConfigDict) -> dict[str, Tensor]:
    """Weights of a tiny detector, no two alike but for shared branches."""
    return share_branches(randomize(build(tiny_cfg).state_dict()))


@pytest.fixture
def official_cfg(tiny_cfg: ConfigDict) -> ConfigDict:
    cfg = copy.deepcopy(tiny_cfg)
    cfg.positional_encoding.update(POSITION_OF_OFFICIAL)
    return cfg


def assert_loaded(model: nn.Module, state: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        if not name.endswith('num_batches_tracked'):
            assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: dict(model=s, iteration=89999), lambda s: dict(state_dict=s)])
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_detrex(tiny_cfg: ConfigDict, state: dict, tmp_path, wrap, prefix: str) -> None:
    checkpoint = {prefix + name: tensor for name, tensor in as_detrex(state).items()}
    path = tmp_path / 'model_final.pth'
    torch.save(wrap(checkpoint), path)
    model = build(tiny_cfg)
    load_checkpoint(model, str(path))  # mmengine's, as the runner, MMDetection's tools and inferencers call it
    assert_loaded(model, state)
    plain = build(tiny_cfg)
    plain.load_state_dict(checkpoint)
    assert_loaded(plain, state)


def test_official(official_cfg: ConfigDict, state: dict) -> None:
    model = build(official_cfg)
    model.load_state_dict(as_official(state, NUM_MAPS))
    assert_loaded(model, state)


def test_category_ids_of_official_become_the_80_classes(official_cfg: ConfigDict) -> None:
    official_cfg.bbox_head.num_classes = 80
    model = build(official_cfg)
    state = share_branches(randomize(model.state_dict()))
    checkpoint = as_official(state, NUM_MAPS, list(COCO_CATEGORY_IDS))
    assert checkpoint['class_embed.0.bias'].shape == (91,)
    assert checkpoint['label_enc.weight'].shape[0] == 92
    model.load_state_dict(checkpoint)
    assert_loaded(model, state)


class OfficialDecoderLayer(nn.Module):
    """The authors' decoder layer: its parts in their order and under their names; deformable attention is ours."""

    def __init__(self, cross_attn: nn.Module, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.cross_attn = cross_attn
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = nn.MultiheadAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, query: Tensor, query_pos: Tensor, *cross: object) -> Tensor:
        q = (query + query_pos).transpose(0, 1)
        query = self.norm2(query + self.self_attn(q, q, query.transpose(0, 1))[0].transpose(0, 1))
        query = self.norm1(self.cross_attn(query, query_pos, *cross))  # adds its residual itself
        return self.norm3(query + self.linear2(self.linear1(query).relu()))


def test_norms_of_the_officials_decoder_follow_what_they_normalise(official_cfg: ConfigDict) -> None:
    model = build(official_cfg).eval()
    ours = model.decoder.layers[0]
    theirs = OfficialDecoderLayer(copy.deepcopy(ours.cross_attn), 16, 2, 32)
    theirs.load_state_dict(randomize(theirs.state_dict(), seed=1))
    checkpoint = as_official(share_branches(model.state_dict()), NUM_MAPS)
    layer = {f'transformer.decoder.layers.0.{name}': tensor for name, tensor in theirs.state_dict().items()}
    assert layer.keys() <= checkpoint.keys()
    model.load_state_dict(checkpoint | layer)
    calls: list[tuple] = []
    ours.register_forward_hook(lambda module, args, output: calls.append((args, output)))
    with torch.no_grad():
        model(*make_samples([0]), mode='tensor')
        (query, query_pos, memory, reference, levels, padding_mask, mask), output = calls[0]
        assert mask is None
        expected = theirs(query, query_pos, memory, reference, levels, padding_mask)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize('name', ['dino_swin_tiny_224_4scale_12ep', 'dino_swin_large_384_5scale_36ep'])
def test_officials_swin(name: str) -> None:
    """The authors keep Swin right under `backbone.0`, in Microsoft's names, which detrex has too."""
    (entry,) = [entry for entry in zoo.ENTRIES if entry.name == name]
    model, names = zoo.build(entry.config), zoo.detrex_names(entry.config, entry.arch)
    shapes = golden(f'keys/{entry.arch}.json')['tensors']
    tensors = {ours: torch.empty(shapes[theirs], device='meta') for ours, theirs in names.items()}
    num_maps = len(model.backbone.out_indices)
    inner = {f'backbone.0.{names[k].removeprefix("backbone.")}': v for k, v in tensors.items() if 'backbone.' in k}
    outer = {k: v for k, v in tensors.items() if 'backbone.' not in k}
    converted = convert_detector(inner | as_official(outer, num_maps, aliases=False), model)
    assert converted.source.title == 'IDEA-Research/DINO'
    assert not converted.problems
    assert converted.conversion.tensors.keys() == tensors.keys()


def test_inferencers_take_it(tiny_cfg: ConfigDict, state: dict, tmp_path: Path) -> None:
    """MMDetection's `init_detector`, by a config and a file that detrex saved."""
    torch.save(dict(model=as_detrex(state), iteration=1), tmp_path / 'model_final.pth')
    cfg = Config(dict(model=tiny_cfg, test_dataloader=None, default_scope='mmdet'))
    model = init_detector(cfg, str(tmp_path / 'model_final.pth'), palette='random', device='cpu')
    assert_loaded(model, state)


def test_averaged_weights(tiny_cfg: ConfigDict, state: dict) -> None:
    average = randomize(state, seed=7)
    weights = as_detrex(state)
    # Detrex averages parameters under the first of their names, and all buffers.
    averaged = {k: v for k, v in as_detrex(average).items() if not k.startswith(('class_embed', 'bbox_embed'))}
    averaged['pixel_mean'] = torch.zeros(3, 1, 1)
    for key in ('ema_state', 'ema_model'):
        checkpoint = dict(model=weights, **{key: averaged})
        model = build(tiny_cfg)
        assert not take_apart(checkpoint).averaged
        contents = take_apart(checkpoint, ema=True)
        assert contents.averaged
        model.load_state_dict(contents.tensors)
        assert_loaded(model, average)
    mmengines = dict(state_dict=average, ema_state_dict={f'module.{k}': v for k, v in state.items()})
    assert take_apart(mmengines, ema=True).tensors.keys() == average.keys()
    with pytest.raises(
        CheckpointError, match=r'no averaged \(EMA\) weights in the checkpoint, it has model, iteration'
    ):
        take_apart(dict(model=weights, iteration=1), ema=True)


@pytest.mark.parametrize(('key', 'value'), [('iteration', 89999), ('epoch', 11)])
def test_progress(state: dict, key: str, value: int) -> None:
    contents = take_apart({'model': as_detrex(state), key: value})
    assert (contents.iteration, contents.epoch) == ((90000, None) if key == 'iteration' else (None, 12))


def test_every_tensor_is_accounted_for(tiny_cfg: ConfigDict, state: dict) -> None:
    checkpoint = as_detrex(state)
    result = convert_detector(checkpoint, build(tiny_cfg)).conversion
    assert set(result.origin.values()) | set(result.dropped) == set(checkpoint)
    assert not set(result.origin.values()) & set(result.dropped)
    assert result.dropped['transformer.decoder.class_embed.0.bias'] == 'the same tensor as class_embed.0.bias'
    assert set(result.filled.values()) == {'left as it is: frozen norms elsewhere do not count batches'}
    assert all(name.endswith('num_batches_tracked') for name in result.filled)


def test_shared_heads_that_differ_are_refused(tiny_cfg: ConfigDict, state: dict) -> None:
    checkpoint = as_detrex(state)
    checkpoint['transformer.decoder.bbox_embed.1.layers.0.bias'] = torch.zeros(16)
    with pytest.raises(CheckpointError, match=r'`bbox_embed.1.layers.0.bias` and `transformer.decoder.bbox_embed.1'):
        build(tiny_cfg).load_state_dict(checkpoint)


def test_missing_and_unexpected_tensors_are_refused(tiny_cfg: ConfigDict, state: dict) -> None:
    checkpoint = as_detrex(state)
    del checkpoint['transformer.enc_output.bias'], checkpoint['backbone.res3.0.conv1.weight']
    checkpoint['transformer.extra.weight'] = torch.zeros(1)
    model = build(tiny_cfg)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        model.load_state_dict(checkpoint)
    assert '2 tensors not in the checkpoint: backbone.layer2.0.conv1.weight' in str(error.value)
    assert 'query_selector.memory_trans_fc.bias' in str(error.value)
    assert '1 tensors without a place in the model: transformer.extra.weight' in str(error.value)
    assert_loaded(model, before)


@pytest.mark.parametrize(
    ('changes', 'complaint'),
    [
        (dict(num_feature_levels=4), r'level_embed \(3, 16\) for \(4, 16\)'),
        (dict(num_queries=13), r'query_embedding.weight \(12, 16\) for \(13, 16\)'),
        (dict(decoder=dict(num_layers=3)), r'12 queries, 5 classes. It does not fit the model: \d+ tensors not in'),
    ],
)
def test_other_architectures_are_described(tiny_cfg: ConfigDict, state: dict, changes: dict, complaint: str) -> None:
    if 'num_feature_levels' in changes:
        tiny_cfg.neck.num_outs = 4
    for key, value in changes.items():
        tiny_cfg[key].update(value) if isinstance(value, dict) else tiny_cfg.update({key: value})
    with pytest.raises(CheckpointError, match=complaint) as error:
        build(tiny_cfg).load_state_dict(as_detrex(state))
    assert 'is a DINO detector of detrex, ResNet (detectron2 names)' in str(error.value)
    assert '3 levels of 16 channels, 12 queries, 5 classes' in str(error.value)
    assert str(error.value).endswith('It fits no shipped config as it is.')


def test_another_number_of_classes_names_the_line(tiny_cfg: ConfigDict, state: dict) -> None:
    tiny_cfg.bbox_head.num_classes = 3
    line = r"default_hooks = dict\(loading=dict\(type='dino_mm.LoadCheckpointHook', class_transfer=True\)\)"
    with pytest.raises(CheckpointError, match=rf'5 classes. The model has 3 classes. .* {line}'):
        build(tiny_cfg).load_state_dict(as_detrex(state))


def test_position_of_official_is_demanded(tiny_cfg: ConfigDict, state: dict) -> None:
    with pytest.raises(
        CheckpointError, match=r'IDEA-Research/DINO.* temperature 20 and offset 0.0; the model has 10000'
    ):
        build(tiny_cfg).load_state_dict(as_official(state, NUM_MAPS))


def test_other_content_is_refused(tiny_cfg: ConfigDict, state: dict) -> None:
    model = build(tiny_cfg)
    backbone = {name.removeprefix('backbone.'): t for name, t in state.items() if name.startswith('backbone.')}
    with pytest.raises(
        CheckpointError, match=r'bare backbone, ResNet \(torchvision names\), .* `model.backbone.init_cfg'
    ):
        model.load_state_dict(backbone)
    with pytest.raises(CheckpointError, match=r'not a DINO detector of detrex, .* it begins with rpn.weight'):
        model.load_state_dict({'rpn.weight': torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r'no tensors where weights are looked for, only epoch, extra'):
        model.load_state_dict(dict(epoch=3, extra='x'))


def test_within_another_model(tiny_cfg: ConfigDict, state: dict) -> None:
    outer = nn.ModuleDict(dict(teacher=build(tiny_cfg), scale=nn.Linear(1, 1)))
    checkpoint = {f'teacher.{name}': tensor for name, tensor in as_detrex(state).items()}
    outer.load_state_dict({**checkpoint, 'scale.weight': torch.ones(1, 1), 'scale.bias': torch.ones(1)})
    assert_loaded(outer['teacher'], state)
    with pytest.raises(RuntimeError, match='Missing key'):
        outer.load_state_dict({'scale.weight': torch.ones(1, 1), 'scale.bias': torch.ones(1)})


def test_copies_convert_too(tiny_cfg: ConfigDict, state: dict) -> None:
    model = build(tiny_cfg)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copied = copy.deepcopy(model)
    copied.load_state_dict(as_detrex(state))
    assert_loaded(copied, state)
    assert_loaded(model, before)


def pretrained(cfg: ConfigDict, path: object) -> DINO:
    cfg = copy.deepcopy(cfg)
    cfg.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(path))
    model = MODELS.build(cfg)
    model.init_weights()
    return model


@pytest.mark.parametrize('kind', ['torchvision', 'detectron2', 'R-50.pkl', 'detrex detector', 'own detector'])
def test_pretrained_backbone(tiny_cfg: ConfigDict, state: dict, tmp_path, kind: str) -> None:
    prefix = 'backbone.'
    checkpoint = state
    if kind != 'own detector':
        checkpoint = as_detrex(state)
    if kind == 'torchvision':
        checkpoint = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        checkpoint['fc.weight'] = torch.zeros(10, 32)
    if kind in ('detectron2', 'R-50.pkl'):
        checkpoint = {name.removeprefix(prefix): t for name, t in checkpoint.items() if name.startswith(prefix)}
    path = tmp_path / (kind if kind.endswith('.pkl') else 'x.pth')
    if kind == 'R-50.pkl':
        arrays = {name: tensor.numpy() for name, tensor in checkpoint.items()} | {'stem.fc.bias': np.zeros(3)}
        path.write_bytes(pickle.dumps(dict(model=arrays, __author__='torchvision', matching_heuristics=True)))
    else:
        torch.save(dict(model=checkpoint), path)
    model = pretrained(tiny_cfg, path)
    assert_loaded(model.backbone, {name.removeprefix(prefix): tensor for name, tensor in state.items()})


def test_pretrained_backbone_must_fit(tiny_cfg: ConfigDict, state: dict, tmp_path) -> None:
    checkpoint = {name.removeprefix('backbone.'): t for name, t in state.items() if name.startswith('backbone.')}
    del checkpoint['layer4.0.conv1.weight']
    checkpoint['conv1.weight'] = torch.zeros(8, 3, 7, 7)
    torch.save(checkpoint, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError) as error:
        pretrained(tiny_cfg, tmp_path / 'x.pth')
    assert re.search(r'bare backbone, .* does not fit ResNet as it is configured', str(error.value))
    assert '1 tensors not in the checkpoint: layer4.0.conv1.weight' in str(error.value)
    assert 'conv1.weight (8, 3, 7, 7) for (4, 3, 7, 7)' in str(error.value)


def test_foreign_backbone_is_refused(tiny_cfg: ConfigDict, tmp_path) -> None:
    torch.save({'model.stem.weight': torch.zeros(1)}, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'1 tensors without a place in the model: model.stem.weight'):
        pretrained(tiny_cfg, tmp_path / 'x.pth')


def test_a_module_that_is_no_backbone_of_ours_converts_too(tiny_cfg: ConfigDict, state: dict) -> None:
    """MMDetection's ResNet gets the hook from the detector it is in."""
    model = build(tiny_cfg)
    assert isinstance(model.backbone, BaseModule)
    result = convert_backbone(as_detrex(state), model.backbone)
    assert not result.problems
    assert set(result.conversion.dropped.values()) >= {'of the detector around the backbone'}


def test_classes() -> None:
    assert len(COCO_CLASSES) == len(COCO_CATEGORY_IDS) == 80
    by_id = dict(zip(COCO_CATEGORY_IDS, COCO_CLASSES, strict=True))
    # From instances_val2017.json.
    assert {by_id[i] for i in (1, 13, 90)} == {'person', 'stop sign', 'toothbrush'}
    assert (by_id[44], by_id[46], by_id[67], by_id[70]) == ('bottle', 'wine glass', 'dining table', 'toilet')


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('source', ['ours', 'detrex'])
def test_weights_that_are_not_finite_are_refused_by_name(
    tiny_cfg: ConfigDict, state: dict, value: float, source: str
) -> None:
    """Whoever loads them: torch, mmengine."""
    model = build(tiny_cfg)
    name = 'bbox_head.reg_branches.1.4.weight'
    state[name].view(-1)[3] = value
    given = as_detrex(state) if source == 'detrex' else state
    bad = next(key for key, tensor in given.items() if not tensor.isfinite().all())
    before = copy.deepcopy(model.state_dict())
    for load in (model.load_state_dict, partial(mmengine_load_state_dict, model)):
        with pytest.raises(CheckpointError, match=rf"its tensor '{re.escape(bad)}' holds NaN or infinity"):
            load(dict(given))
        assert_loaded(model, before)
