"""State dicts that are part of a model: torch's contract for `load_state_dict`, and what goes through mmengine."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import zoo
from foreign import as_detrex, as_official, detrex_name, randomize, share_branches
from mmengine.config import Config, ConfigDict
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

import dino_mm
from dino_mm.checkpoints import architecture
from dino_mm.checkpoints.classes import COCO_CATEGORY_IDS
from dino_mm.checkpoints.conversion import convert_detector
from dino_mm.checkpoints.errors import CheckpointError
from dino_mm.models import DINO
from dino_mm.registry import MODELS

State = dict[str, Tensor]
FULL = 'full'
LEVELS = 'level_embed'


def build(cfg: ConfigDict) -> DINO:
    cfg.backbone.init_cfg = None
    return MODELS.build(cfg)


@pytest.fixture
def state(tiny_cfg: ConfigDict) -> State:
    """Weights of a tiny detector, unlike those of any model built."""
    return share_branches(randomize(build(tiny_cfg).state_dict()))


def only(pattern: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if re.search(pattern, name)}


def without(pattern: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if not re.search(pattern, name)}


def wrapped(make: Callable[[State], State]) -> Callable[[State], State]:
    return lambda state: {f'module.{name}': tensor for name, tensor in make(state).items()}


@dataclass
class Case:
    """A state dict, and what becomes of it.

    Attributes:
        make: Our whole state dict -> this one.
        found: Pattern of our names that are in it, besides what such checkpoints need not have.
        unexpected: Its names without a place.
        shapes: Whether a tensor has another shape.
        strict: What the error of a strict load says; None: it loads.
        mmengine: What mmengine's load says: FULL, a warning that matches, or an error that does.
        warns: Whether that is a warning.
    """

    make: Callable[[State], State]
    found: str
    strict: str | None
    mmengine: str
    warns: bool = False
    unexpected: tuple[str, ...] = ()
    shapes: bool = False


PART = 'is part of a DINO detector of dino_mm'
CASES = {
    'whole': Case(dict, '', None, FULL),
    'empty': Case(lambda s: {}, '^$', 'no tensors where weights are looked for', 'no tensors where weights'),
    'one tensor': Case(
        only('^level_embed$'),
        '^level_embed$',
        f'{PART}, 3 levels of 16 channels. It does not fit the model: .* tensors not in the checkpoint: backbone',
        rf'{PART}.*\d\d\d tensors of the model are not in it and stay as they are: \S+, \S+, \S+, \S+ and \d+ more',
        warns=True,
    ),
    'no query selector': Case(
        without(r'^query_selector\.'),
        r'^(?!query_selector\.)',
        '5 tensors not in the checkpoint: query_selector',
        '5 tensors of the model are not in it and stay as they are: query_selector.*, .* and 1 more',
        warns=True,
    ),
    'no marks': Case(
        without(r'^(query_selector|decoder)\.'), r'^(?!(query_selector|decoder)\.)', PART, PART, warns=True
    ),
    'encoder, wrapped': Case(wrapped(only('^encoder')), '^encoder', PART, PART, warns=True),
    'backbone': Case(only(r'^backbone\.'), r'^backbone\.', PART, PART, warns=True),
    'heads, of detrex': Case(
        lambda s: only('class_embed|bbox_embed')(as_detrex(s)),
        '^bbox_head',
        'is part of a DINO detector of detrex, 5 classes',
        'is part of a DINO detector of detrex, 5 classes.*not in it and stay',
        warns=True,
    ),
    'encoder of detrex, wrapped': Case(
        wrapped(lambda s: only('encoder')(as_detrex(s))), '^encoder', 'part of .* detrex', 'part of .* detrex', True
    ),
    'a stage of detectron2': Case(
        lambda s: only(r'\.res3\.')(as_detrex(s)), r'^backbone\.layer2\.', PART, 'ResNet .detectron2 names', True
    ),
    'detrex without selection': Case(
        lambda s: without('enc_output')(as_detrex(s)),
        '^(?!query_selector.memory)',
        'is a DINO detector of detrex.* 4 tensors not in the checkpoint',
        'is a DINO detector of detrex.*4 tensors of the model are not in it',
        warns=True,
    ),
    'another shape': Case(
        lambda s: {**s, LEVELS: torch.zeros(16)},
        '',
        r'level_embed \(16,\) for \(3, 16\)',
        r'level_embed \(16,',
        shapes=True,
    ),
    'one, without shape': Case(
        lambda s: {LEVELS: torch.tensor(0.0)}, '^level', r'level_embed \(\) for', r'level_embed \(\) for', shapes=True
    ),
    'something else besides': Case(
        wrapped(lambda s: {**only('encoder')(s), 'extra.weight': torch.zeros(2)}),
        '^encoder',
        '1 tensors without a place in the model: extra.weight',
        '1 tensors without a place in the model: extra.weight',
        unexpected=('module.extra.weight',),
    ),
    'detrex and something else': Case(
        lambda s: {**without('enc_output')(as_detrex(s)), 'transformer.x.weight': torch.zeros(2)},
        '^(?!query_selector.memory)',
        'without a place in the model: transformer.x.weight',
        'without a place in the model: transformer.x.weight',
        unexpected=('transformer.x.weight',),
    ),
    'nothing of ours': Case(
        lambda s: {'rpn.weight': torch.zeros(1)},
        '^$',
        'not a DINO detector of detrex',
        'not a DINO detector of detrex',
        unexpected=('rpn.weight',),
    ),
    'no tensors': Case(
        lambda s: {'epoch': 3}, '^$', 'no tensors where weights', 'no tensors where weights', unexpected=('epoch',)
    ),
}
cases = pytest.mark.parametrize('case', CASES.values(), ids=CASES)


def assert_state(model: nn.Module, found: str, state: State, before: State, but: str = '') -> None:
    """What matches ``found`` has the values of ``state``, the rest those of ``before``."""
    for name, tensor in model.state_dict().items():
        if name.endswith('num_batches_tracked') or name == but:
            continue
        assert torch.equal(tensor, (state if re.search(found, name) else before)[name]), name


def copied(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@cases
def test_not_strict_is_torchs_contract(tiny_cfg: ConfigDict, state: State, case: Case) -> None:
    model = build(tiny_cfg)
    before = copied(model)
    given = case.make(state)
    names = list(given)
    if case.shapes:
        with pytest.raises(RuntimeError, match='size mismatch for level_embed'):
            model.load_state_dict(given, strict=False)
    else:
        result = model.load_state_dict(given, strict=False)
        missing = {n for n in before if not re.search(case.found, n) and not n.endswith('num_batches_tracked')}
        assert {name for name in result.missing_keys if not name.endswith('num_batches_tracked')} == missing
        assert result.unexpected_keys == list(case.unexpected)
    assert_state(model, case.found, state, before, but=LEVELS if case.shapes else '')
    assert list(given) == names


@cases
def test_strict_loads_all_or_nothing(tiny_cfg: ConfigDict, state: State, case: Case) -> None:
    model = build(tiny_cfg)
    before = copied(model)
    if case.strict is None:
        result = model.load_state_dict(case.make(state))
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        assert_state(model, '', state, before)
        return
    with pytest.raises(CheckpointError, match=case.strict):
        model.load_state_dict(case.make(state))
    assert_state(model, '^$', state, before)


@cases
def test_through_mmengine(
    tiny_cfg: ConfigDict, state: State, case: Case, tmp_path, capsys: pytest.CaptureFixture
) -> None:
    """Of what is missing there is one warning, or an error for who asks mmengine to be strict."""
    torch.save(case.make(state), tmp_path / 'x.pth')
    model = build(tiny_cfg)
    before = copied(model)
    if case.mmengine != FULL and not case.warns:
        with pytest.raises(CheckpointError, match=case.mmengine):
            load_checkpoint(model, str(tmp_path / 'x.pth'))
        assert_state(model, '^$', state, before)
        return
    load_checkpoint(model, str(tmp_path / 'x.pth'))
    said = capsys.readouterr().out
    assert_state(model, case.found, state, before)
    if case.mmengine == FULL:
        assert 'do not match' not in said
        return
    assert re.search(case.mmengine, said)
    assert said.count('do not match') == 1
    assert 'missing keys' not in said
    with pytest.raises(RuntimeError, match=case.mmengine):
        load_checkpoint(build(tiny_cfg), str(tmp_path / 'x.pth'), strict=True)


def test_ours_names_every_missing_tensor_as_torch_does(tiny_cfg: ConfigDict, state: State) -> None:
    """Counts of batches too, where the state dict says that it has them."""
    model = build(tiny_cfg)
    given = model.state_dict()
    dropped = [name for name in given if 'num_batches' in name or name.startswith('neck')]
    for name in dropped:
        del given[name]
    assert model.load_state_dict(given, strict=False).missing_keys == dropped


def test_assign_leaves_what_is_missing(tiny_cfg: ConfigDict, state: State) -> None:
    model = build(tiny_cfg)
    parameters = dict(model.named_parameters())
    model.load_state_dict(only('^encoder')(state), strict=False, assign=True)
    for name, parameter in model.named_parameters():
        assert (parameter is parameters[name]) != name.startswith('encoder'), name
        assert parameter.requires_grad == parameters[name].requires_grad


@pytest.mark.parametrize('strict', [True, False])
def test_within_another_model_torch_tells_what_is_missing(tiny_cfg: ConfigDict, state: State, strict: bool) -> None:
    outer = nn.ModuleDict(dict(teacher=build(tiny_cfg)))
    given = {f'teacher.{detrex_name(name)}': tensor for name, tensor in only('^encoder')(state).items()}
    if strict:
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: .*"teacher.level_embed"'):
            outer.load_state_dict(given)
    else:
        missing = outer.load_state_dict(given, strict=False).missing_keys
        assert 'teacher.level_embed' in missing
        assert not any(name.startswith('teacher.encoder') for name in missing)
    assert torch.equal(outer['teacher'].encoder.layers[0].norms[0].weight, state['encoder.layers.0.norms.0.weight'])


@pytest.mark.parametrize(
    ('checkpoint', 'config', 'complaint'),
    [
        ('dino_r50_4scale_12ep', 'dino_r101_4scale_12ep', 'It fits dino-resnet/dino_r50_4scale_12ep.py'),
        ('dino_r101_4scale_12ep', 'dino_r50_4scale_12ep', 'It fits dino-resnet/dino_r101_4scale_12ep.py'),
    ],
)
def test_a_whole_detector_of_another_config_stays_an_error(
    checkpoint: str, config: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ResNet-50's names are among ResNet-101's, so only tensors are missing there. Other families are not tried."""
    for folder in ('_base_', 'dino-resnet'):
        (tmp_path / folder).symlink_to(architecture.config_root() / folder)
    monkeypatch.setattr(architecture, 'config_root', lambda: tmp_path)
    with torch.device('meta'):
        models = [build(Config.fromfile(dino_mm.cfg(f'dino-resnet/{name}.py')).model) for name in (checkpoint, config)]
    given = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in models[0].state_dict().items()}
    torch.save(given, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=complaint):
        load_checkpoint(models[1], str(tmp_path / 'x.pth'))


