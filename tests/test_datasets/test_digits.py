import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from dino_mm.datasets import digits
from dino_mm.datasets.digits import CLASSES, MAX_OVERLAP, SCENE_SIZE, make_digits, split_samples

NUM_TRAIN, NUM_VAL, SEED = 40, 20, 3


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp('digits') / 'a', NUM_TRAIN, NUM_VAL, SEED)


def read(data_dir: Path, part: str) -> dict[str, Any]:
    return json.loads((data_dir / 'annotations' / f'{part}.json').read_text())


def file_hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


def boxes_by_image(data_dir: Path, part: str) -> dict[int, list[digits.Box]]:
    boxes: dict[int, list[digits.Box]] = {}
    for annotation in read(data_dir, part)['annotations']:
        x, y, w, h = annotation['bbox']
        boxes.setdefault(annotation['image_id'], []).append(digits.Box(x, y, x + w, y + h))
    return boxes


def test_same_seed_gives_same_bytes(data_dir: Path, tmp_path: Path) -> None:
    assert file_hashes(make_digits(tmp_path, NUM_TRAIN, NUM_VAL, SEED)) == file_hashes(data_dir)


def test_other_seed_gives_other_scenes(data_dir: Path, tmp_path: Path) -> None:
    make_digits(tmp_path, 5, 5, SEED + 1)
    ours, others = file_hashes(data_dir), file_hashes(tmp_path)
    assert not any(ours[name] == others[name] for name in others if name.endswith('.png'))


def test_smaller_set_is_beginning_of_larger(data_dir: Path, tmp_path: Path) -> None:
    make_digits(tmp_path, 5, 2, SEED)
    larger, smaller = file_hashes(data_dir), file_hashes(tmp_path)
    pictures = [name for name in smaller if name.endswith('.png')]
    assert len(pictures) == 7
    assert all(smaller[name] == larger[name] for name in pictures)
    few, many = read(tmp_path, 'train')['annotations'], read(data_dir, 'train')['annotations']
    assert few == many[: len(few)]


@pytest.mark.parametrize(('part', 'count'), [('train', NUM_TRAIN), ('val', NUM_VAL)])
def test_loads_as_coco(data_dir: Path, part: str, count: int) -> None:
    coco = COCO(data_dir / 'annotations' / f'{part}.json')
    assert len(coco.getImgIds()) == count
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    for record in coco.loadImgs(coco.getImgIds()):
        with Image.open(data_dir / part / record['file_name']) as image:
            assert image.mode == 'RGB'
            assert image.size == (record['width'], record['height']) == (SCENE_SIZE, SCENE_SIZE)
        assert 1 <= len(coco.getAnnIds(record['id'])) <= 6
    for annotation in coco.loadAnns(coco.getAnnIds()):
        assert annotation['area'] == annotation['bbox'][2] * annotation['bbox'][3]
        assert annotation['iscrowd'] == 0


@pytest.mark.parametrize('part', ['train', 'val'])
def test_every_digit_occurs(data_dir: Path, part: str) -> None:
    counts = Counter(a['category_id'] for a in read(data_dir, part)['annotations'])
    assert sorted(counts) == list(range(1, 11))


@pytest.mark.parametrize('part', ['train', 'val'])
def test_boxes_lie_inside_and_overlap_little(data_dir: Path, part: str) -> None:
    for boxes in boxes_by_image(data_dir, part).values():
        for box in boxes:
            assert 0 <= box.left < box.right <= SCENE_SIZE
            assert 0 <= box.top < box.bottom <= SCENE_SIZE
            covered = sum(box.intersection(other) for other in boxes if other is not box)
            assert covered <= MAX_OVERLAP * box.area


