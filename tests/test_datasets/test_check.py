"""The check before training gives the verdicts of training, and more where it sees the pictures."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from coco_cases import BOXES, CLASSES, build, clean, objects, write
from forked import run_tool
from PIL import Image
from test_coco_file import FAULTS, HARMLESS, changed

from dino_mm.datasets.check import check_dataset
from dino_mm.datasets.coco_rules import RULES, AnnotationError
from dino_mm.visualization import draw_dataset

#: Found by looking for boxes or pictures, which the bare file does not show.
BY_THE_DATA_SET = {'category-order', 'other-categories'}


@pytest.mark.parametrize('name', HARMLESS)
def test_what_training_accepts_the_check_accepts(name: str, tmp_path) -> None:
    change, met = HARMLESS[name]
    path = write(tmp_path, changed(change))
    check = check_dataset(str(path), tmp_path, CLASSES, pixels=True)
    assert not check.has_faults, check.report()
    assert set(check.findings.by_rule) == met


@pytest.mark.parametrize('name', FAULTS)
def test_what_training_refuses_the_check_refuses_in_the_same_words(name: str, tmp_path) -> None:
    change, words = FAULTS[name]
    path = write(tmp_path, changed(change))
    try:
        report = check_dataset(str(path), tmp_path).report()
    except AnnotationError as error:
        report = f'FAULT {error}'
    assert 'FAULT' in report
    if name != 'size and picture missing':  # named as a missing picture here, whatever its size
        assert all(word in report for word in words), report


@pytest.mark.parametrize('name', [*HARMLESS, *FAULTS])
def test_a_fixed_file_is_read_as_the_clean_one_less_what_was_faulty(name: str, tmp_path) -> None:
    change = (HARMLESS | FAULTS)[name][0]
    path, fixed = write(tmp_path, changed(change)), tmp_path / 'new' / 'fixed.json'
    before = path.read_bytes()
    try:
        check = check_dataset(str(path), tmp_path)
        check.write_clean(fixed)
    except AnnotationError:
        assert name in FAULTS
        assert not fixed.exists()
        return
    dataset = build(tmp_path, ann_file='new/fixed.json')
    left = objects(dataset)
    assert all(box in sorted(BOXES) for box in left)
    assert left == sorted(BOXES) if name in HARMLESS else len(left) >= 2
    again = check_dataset(str(fixed), tmp_path)
    assert {rule for rule in again.findings.by_rule if rule not in BY_THE_DATA_SET} <= {
        'no-segmentation',
        'no-box-area',
    }
    assert path.read_bytes() == before
    assert not list(fixed.parent.glob('*.part'))


def test_pictures_are_looked_at(tmp_path) -> None:
    """Missing, of another size, damaged in the header, damaged behind it, of a kind that is refused."""
    content = clean()
    names = ['other_size.png', 'no_header.png', 'truncated.png', 'float.tif', 'missing.png']
    for i, name in enumerate(names):
        content['images'].append(dict(id=100 + i, file_name=name, width=30, height=20))
    path = write(tmp_path, content)
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((15, 10)).save(tmp_path / names[0])
    (tmp_path / names[1]).write_bytes(b'no picture')
    Image.fromarray(noise).save(tmp_path / names[2])
    (tmp_path / names[2]).write_bytes((tmp_path / names[2]).read_bytes()[:900])
    Image.fromarray(noise[..., 0].astype(np.float32)).save(tmp_path / names[3])

    quick = check_dataset(str(path), tmp_path)
    assert {rule: finding.count for rule, finding in quick.findings.by_rule.items()} == {
        'missing-picture': 1,
        'wrong-size': 1,
        'bad-picture': 1,
    }
    assert 'id 100 is 15x10 instead of 30x20' in quick.report()
    draw_dataset(quick, tmp_path / 'out.png')  # with what cannot be drawn in grey
    assert (np.array(Image.open(tmp_path / 'out.png')) == 128).all(-1).sum() > 500
    thorough = check_dataset(str(path), tmp_path, pixels=True)
    assert thorough.findings.by_rule['bad-picture'].count == 3
    assert all(name in thorough.report() for name in names[1:])
    assert [image['id'] for image in thorough.file.images] == [3, 5, 7, 100]


def test_classes_and_hints(tmp_path) -> None:
    content = clean()
    for annotation in content['annotations']:
        x, y, w, h = annotation['bbox']
        annotation['bbox'] = [x + 5, y + 5, x + w + 5, y + h + 5]  # corners
    path = write(tmp_path, content)
    report = check_dataset(str(path), tmp_path, ('cat', 'dgo', 'owl')).report()
    assert 'FAULT  1 classes that the file does not have' in report
    assert "dgo (did you mean 'dog'?)" in report
    assert 'not corners' in report
    content = clean()
    content['categories'].append(dict(id=50, name='yak'))
    content['annotations'] += [dict(content['annotations'][0], id=100 + i) for i in range(150)]
    report = check_dataset(str(write(tmp_path, content)), tmp_path).report()
    assert 'Classes without an object: yak' in report
    content = clean()
    for annotation in content['annotations']:
        annotation['bbox'] = [side / 64 for side in annotation['bbox']]  # YOLO's unit
    check = check_dataset(str(write(tmp_path, content)), tmp_path, ('owl', 'cat'))
    assert "not shares of the picture's size" in check.report()
    assert '3 objects of 2 of 2 classes' in check.report()
    draw_dataset(check, tmp_path / 'shares.png')
    assert Image.open(tmp_path / 'shares.png').height > 1200
    assert 'One image has 152 objects: its denoising queries are 304' in report


@pytest.mark.parametrize('left', [[], [dict(id=1, image_id=3, category_id=2, bbox=[1, 2, 3, 4], area=12, iscrowd=1)]])
def test_a_file_without_an_object_is_no_training_set(left: list, tmp_path) -> None:
    path = write(tmp_path, clean() | dict(annotations=left))
    check = check_dataset(str(path), tmp_path)
    assert check.has_faults
    assert '1 files without an object to train on' in check.report()
    with pytest.raises(AnnotationError, match='has a box to train on'):
        build(tmp_path, filter_cfg=dict(filter_empty_gt=True))


def test_hundred_thousand_annotations_take_less_than_a_minute(tmp_path) -> None:
    rng = np.random.default_rng(0)
    boxes = rng.uniform(1, 200, (100_000, 4)).round(2).tolist()
    images = [dict(id=i, file_name=f'{i}.png', width=640, height=480) for i in range(10_000)]
    annotations = [
        dict(
            id=i + 1, image_id=i % 10_000, category_id=1, bbox=box, area=box[2] * box[3], iscrowd=0, segmentation=[[1]]
        )
        for i, box in enumerate(boxes)
    ]
    path = tmp_path / 'large.json'
    path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=[dict(id=1, name='a')])))
    Image.new('RGB', (640, 480)).save(tmp_path / '0.png')
    for i in range(1, 10_000):
        (tmp_path / f'{i}.png').hardlink_to(tmp_path / '0.png')
    start = time.monotonic()
    check = check_dataset(str(path), tmp_path)
    assert time.monotonic() - start < 60
    assert len(check.file.annotations) == 100_000
    assert not check.has_faults


def test_the_command_draws_fixes_and_exits_1_with_faults(tmp_path: Path) -> None:
    path = write(tmp_path, clean())
    picture = tmp_path / 'out' / 'check.png'
    tool = ('tools/check_dataset.py', path, tmp_path, '--picture', picture)
    done = run_tool(*tool, '--classes', *CLASSES)
    assert '3 images, 5 objects of 3 of 3 classes' in done.stdout
    drawn = np.array(Image.open(picture))
    assert drawn.shape[0] > 1200
    assert (drawn[950:] == (40, 200, 90)).all(-1).sum() > 500  # boxes of the contact sheet
    broken = clean()
    broken['annotations'][0]['category_id'] = 77
    write(tmp_path, broken)
    done = run_tool(*tool, status=1)
    assert 'FAULT  1 annotations whose `category_id` no category has' in done.stdout
    done = run_tool(*tool, '--fix', tmp_path / 'fixed.json')
    assert 'written' in done.stdout
    assert len(json.loads((tmp_path / 'fixed.json').read_text())['annotations']) == 4
    write(tmp_path, '{"images": [')
    done = run_tool(*tool, status=1)
    assert done.stderr.splitlines()[-1].startswith('- 1 places where the JSON breaks off')
    assert 'Traceback' not in done.stderr
    done = run_tool('tools/check_dataset.py', path, tmp_path / 'none', status=1)
    assert f'error: There is no folder {tmp_path}/none' in done.stderr


def test_every_fault_is_met_by_a_case(tmp_path) -> None:
    """A rule without a case is either untested or dead."""
    reports = []
    for change, _ in FAULTS.values():
        path = write(tmp_path, changed(change))
        try:
            reports.append(check_dataset(str(path), tmp_path).report())
        except AnnotationError as error:
            reports.append(str(error))
    met = {name for name, rule in RULES.items() if rule.fault and any(rule.found in report for report in reports)}
    # Tested above, in test_coco_file.py with the data set's classes, and as the data set's own finding.
    elsewhere = {'missing-class', 'bad-picture', 'unknown-size', 'no-objects'}
    assert {name for name, rule in RULES.items() if rule.fault} - elsewhere == met
