"""Data that no project can be made of: one line, and nothing is written."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from own_data import (
    LAYOUTS,
    R50,
    make_items,
    project,
    write_coco,
    write_voc,
    write_yolo,
)
from PIL import Image

from dino_mm.projects import make_project
from dino_mm.projects.errors import ProjectError
from dino_mm.shipped import UnknownConfigError

pytest.importorskip('supervision')  # reads YOLO and Pascal VOC


def replace(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def lose_pictures(data: Path) -> None:
    for path in data.rglob('*'):
        if path.suffix.lower() in ('.jpg', '.png'):
            path.unlink()


def empty(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(annotations=[])))


#: Layout, what is done to it, arguments, what is said.
FAULTS: dict[str, tuple[str, Callable[[Path], Any], dict, str]] = {
    'no annotations': ('coco', lambda d: shutil.rmtree(d / 'annotations'), {}, 'there are no annotations below it'),
    'no names': (
        'yolo',
        lambda d: (d / 'data.yaml').unlink(),
        {},
        'has a YOLO label, but no YAML file names the classes',
    ),
    'no folder': ('coco', shutil.rmtree, {}, 'there is no such folder'),
    'two formats': (
        'coco',
        lambda d: write_voc(d / 'x', {'train': make_items(2)}),
        {},
        r'COCO \(.*\) and Pascal VOC \(',
    ),
    'no pictures': ('voc', lose_pictures, {}, 'there is no picture below it'),
    'labels alone': ('yolo', lose_pictures, {}, 'there is no picture below it'),
    'pictures elsewhere': (
        'coco',
        lambda d: [shutil.rmtree(d / 'images'), Image.new('RGB', (9, 9)).save(d / 'other.png')],
        {},
        'no images found. It lists photo 0.jpg, which is nowhere below',
    ),
    'one picture': (
        'coco',
        lambda d: (d / 'images/val/photo 20.JPG').unlink(),
        {},
        '1 images whose picture is missing',
    ),
    'xml alone': ('roboflow voc', lambda d: (d / 'train/photo 1.png').unlink(), {}, r'photo 1.xml: no images found'),
    'damaged picture': (
        'yolo',
        lambda d: (d / 'images/train/photo 0.jpg').write_text('no'),
        {},
        r'photo 0\.(txt|jpg): .*photo 0\.jpg',
    ),
    'no boxes': ('coco', lambda d: empty(d / 'annotations/instances_val.json'), {}, "the split 'val' has no boxes"),
    'no boxes at all': (
        'voc',
        lambda d: [path.write_text('<annotation/>') for path in voc_files(d)],
        {},
        'no boxes',
    ),
    'no training set': (
        'coco',
        lambda d: (d / 'annotations/instances_train.json').unlink(),
        {},
        'there is no training set',
    ),
    'two of a split': (
        'coco',
        lambda d: shutil.copy(d / 'annotations/instances_val.json', d / 'instances_val2.json'),
        {},
        "are both annotation files of the split 'val'",
    ),
    'broken JSON': (
        'coco',
        lambda d: (d / 'annotations/instances_val.json').write_text('{"images": ['),
        {},
        r'instances_val\.json: it is no valid JSON \(Expecting value',
    ),
    'broken XML': ('voc', lambda d: next(voc_files(d)).write_text('<annotation'), {}, r'\.xml: it is no valid XML'),
    'broken YAML': ('yolo', lambda d: (d / 'data.yaml').write_text('names: [a'), {}, 'it is no valid YAML'),
    'names with gaps': (
        'yolo',
        lambda d: replace(d / 'data.yaml', '  0: crate\n', '  7: crate\n'),
        {},
        r'`names` has the numbers \[1, 2, 7\], not 0 to 2',
    ),
    'names twice': ('yolo', lambda d: replace(d / 'data.yaml', 'barrel', 'crate'), {}, '`names` has crate twice'),
    'unknown label': (
        'roboflow yolo',
        lambda d: (d / 'train/labels/photo 1.txt').write_text('3 0.5 0.5 0.1 0.1'),
        {},
        r'photo 1\.txt: .*class_id 3, outside the valid range \[0, 2\] for 3 classes',
    ),
    'short label': (
        'yolo',
        lambda d: (d / 'labels/train/photo 1.txt').write_text('0 0.5 0.5'),
        {},
        r'photo 1\.txt: .*5 tokens',
    ),
    'voc without box': (
        'voc',
        lambda d: replace(d / 'Annotations/photo 1.xml', 'bndbox', 'box'),
        {},
        r'photo 1\.xml: Missing bndbox',
    ),
    'no such class': (
        'yolo',
        lambda d: None,
        {'classes': ['Person']},
        r"Person \(did you mean 'person'\?\); it has 'crate'",
    ),
    'no such class in COCO': (
        'coco',
        lambda d: None,
        {'classes': ['dog', 'crate']},
        'no labels of the class dog; it has',
    ),
    'class twice': ('coco', lambda d: None, {'classes': ['crate', 'crate']}, '`classes` names crate twice'),
}


def voc_files(data: Path) -> Any:
    return iter(sorted(data.glob('Annotations/*.xml')))


@pytest.mark.parametrize('case', FAULTS)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    layout, damage, arguments, said = FAULTS[case]
    data = tmp_path / 'data'
    LAYOUTS[layout](data, {'train': make_items(5), 'val': make_items(5, 20)})
    damage(data)
    with pytest.raises(ProjectError, match=said) as caught:
        make_project(tmp_path / 'out' / 'project', data, R50, **arguments)
    assert '\n' not in str(caught.value)
    assert str(data) in str(caught.value) or '--classes' in str(caught.value)
    assert not list((tmp_path / 'out').glob('*'))
    assert not list((tmp_path / 'out').glob('.*'))


def test_target_is_never_written_into(tmp_path: Path) -> None:
    write_coco(tmp_path / 'data', {'train': make_items(4), 'val': make_items(4)})
    (tmp_path / 'project').mkdir()
    project(tmp_path, tmp_path / 'data')  # an empty folder will do
    before = (tmp_path / 'project/config.py').read_text()
    with pytest.raises(ProjectError, match=r'project: it exists and is not an empty folder. Name another one'):
        project(tmp_path, tmp_path / 'data', epochs=3)
    assert (tmp_path / 'project/config.py').read_text() == before
    with pytest.raises(
        UnknownConfigError, match=r"no config 'dino_r50_4scale_13ep'. Near to it: dino_r50_4scale_12ep, "
    ):
        make_project(tmp_path / 'other', tmp_path / 'data', 'dino_r50_4scale_13ep')
    assert not (tmp_path / 'other').exists()


def test_without_supervision_one_line_tells_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_yolo(tmp_path / 'data', {'train': make_items(4), 'val': make_items(4)})
    write_coco(tmp_path / 'coco', {'train': make_items(4), 'val': make_items(4)})
    monkeypatch.setitem(sys.modules, 'supervision', None)
    with pytest.raises(ProjectError, match=r"^YOLO and Pascal VOC .* missing: pip install 'supervision>=0.31'$"):
        make_project(tmp_path / 'project', tmp_path / 'data', R50)
    assert make_project(tmp_path / 'project', tmp_path / 'coco', R50).config.is_file()  # COCO needs none
