"""Configs and models by name."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import ROOT
from foreign import as_detrex, as_official, randomize, share_branches
from mmdet.apis import inference_detector
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config, ConfigDict
from torch import Tensor

import dino_mm
from dino_mm import CheckpointError, UnknownConfigError, shipped, zoo
from dino_mm.checkpoints.classes import COCO_CATEGORY_IDS, COCO_CLASSES
from dino_mm.registry import MODELS

R50 = 'dino-resnet/dino_r50_4scale_12ep.py'
NEW_BIAS = -4.59511985  # of a probability of 0.01


@pytest.mark.parametrize(
    'name', ['dino_r50_4scale_12ep', 'dino_r50_4scale_12ep.py', R50, R50.removesuffix('.py'), f'./{R50}']
)
def test_names_with_and_without_folder_and_ending(name: str) -> None:
    assert dino_mm.cfg(name) == str(ROOT / 'configs' / R50)


def test_deeper_folders_and_parts_of_configs() -> None:
    overlay = 'dino-resnet/by_epoch/dino_r50_4scale_12ep_by_epoch.py'
    for name in (overlay, 'by_epoch/dino_r50_4scale_12ep_by_epoch', 'dino_r50_4scale_12ep_by_epoch'):
        assert dino_mm.cfg(name) == str(ROOT / 'configs' / overlay)
    assert dino_mm.cfg('_base_/models/dino_r50') == str(ROOT / 'configs/_base_/models/dino_r50.py')
    with pytest.raises(UnknownConfigError):  # a part, which has no short name
        dino_mm.cfg('dino_r50')


@pytest.mark.parametrize(
    ('name', 'close'),
    [
        ('dino_r50_4scale_12e', R50),
        ('dino-resnet/dino_r50_4scale_12e.py', R50),
        ('dino-swin/dino_r50_4scale_12ep', R50),
        ('swin_tiny_224_4scale_12ep', 'dino-swin/dino_swin_tiny_224_4scale_12ep.py'),
        ('eva', 'dino-eva-01/dino_eva_01_4scale_12ep.py'),
        ('', R50),
        ('zzz', R50),
    ],
)
def test_unknown_names_tell_the_closest(name: str, close: str) -> None:
    with pytest.raises(UnknownConfigError) as raised:
        dino_mm.cfg(name)
    message = str(raised.value)
    assert Path(close).stem in message
    assert '\n' not in message
    assert message.count(', ') <= 2 or name in ('', 'zzz')


def test_a_path_that_is_not_there_is_named_as_a_file() -> None:
    said = r"^There is no file 'my_project/confg\.py'\. dino_mm ships no config 'my_project/confg\.py'\. It has: "
    with pytest.raises(UnknownConfigError, match=said):
        dino_mm.cfg('my_project/confg.py')


def test_ambiguous_names_tell_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, 'config_root', lambda: tmp_path)
    for folder in ('first', 'second'):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'same.py').touch()
    with pytest.raises(UnknownConfigError, match=r'several .*: first/same\.py, second/same\.py'):
        dino_mm.cfg('same')
    assert dino_mm.cfg('second/same') == str(tmp_path / 'second/same.py')


def test_list_of_models() -> None:
    metafiles = [yaml.safe_load(path.read_text()) for path in ROOT.glob('configs/*/metafile.yml')]
    stated = {model['Name']: model for metafile in metafiles for model in metafile['Models']}
    names = dino_mm.list_models()
    assert len(names) == len(stated) == 40
    assert set(names) == set(stated)
    swin = {name for name in stated if name.startswith('dino_swin')}
    assert len(swin) == 9
    assert set(dino_mm.list_models('swin*')) == set(dino_mm.list_models('DINO_Swin*')) == swin
    assert dino_mm.list_models('r50_4scale_24ep') == ['dino_r50_4scale_24ep']
    assert dino_mm.list_models('r50') == []
    for name, model in zoo.zoo_models().items():
        assert Path(dino_mm.cfg(name)) == ROOT / stated[name]['Config']
        assert model.weights == stated[name].get('Weights')
        assert model.box_ap == (stated[name]['Results'][0]['Metrics']['box AP'] if model.box_ap else None)
    assert sum(model.box_ap is not None for model in zoo.zoo_models().values()) == 33


def test_config_by_name_or_path(tmp_path: Path) -> None:
    by_name = dino_mm.get_config('dino_r50_4scale_12ep')
    assert by_name.to_dict() == Config.fromfile(ROOT / 'configs' / R50).to_dict()
    own = tmp_path / 'own.py'
    own.write_text('a = 1')
    assert dino_mm.get_config(own).a == 1


@pytest.fixture
def config_file(tiny_cfg: ConfigDict, tmp_path: Path) -> Path:
    """A config of a tiny detector of 10 classes, the digits."""
    config = dino_mm.get_config('dino_digits')
    config.model = tiny_cfg
    config.model.bbox_head.num_classes = 10
    config.dump(tmp_path / 'tiny.py')
    return tmp_path / 'tiny.py'


def weights(tiny_cfg: ConfigDict, number: int) -> dict[str, Tensor]:
    """Of a tiny detector of ``number`` classes, no two alike but for shared branches."""
    cfg = copy.deepcopy(tiny_cfg)
    cfg.bbox_head.num_classes = number
    return share_branches(randomize(MODELS.build(cfg).state_dict()))


def save(folder: Path, state: dict[str, Tensor], classes: tuple[str, ...] | None = None) -> Path:
    meta = {} if classes is None else dict(meta=dict(dataset_meta=dict(classes=classes)))
    torch.save(dict(state_dict=state, **meta), folder / 'weights.pth')
    return folder / 'weights.pth'


def assert_equal(model: torch.nn.Module, state: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        if not name.endswith('num_batches_tracked'):
            assert torch.equal(tensor, state[name]), name


def test_model_without_weights(config_file: Path) -> None:
    model = dino_mm.get_model(config_file, device='cpu')
    assert isinstance(model, dino_mm.DINO)
    assert not model.training
    assert model.bbox_head.num_classes == 10
    assert model.dataset_meta['classes'] == tuple('0123456789')
    assert model.cfg.model.bbox_head.num_classes == 10
    model = dino_mm.get_model(config_file, num_classes=3, device='cpu')
    assert model.bbox_head.num_classes == model.denoising.label_embedding.num_embeddings == 3
    assert model.dataset_meta['classes'] == ('class 0', 'class 1', 'class 2')
    model = dino_mm.get_model(config_file, num_classes=80, device='meta')
    assert model.dataset_meta['classes'] == tuple(f'class {i}' for i in range(80))  # this config is not COCO's
    with pytest.raises(ValueError, match='`num_classes` is 3, but `classes` names 2'):
        dino_mm.get_model(config_file, num_classes=3, classes=('a', 'b'))


def test_model_of_the_zoo_has_coco_s_names_and_colours() -> None:
    model = dino_mm.get_model('dino_r50_4scale_12ep', device='meta')
    assert model.dataset_meta['classes'] == COCO_CLASSES
    assert len(model.dataset_meta['palette']) == 80


def test_model_takes_the_checkpoint_s_classes(config_file: Path, tiny_cfg: ConfigDict, tmp_path: Path) -> None:
    state = weights(tiny_cfg, 3)
    model = dino_mm.get_model(config_file, save(tmp_path, state, ('a', 'b', 'c')), device='cpu')
    assert model.dataset_meta['classes'] == ('a', 'b', 'c')
    assert_equal(model, state)
    with pytest.raises(CheckpointError, match=r"has 3 classes, `num_classes` is 10\. .* `classes=\('"):
        dino_mm.get_model(config_file, tmp_path / 'weights.pth', num_classes=10)
    state = weights(tiny_cfg, 10)
    model = dino_mm.get_model(config_file, save(tmp_path, as_detrex(state)), device='cpu')
    assert model.dataset_meta['classes'] == tuple('0123456789')
    assert_equal(model, state)


def test_classes_are_taken_over_by_name(config_file: Path, tiny_cfg: ConfigDict, tmp_path: Path) -> None:
    state = weights(tiny_cfg, 3)
    path = save(tmp_path, state, ('a', 'b', 'c'))
    model = dino_mm.get_model(config_file, path, classes=('c', 'new', 'A', 'other'), device='cpu')
    assert model.dataset_meta == dict(classes=('c', 'new', 'A', 'other'), palette='random')
    found = model.state_dict()
    branch = 'bbox_head.cls_branches.'
    for name in (f'{branch}0.bias', f'{branch}1.weight', 'denoising.label_embedding.weight'):
        assert torch.equal(found[name][[0, 2]], state[name][[2, 0]]), name
    assert found[f'{branch}0.bias'][[1, 3]].tolist() == pytest.approx([NEW_BIAS] * 2)
    assert torch.equal(found['level_embed'], state['level_embed'])


def test_names_of_nobody_s_checkpoint_are_asked_for(config_file: Path, tiny_cfg: ConfigDict, tmp_path: Path) -> None:
    path = save(tmp_path, weights(tiny_cfg, 3))
    assert dino_mm.get_model(config_file, path, device='cpu').dataset_meta['classes'][2] == 'class 2'
    with pytest.raises(CheckpointError, match='has 3 classes and does not tell their names'):
        dino_mm.get_model(config_file, path, classes=('a', 'b'))


def test_rows_by_category_id_are_found_by_name(config_file: Path, tiny_cfg: ConfigDict, tmp_path: Path) -> None:
    """The authors' checkpoints have 91 rows, of which 80 are classes."""
    config = dino_mm.get_config(config_file)
    config.model.positional_encoding.update(temperature=20, offset=0.0)
    config.model.bbox_head.num_classes = 80
    config.dump(config_file)
    state = weights(tiny_cfg, 80)
    path = save(tmp_path, as_official(state, num_maps=3, category_ids=list(COCO_CATEGORY_IDS)))
    name = 'bbox_head.cls_branches.0.weight'
    for classes in (('zebra', 'person'), (*COCO_CLASSES[::-1],)):
        model = dino_mm.get_model(config_file, path, classes=classes, device='cpu')
        rows = [COCO_CLASSES.index(one) for one in classes]
        assert torch.equal(model.state_dict()[name], state[name][rows])
    assert dino_mm.get_model(config_file, path, device='cpu').dataset_meta['classes'] == COCO_CLASSES


