"""Projects: every format gives the same boxes, and what does not fit is one line."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ROOT
from mmengine.config import Config
from own_data import (
    CLASSES,
    LAYOUTS,
    R50,
    Item,
    assert_same,
    coco_content,
    make_items,
    project,
    read,
    truth,
    write_coco,
    write_labels,
    write_voc,
    write_yolo,
)
from PIL import Image

import dino_mm
from dino_mm.projects import make_project
from dino_mm.projects.conversion import read_boxes
from dino_mm.projects.errors import ProjectError
from dino_mm.projects.parts import divide

pytest.importorskip('supervision')  # reads YOLO and Pascal VOC

BCCD = ROOT.parent / 'shared' / 'data' / 'bccd'


@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_layout_gives_the_same_boxes_and_labels(layout: str, tmp_path: Path) -> None:
    splits = {'train': make_items(9), 'val': make_items(4, 20), 'test': make_items(4, 40)}
    LAYOUTS[layout](tmp_path / 'data', splits)
    config = project(tmp_path, tmp_path / 'data')
    for split, items in splits.items():
        expected = truth(items)
        if split == 'train':  # the recipe trains on pictures with objects alone
            assert config.train_dataloader.dataset.filter_cfg == dict(filter_empty_gt=True)
        assert_same(read(config, split), expected, tolerance=0.5 if 'voc' in layout else 0.01)
    assert set(config.train_dataloader.dataset.metainfo.classes) == set(CLASSES)
    assert (config.classes == CLASSES) is ('voc' not in layout)
    for name in ('val', 'test'):
        assert Path(config[f'{name}_evaluator'].ann_file).is_file()
    assert config.model.bbox_head.num_classes == 3


@pytest.mark.skipif(not BCCD.is_dir(), reason='real data are not in every checkout')
@pytest.mark.parametrize('write', [write_yolo, write_voc])
def test_real_data_survive_conversion(write: Callable, tmp_path: Path) -> None:
    splits: dict[str, list[Item]] = {}
    for split in ('train', 'val'):
        content = json.loads((BCCD / 'annotations' / f'{split}.json').read_text())
        names = {row['id']: row['name'] for row in content['categories']}
        for image in content['images'][:12]:
            boxes = [a for a in content['annotations'] if a['image_id'] == image['id']]
            objects = [(CLASSES[sorted(names.values()).index(names[a['category_id']])], *a['bbox']) for a in boxes]
            size = (image['width'], image['height'])
            splits.setdefault(split, []).append(Item(image['file_name'], size, objects))
    write(tmp_path / 'data', splits)
    for picture in (tmp_path / 'data').rglob('*.jpg'):
        shutil.copy(BCCD / 'images' / picture.name, picture)
    config = project(tmp_path, tmp_path / 'data')
    for split, items in splits.items():
        assert sum(len(item.objects) for item in items) > 100
        assert_same(read(config, split), truth(items))


@pytest.mark.parametrize('layout', LAYOUTS)
def test_without_a_validation_set_a_fifth_becomes_one(layout: str, tmp_path: Path) -> None:
    items = make_items(20)
    LAYOUTS[layout](tmp_path / 'data', {'train': items})
    config = project(tmp_path, tmp_path / 'data')
    train, val, test = (read(config, split) for split in ('train', 'val', 'test'))
    assert len(val) == 4  # 3 of 15 with objects, 1 of 5 without
    assert sum(not objects for objects in val.values()) == 1
    assert not train.keys() & val.keys()
    assert_same(train | val, truth(items))
    assert test == val


def test_the_seed_alone_decides_the_division() -> None:
    content = coco_content(make_items(20))
    images, annotations = content['images'], content['annotations']

    def validation(seed: int, order: int = 1) -> set[str]:
        _, val = divide(images[::order], annotations[::order], seed, Path('x.json'))
        return {image['file_name'] for image in val['images']}

    assert validation(0) == validation(0, order=-1)
    assert len({frozenset(validation(seed)) for seed in range(5)}) == 5


def test_versions_of_one_picture_stay_together(tmp_path: Path) -> None:
    items = make_items(30)
    for i, item in enumerate(items):
        item.name = f'{i // 3}_jpg.rf.{i:032x}.jpg'
        item.objects = item.objects or [('crate', 1, 1, 5, 5)]
    LAYOUTS['roboflow coco'](tmp_path / 'data', {'train': items})
    config = project(tmp_path, tmp_path / 'data')
    train, val = ({name.split('_')[0] for name in read(config, split)} for split in ('train', 'val'))
    assert (len(train), len(val), train & val) == (8, 2, set())


def test_converted_annotations_meet_every_rule(tmp_path: Path) -> None:
    """Ids from 1 on, areas, no crowds, sizes as decoded, no mask: nothing for the check to note but missing masks."""
    items = make_items(6)
    write_yolo(tmp_path / 'data', {'train': items, 'val': items})
    # Turned by EXIF: 80 x 60 in the file, 60 x 80 as every decoder shows it; its label is of what is shown.
    exif = Image.Exif()
    exif[274] = 6
    Image.new('RGB', (80, 60)).save(tmp_path / 'data/images/train/turned.jpg', exif=exif)
    (tmp_path / 'data/labels/train/turned.txt').write_text('1 0.5 0.5 1 0.5\n')
    made = make_project(tmp_path / 'project', tmp_path / 'data', R50)
    content = json.loads((tmp_path / 'project/annotations/train.json').read_text())
    for name in ('images', 'annotations', 'categories'):
        assert [row['id'] for row in content[name]] == list(range(1, len(content[name]) + 1))
    assert all(
        a['iscrowd'] == 0 and a['area'] == pytest.approx(a['bbox'][2] * a['bbox'][3]) for a in content['annotations']
    )
    turned = next(image for image in content['images'] if image['file_name'].endswith('turned.jpg'))
    assert (turned['width'], turned['height'], turned['file_name']) == (60, 80, 'images/train/turned.jpg')
    assert [a['bbox'] for a in content['annotations'] if a['image_id'] == turned['id']] == [[0, 20, 60, 40]]
    noted = re.findall(r'^noted  \d+ (.*?):', made.report, re.MULTILINE)
    assert noted == ['annotations without a `segmentation`'] * 2


def test_polygons_are_objects_and_never_crowds(tmp_path: Path) -> None:
    """A star that crosses itself has a hole, which supervision would write as a crowd."""
    items = make_items(2)
    write_yolo(tmp_path / 'data', {'train': items, 'val': items})
    picture, label = tmp_path / 'data/images/train/poly.png', tmp_path / 'data/labels/train/poly.txt'
    Image.new('RGB', (100, 200)).save(picture)
    label.write_text('2 0.5 0.1 0.7 0.9 0.1 0.4 0.9 0.4 0.3 0.9\n0 0.5 0.5 0.2 0.1\n')
    config = project(tmp_path, tmp_path / 'data')
    assert_same(
        {'x': read(config, 'train')['poly.png']}, {'x': [('crate', [40, 90, 60, 110]), ('person', [10, 20, 90, 180])]}
    )
    content = json.loads((tmp_path / 'project/annotations/train.json').read_text())
    assert {a['iscrowd'] for a in content['annotations']} == {0}


def test_equal_names_in_several_folders_are_several_pictures(tmp_path: Path) -> None:
    first, second = make_items(4), make_items(4, 20)
    for one, other in zip(first, second, strict=True):
        other.name = one.name
    for folder, items in (('a', first), ('b', second)):
        for item in items:
            item.save(tmp_path / 'data/images/train' / folder)
        write_labels(tmp_path / 'data/labels/train' / folder, items)
        for item in items:
            item.save(tmp_path / 'data/images/val' / folder)
        write_labels(tmp_path / 'data/labels/val' / folder, items)
    (tmp_path / 'data/data.yaml').write_text(f'names: {list(CLASSES)}')
    project(tmp_path, tmp_path / 'data')
    content = json.loads((tmp_path / 'project/annotations/train.json').read_text())
    assert len({image['file_name'] for image in content['images']}) == 8
    assert len(content['annotations']) == sum(len(item.objects) for item in first + second)


def test_config_states_the_project_in_few_lines(tmp_path: Path) -> None:
    items = make_items(8)
    items[0].objects = [('person', 1, 1, 20, 20)]
    write_coco(tmp_path / 'data', {'train': items, 'val': items})
    config = project(tmp_path, tmp_path / 'data', gpus=4, epochs=30, image_size=320, batch_size=3)
    text = (tmp_path / 'project/config.py').read_text()
    assert f"_base_ = 'dino_mm::{R50}'\n" in text
    assert 'The learning rate is 0.0001 for 16 images a step' in text
    assert '# 7.5e-05 for 4 GPUs x 3.' in text
    assert text.startswith(f'# Fine-tunes {R50} on COCO data of 3 classes: 8 images for train, 8 images for val.\n')
    assert f'torchrun --nproc_per_node=4 -m dino_mm train {tmp_path}/project/config.py --launcher pytorch\n' in text
    assert len(text.splitlines()) < 50
    assert (config.train_cfg.max_epochs, config.train_dataloader.batch_size, config.auto_scale_lr.enable) == (
        30,
        3,
        True,
    )
    assert config.test_dataloader.dataset.pipeline[1].scale == (320, 533)
    assert config.load_from == dino_mm.zoo.zoo_models()[R50].weights
    assert config.model.backbone.init_cfg is None
    assert config.default_hooks.loading == dict(type='dino_mm.LoadCheckpointHook', class_transfer=True)
    assert config.default_hooks.checkpoint.save_best == 'coco/bbox_mAP'
    assert [hook.type for hook in config.custom_hooks] == ['NumClassCheckHook', 'EMAHook', 'EarlyStoppingHook']
    assert config.work_dir == str(tmp_path / 'project/work_dir')
    assert sorted(path.name for path in (tmp_path / 'project').iterdir()) == ['config.py']  # COCO's files stay in place
    (tmp_path / 'project').rename(tmp_path / 'moved')
    assert Config.fromfile(tmp_path / 'moved/config.py').work_dir == str(tmp_path / 'moved/work_dir')


@pytest.mark.parametrize(('images', 'epochs'), [(10, 100), (205, 100), (1000, 40), (118_000, 12)])
def test_fewer_images_are_seen_more_often(images: int, epochs: int) -> None:
    from dino_mm.projects.config_text import default_epochs

    assert default_epochs(images) == epochs


def test_models_without_weights_start_from_their_backbone(tmp_path: Path) -> None:
    write_coco(tmp_path / 'data', {'train': make_items(4), 'val': make_items(4)})
    config = project(tmp_path, tmp_path / 'data', model='dino_r50_4scale_12ep_amp')
    assert config.load_from is None
    assert config.model.backbone.init_cfg.checkpoint == 'torchvision://resnet50'
    assert config.default_hooks.loading == dict(type='dino_mm.LoadCheckpointHook')


def test_every_model_of_the_zoo_makes_a_project(tmp_path: Path) -> None:
    write_coco(tmp_path / 'data', {'train': make_items(4), 'val': make_items(4)})
    for name in (
        'dino_vitdet_large_4scale_50ep',
        'dino_swin_tiny_224_4scale_12ep',
        'dino_internimage_tiny_4scale_12ep',
    ):
        config = project(tmp_path / name, tmp_path / 'data', model=name)
        assert config.model.bbox_head.num_classes == 3
        assert config.train_cfg.max_epochs == 100


def test_places_of_a_yaml_file(tmp_path: Path) -> None:
    """Folders, lists of folders, and text files with paths; what none of them names is not used."""
    splits = {'a': make_items(4), 'b': make_items(4, 10), 'c': make_items(4, 20), 'unused': make_items(4, 30)}
    write_yolo(tmp_path / 'data', splits)
    lines = [f'./images/c/{item.name}' for item in splits['c'][:3]]
    (tmp_path / 'data/val.txt').write_text('\n'.join(lines))
    (tmp_path / 'data/data.yaml').write_text(f'train: [images/a, images/b]\nval: val.txt\nnames: {list(CLASSES)}\n')
    config = project(tmp_path, tmp_path / 'data')
    assert_same(read(config, 'train'), truth(splits['a'] + splits['b']), tolerance=0.01)
    assert_same(read(config, 'val'), truth(splits['c'][:3]), tolerance=0.01)


def test_lists_of_voc(tmp_path: Path) -> None:
    """VOC2007 without `train.txt` and `val.txt`: `trainval.txt` is divided, what no list names is not used."""
    splits = {'trainval': make_items(10), 'test': make_items(4, 20), 'aeroplane_train': make_items(4, 40)}
    write_voc(tmp_path / 'data', splits)
    config = project(tmp_path, tmp_path / 'data')
    assert_same(read(config, 'train') | read(config, 'val'), truth(splits['trainval']))
    assert_same(read(config, 'test'), truth(splits['test']))


def test_classes_choose_and_order_the_labels(tmp_path: Path) -> None:
    items = make_items(9)
    write_yolo(tmp_path / 'data', {'train': items, 'val': items})
    config = project(tmp_path, tmp_path / 'data', classes=['person', 'crate'])
    assert config.model.bbox_head.num_classes == 2
    assert config.train_dataloader.dataset.metainfo.classes == ('person', 'crate')
    expected = {name: [o for o in objects if o[0] != 'barrel'] for name, objects in truth(items).items()}
    assert_same(read(config, 'val'), expected)


def test_coco_s_own_folder(tmp_path: Path) -> None:
    """Files of other tasks beside, pictures of equal names in all splits, a test without labels."""
    splits = {'train2017': make_items(6), 'val2017': make_items(6)}
    write_coco(tmp_path / 'data', splits)
    content = coco_content(make_items(6))
    (tmp_path / 'data/annotations/person_keypoints_train2017.json').write_text(json.dumps(content))
    (tmp_path / 'data/annotations/captions_train2017.json').write_text(json.dumps(dict(images=[], annotations=[])))
    del content['annotations']
    (tmp_path / 'data/annotations/image_info_test2017.json').write_text(json.dumps(content))
    config = project(tmp_path, tmp_path / 'data')
    for split in ('train', 'val'):
        assert config[f'{split}_dataloader'].dataset.ann_file == f'annotations/instances_{split}2017.json'
        assert config[f'{split}_dataloader'].dataset.data_prefix == dict(img=f'images/{split}2017')
    assert config.test_dataloader.dataset == config.val_dataloader.dataset


def test_projects_and_logs_among_the_data_are_left_out(tmp_path: Path) -> None:
    data = tmp_path / 'data'
    write_yolo(data, {'train': make_items(5)})
    make_project(data / 'first', data, R50)
    (data / 'log.json').write_text('{"loss": 1}\n{"loss": 2}\n')
    (data / 'page.xml').write_text('<html')
    make_project(data / 'second', data, R50)
    texts = [(data / name / 'annotations/train.json').read_text() for name in ('first', 'second')]
    assert texts[0] == texts[1]
    for name in ('first', 'second'):
        config = Config.fromfile(data / name / 'config.py')
        assert_same(read(config, 'train') | read(config, 'val'), truth(make_items(5)), tolerance=0.01)
    damaged = data / 'images/train/photo 0.jpg'
    damaged.write_text('no')
    with pytest.raises(ProjectError) as caught:
        make_project(data / 'third', data, R50)
    assert str(caught.value).startswith(str(damaged.parent.parent.parent / 'labels/train/photo 0.txt'))
    assert '.third' not in str(caught.value)


def test_a_test_that_nobody_labelled_is_no_test(tmp_path: Path) -> None:
    for stated in (True, False):
        data = tmp_path / str(stated)
        write_yolo(data, {split: make_items(5) for split in ('train', 'val', 'test')})
        shutil.rmtree(data / 'labels/test')
        if not stated:
            (data / 'data.yaml').write_text(f'names: {list(CLASSES)}')
        config = project(data, data)
        assert config.test_dataloader.dataset.ann_file == config.val_dataloader.dataset.ann_file


def test_boxes_are_read_in_chunks_of_any_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    items = make_items(7)
    write_yolo(tmp_path, {'train': items})
    from dino_mm.projects import conversion
    from dino_mm.projects.inventory import take_inventory

    found = take_inventory(tmp_path)
    labelled = conversion.yolo_splits(found, tmp_path / 'data.yaml')['train']
    whole = list(read_boxes(labelled, tmp_path / 'data.yaml'))
    monkeypatch.setattr(conversion, 'CHUNK', 3)
    assert list(read_boxes(labelled, tmp_path / 'data.yaml')) == whole
    assert [one.picture.name for one in whole] == sorted(item.name for item in items)