@pytest.mark.parametrize(
    'part', ['transformer.enc_out', r'input_proj\.3\.1', r'input_proj\.[02]\.', 'decoder.layers.1']
)
def test_parts_of_the_authors_checkpoints_are_numbered_by_the_model(
    tiny_cfg: ConfigDict, state: State, part: str
) -> None:
    """Their encoder's heads follow the decoder's, and their extra maps those of the backbone."""
    tiny_cfg.num_feature_levels = tiny_cfg.neck.num_outs = 4
    tiny_cfg.positional_encoding.update(temperature=20, offset=0.0)
    model = build(tiny_cfg)
    state = share_branches(randomize(model.state_dict()))
    before = copied(model)
    whole = as_official(state, 3)
    given = only(part)(whole)
    assert given
    result = model.load_state_dict(given, strict=False)
    assert result.unexpected_keys == []
    loaded = before.keys() - set(result.missing_keys)
    assert len(loaded - {name for name in loaded if name.endswith('num_batches_tracked')}) == len(given)
    for name in loaded:
        assert torch.equal(model.state_dict()[name], state[name]), name
    assert convert_detector(whole, model).conversion.tensors.keys() >= loaded - {
        name for name in loaded if name.endswith('num_batches_tracked')
    }


def test_rows_by_category_of_a_part_become_classes(tiny_cfg: ConfigDict) -> None:
    tiny_cfg.positional_encoding.update(temperature=20, offset=0.0)
    tiny_cfg.bbox_head.num_classes = 80
    model = build(tiny_cfg)
    state = share_branches(randomize(model.state_dict()))
    given = only('enc_out_class_embed|enc_out_bbox')(as_official(state, 3, list(COCO_CATEGORY_IDS)))
    model.load_state_dict(given, strict=False)
    assert torch.equal(model.bbox_head.cls_branches[2].weight, state['bbox_head.cls_branches.2.weight'])


@pytest.mark.parametrize(
    'entry', {Path(e.config).parent: e for e in zoo.ENTRIES}.values(), ids=lambda entry: entry.name
)
def test_every_tensor_of_the_zoo_alone_finds_its_place(entry: zoo.Entry) -> None:
    """By detrex's name and by ours; a sample of each backbone's family."""
    model, names = zoo.build(entry.config), zoo.detrex_names(entry.config, entry.arch)
    own = model.state_dict()
    for ours in list(names)[:: len(names) // 5]:
        for name in (ours, names[ours]):
            converted = convert_detector({name: own[ours]}, model)
            assert list(converted.conversion.origin) == [ours], name
            assert converted.part