def test_weights_of_the_zoo(
    config_file: Path, tiny_cfg: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=r'no weights of dino_r50_4scale_12ep_amp; .*, dino_r50_4scale_12ep, '):
        dino_mm.get_model('dino_r50_4scale_12ep_amp', 'zoo')
    with pytest.raises(CheckpointError, match='no weights of tiny'):
        dino_mm.get_model(config_file, 'zoo')
    state = weights(tiny_cfg, 10)
    address = save(tmp_path, as_detrex(state)).as_uri().replace('file://', 'https://')
    fetched: list[str] = []
    monkeypatch.setattr('dino_mm.checkpoints.files.fetch', lambda a: fetched.append(a) or tmp_path / 'weights.pth')
    monkeypatch.setattr(zoo, 'zoo_models', lambda: {'tiny': zoo.ZooModel('tiny', None, address)})
    assert_equal(dino_mm.get_model(config_file, 'zoo', device='cpu'), state)
    assert fetched == [address]


def test_files_are_opened_safely(config_file: Path, tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / 'ran').touch, ())

    torch.save(dict(state_dict={}, more=Runs()), tmp_path / 'code.pth')
    with pytest.raises(CheckpointError, match='refused'):
        dino_mm.get_model(config_file, tmp_path / 'code.pth')
    assert not (tmp_path / 'ran').exists()


def test_mmdet_s_inference_and_visualiser_take_the_model(config_file: Path, tmp_path: Path) -> None:
    model = dino_mm.get_model(config_file, device='cpu')
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    sample = inference_detector(model, image)
    found = sample.pred_instances
    assert found.bboxes.shape == (10, 4)  # `max_per_img`
    assert found.labels.max() < 10
    assert (found.bboxes <= torch.tensor([128, 96, 128, 96])).all()
    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = model.dataset_meta
    visualizer.add_datasample('x', image, sample, draw_gt=False, pred_score_thr=0, out_file=str(tmp_path / 'x.png'))
    assert (tmp_path / 'x.png').stat().st_size > 0