def test_box_is_what_the_ink_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    # On an even background the ink can be told from the pixels. A border pixel of the box is at
    # least a quarter ink, 125 levels or more off the background, and noise averages 3.5 at most.
    def even(palette: digits.Palette, rng: np.random.Generator) -> np.ndarray:
        return np.full((SCENE_SIZE, SCENE_SIZE, 3), palette.ground, np.float32)

    monkeypatch.setattr(digits, '_draw_background', even)
    scans, labels = digits._load_scans()
    checked = 0
    for seed in range(60):
        scene, objects = digits.draw_scene(scans, labels, np.random.default_rng(seed))
        if len(objects) > 1:
            continue
        grey = np.asarray(scene, dtype=float).mean(axis=2)
        ink = abs(grey - np.median(grey)) > 20
        rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
        spanned = digits.Box(columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert spanned == objects[0][0]
        checked += 1
    assert checked >= 5


def test_digit_keeps_size_and_orientation() -> None:
    scan = np.zeros((8, 8), np.float32)
    scan[:, 2:4] = 1  # An upright bar of 8 x 2 px, enlarged four times.
    upright, turned = digits.draw_digit(scan, 32), digits.draw_digit(scan, 32, angle=90)
    assert upright.shape == (32, 8)
    assert turned.shape == (8, 32)
    assert upright.min() >= 0
    assert upright.max() == 1
    for edge in (upright[0], upright[-1], upright[:, 0], upright[:, -1]):
        assert edge.max() >= digits.INK_THRESHOLD


def test_split_divides_every_class() -> None:
    labels = digits._load_scans()[1]
    train, val = split_samples(labels)
    assert sorted([*train, *val]) == list(range(1797))
    for digit in range(10):
        share = (labels[train] == digit).sum() / (labels == digit).sum()
        assert share == pytest.approx(0.7, abs=0.005)


def test_scenes_use_their_own_scans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    used: list[bytes] = []
    draw_digit = digits.draw_digit

    def spy(scan: np.ndarray, size: float, angle: float) -> np.ndarray:
        used.append(scan.tobytes())
        return draw_digit(scan, size, angle)

    monkeypatch.setattr(digits, 'draw_digit', spy)
    scans, labels = digits._load_scans()
    train, val = ({scans[row].tobytes() for row in rows} for rows in split_samples(labels))
    assert not train & val
    make_digits(tmp_path / 'train', num_train=30, num_val=1)
    num_train_digits = len(read(tmp_path / 'train', 'train')['annotations'])
    assert set(used[:num_train_digits]) <= train
    used.clear()
    make_digits(tmp_path / 'val', num_train=1, num_val=30)
    num_val_digits = len(read(tmp_path / 'val', 'val')['annotations'])
    assert set(used[-num_val_digits:]) <= val


def test_second_call_leaves_files_alone(tmp_path: Path) -> None:
    make_digits(tmp_path, 2, 1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    make_digits(tmp_path, 2, 1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == before


def test_other_arguments_replace_the_files(tmp_path: Path) -> None:
    make_digits(tmp_path, 3, 2)
    make_digits(tmp_path, 2, 1)
    assert len(list((tmp_path / 'train').iterdir())) == len(read(tmp_path, 'train')['images']) == 2
    assert len(list((tmp_path / 'val').iterdir())) == 1


def test_interrupted_run_is_redone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(digits, 'draw_scene', interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_digits(tmp_path, 2, 1)
    make_digits(tmp_path, 2, 1)
    assert len(read(tmp_path, 'train')['images']) == 2


def test_foreign_files_are_kept(tmp_path: Path) -> None:
    (tmp_path / 'train').mkdir()
    (tmp_path / 'train' / 'holiday.jpg').touch()
    with pytest.raises(FileExistsError, match='choose another folder'):
        make_digits(tmp_path, 2, 1)
    assert (tmp_path / 'train' / 'holiday.jpg').exists()


def test_missing_scikit_learn_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(ModuleNotFoundError, match='pip install scikit-learn'):
        make_digits(tmp_path / 'new', 2, 1)
    assert not (tmp_path / 'new').exists()


def test_empty_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='num_val=0'):
        make_digits(tmp_path, 2, 0)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits.main([str(tmp_path), '--num-train', '2', '--num-val', '1', '--seed', '7'])
    assert capsys.readouterr().out == f'2 training and 1 validation scenes in {tmp_path}\n'
    assert json.loads((tmp_path / 'digits.json').read_text())['seed'] == 7
    with pytest.raises(SystemExit, match='1'):
        digits.main([str(tmp_path), '--num-train', '0'])
    assert capsys.readouterr().err.startswith('error: need at least one scene')
