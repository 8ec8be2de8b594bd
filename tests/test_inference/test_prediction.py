"""``dino_mm.predict`` against mmdet's ``inference_detector``, and tiles."""

import copy
import tracemalloc
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectors import CLASSES, SquareDetector, picture_of, tiny_model, write_video
from mmdet.apis import inference_detector
from mmengine.config import Config
from mmengine.registry import DefaultScope, init_default_scope
from mmengine.structures import InstanceData
from numpy.typing import NDArray

import dino_mm
from dino_mm.inference import SourceError
from dino_mm.models import DINO


@pytest.fixture(scope='module')
def model(tmp_path_factory: pytest.TempPathFactory) -> DINO:
    return tiny_model(tmp_path_factory.mktemp('model'))


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Noise, in formats and sizes that differ; the second is grey with 16 bits."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / name for name in ('a.jpg', 'b.png', 'c.png')]
    cv2.imwrite(str(paths[0]), rng.integers(0, 256, (90, 120, 3), dtype=np.uint8))
    cv2.imwrite(str(paths[1]), rng.integers(0, 65536, (100, 70), dtype=np.uint16))
    cv2.imwrite(str(paths[2]), rng.integers(0, 256, (120, 90, 3), dtype=np.uint8))
    return paths


def by_mmdet(model: DINO, image: str | NDArray) -> InstanceData:
    """What mmdet's function finds. It needs the scope of the process, and changes the config if given an array."""
    init_default_scope('mmdet')
    kept = model.cfg
    model.cfg = Config(copy.deepcopy(kept.to_dict()))
    found = inference_detector(model, image).pred_instances
    model.cfg = kept
    return found


def assert_equal(found: dino_mm.Prediction, expected: InstanceData, score_thr: float = 0.0) -> None:
    """Against ``pred_instances`` of mmdet."""
    kept = expected.scores >= score_thr
    for ours, theirs in ((found.boxes, 'bboxes'), (found.scores, 'scores'), (found.labels, 'labels')):
        np.testing.assert_array_equal(ours, getattr(expected, theirs)[kept].numpy())
    assert found.names == [CLASSES[label] for label in expected.labels[kept]]


def test_boxes_are_those_of_mmdet(model: DINO, pictures: list[Path]) -> None:
    found = list(dino_mm.predict(model, pictures, score_thr=0.0))
    assert [Path(one.source) for one in found] == pictures
    for one, path in zip(found, pictures, strict=True):
        assert len(one.boxes) == 10
        assert_equal(one, by_mmdet(model, str(path)))
        assert one.frame is None
    assert found[1].image.shape == (100, 70, 3)
    assert (found[0].boxes.dtype, found[0].scores.dtype, found[0].labels.dtype) == (np.float32, np.float32, np.int64)


def test_arrays_too(model: DINO) -> None:
    image = np.random.default_rng(1).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    (found,) = dino_mm.predict(model, image, score_thr=0.0)
    assert_equal(found, by_mmdet(model, image))
    assert found.image is image
    assert found.source == 'array 0'


def test_files_after_mmdet_saw_an_array(model: DINO, pictures: list[Path]) -> None:
    """Its function writes a step for arrays into the model's config, and could read no file any more."""
    changed = tiny_model(pictures[0].parent)
    init_default_scope('mmdet')
    inference_detector(changed, np.zeros((64, 64, 3), np.uint8))
    assert changed.cfg.test_dataloader.dataset.pipeline[0].type == 'mmdet.LoadImageFromNDArray'
    (found,) = dino_mm.predict(changed, pictures[1], score_thr=0.0)
    assert_equal(found, by_mmdet(model, str(pictures[1])))
    assert found.image.max() > 0


def test_the_scope_of_the_process_stays(model: DINO) -> None:
    init_default_scope('mmpose')
    list(dino_mm.predict(model, picture_of([])))
    assert DefaultScope.get_current_instance().scope_name == 'mmpose'


def test_scores_and_classes_are_chosen(model: DINO, pictures: list[Path]) -> None:
    expected = by_mmdet(model, str(pictures[0]))
    threshold = expected.scores.sort().values[4].item()
    (found,) = dino_mm.predict(model, pictures[0], score_thr=threshold)
    assert len(found.scores) == 6
    assert_equal(found, expected, threshold)
    name = CLASSES[expected.labels[0]]
    (found,) = dino_mm.predict(model, pictures[0], score_thr=0.0, classes=[name])
    np.testing.assert_array_equal(found.boxes, expected.bboxes[expected.labels == expected.labels[0]].numpy())
    assert set(found.names) == {name}


def test_batches_of_one_size_change_nothing(model: DINO, pictures: list[Path]) -> None:
    image = cv2.imread(str(pictures[0]))
    images = [image, image[::-1].copy(), image[:, ::-1].copy()]
    single = list(dino_mm.predict(model, images, score_thr=0.0))
    together = list(dino_mm.predict(model, images, score_thr=0.0, batch_size=2))
    assert len(together) == 3
    for one, other in zip(single, together, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-2)
        np.testing.assert_array_equal(one.labels, other.labels)


def test_half_precision_is_near(model: DINO, pictures: list[Path]) -> None:
    (exact,) = dino_mm.predict(model, pictures[0], score_thr=0.0)
    (half,) = dino_mm.predict(model, pictures[0], score_thr=0.0, amp=True)
    assert half.boxes.dtype == half.scores.dtype == np.float32
    assert not np.array_equal(exact.scores, half.scores)
    np.testing.assert_allclose(np.sort(exact.scores), np.sort(half.scores), atol=0.05)


def test_batches_are_as_large_as_asked_for(tmp_path: Path) -> None:
    model, video = SquareDetector(), write_video(tmp_path / 'v.avi', 7)
    found = list(dino_mm.predict(model, [video, picture_of([])], batch_size=3))
    assert model.batches == [3, 3, 2]
    assert [one.frame for one in found] == [0, 1, 2, 3, 4, 5, 6, None]
    assert [len(one.boxes) for one in found] == [1] * 7 + [0]
    assert found[-1].boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ('options', 'error', 'said'),
    [
        (dict(classes=['smal']), ValueError, "The model has no class 'smal'; did you mean small?"),
        (dict(classes=['SMALL']), ValueError, "The model has no class 'SMALL'; did you mean small?"),
        (dict(classes=['xyz']), ValueError, "The model has no class 'xyz'; it has small, large."),
        (dict(classes='small'), ValueError, "`classes` is the text 'small', not a list of names; write ['small']."),
        (dict(score_thr=30), ValueError, 'The score threshold is 30; it can be from 0 to 1.'),
        (dict(batch_size=0), ValueError, 'The batch size is 0; it has to be 1 at least.'),
        (dict(tiles=0), ValueError, 'The side of tiles is 0 pixels; it has to be 1 at least.'),
        (dict(overlap=1), ValueError, 'The overlap of tiles is 1; it can be from 0 to less than 1.'),
        (dict(sources='x.jpg'), SourceError, 'There is no file or folder x.jpg.'),
    ],
)
def test_what_is_wrong_is_said_at_once(options: dict, error: type, said: str) -> None:
    with pytest.raises(error) as caught:
        dino_mm.predict(SquareDetector(), **(dict(sources=picture_of([])) | options))
    assert str(caught.value) == said


def test_unreadable_pictures_are_raised_or_handed_over(tmp_path: Path) -> None:
    good, bad = tmp_path / 'b.png', tmp_path / 'a.png'
    bad.write_bytes(b'no picture')
    cv2.imwrite(str(good), picture_of([(5, 5, 9, 9)]))
    with pytest.raises(SourceError, match=f'Cannot read the picture {bad}'):
        list(dino_mm.predict(SquareDetector(), tmp_path))
    errors: list[SourceError] = []
    (found,) = dino_mm.predict(SquareDetector(), tmp_path, on_error=errors.append)
    assert found.source == str(good)
    assert len(errors) == 1


def test_memory_stays_flat_over_a_long_video(tmp_path: Path) -> None:
    video = write_video(tmp_path / 'v.avi', 300)
    frames = dino_mm.predict(SquareDetector(), video, batch_size=4)
    peaks = []
    tracemalloc.start()
    for found in frames:
        assert found.boxes[0, 0] == pytest.approx(found.frame % 80, abs=1)
        if found.frame in (49, 299):
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.reset_peak()
    tracemalloc.stop()
    assert found.frame == 299
    frame_size = 96 * 64 * 3
    assert peaks[1] < peaks[0] + 10 * frame_size  # 250 frames would be 25 times that


def tiled(image: NDArray, **options: object) -> tuple[dino_mm.Prediction, SquareDetector]:
    pytest.importorskip('sahi')
    model = SquareDetector()
    (found,) = dino_mm.predict(model, image, **options)
    return found, model


def test_tiles_find_the_same_in_every_repeated_patch() -> None:
    boxes = [(4, 6, 10, 13), (20, 18, 25, 22)]
    image = np.tile(picture_of(boxes, 32, 32), (3, 4, 1))
    found, model = tiled(image, tiles=32, overlap=0.0, batch_size=5)
    shifts = [(32 * x, 32 * y) for y, x in product(range(3), range(4))]
    expected = {(a + x, b + y, c + x, d + y) for a, b, c, d in boxes for x, y in shifts}
    assert sorted(map(tuple, found.boxes.tolist())) == sorted(expected)
    assert model.batches == [5, 5, 2, 1]  # twelve tiles, then the whole picture
    assert set(found.names) == {'small'}
    np.testing.assert_array_equal(found.scores, np.full(24, 0.9, np.float32))


def test_overlapping_tiles_count_an_object_once_and_cut_ones_become_whole() -> None:
    inner, large = (28, 40, 36, 48), (20, 4, 80, 20)  # on a border of tiles; larger than a tile
    found, _ = tiled(picture_of([inner, large], 128, 64), tiles=40, overlap=0.25)
    assert sorted(zip(found.names, map(tuple, found.boxes.tolist()), strict=True)) == [
        ('large', large),
        ('small', inner),
    ]
    assert found.scores.tolist() == pytest.approx([0.9, 0.596])  # the best first


def test_tiles_with_scores_classes_and_small_pictures() -> None:
    image = picture_of([(4, 6, 10, 13), (34, 34, 60, 60)], 64, 64)
    for options in (dict(score_thr=0.7), dict(classes=['small'])):
        found, _ = tiled(image, tiles=32, overlap=0.0, **options)
        assert found.boxes.tolist() == [[4, 6, 10, 13]]
    found, model = tiled(image, tiles=64)
    assert model.batches == [1]
    assert found.boxes.tolist() == [[4, 6, 10, 13], [34, 34, 60, 60]]
    found, _ = tiled(picture_of([], 64, 64), tiles=32)
    assert found.boxes.shape == (0, 4)
    found, _ = tiled(image, tiles=32, score_thr=0.01)
    assert [4, 6, 10, 13] in found.boxes.tolist()


def test_tiles_of_dino_itself(model: DINO, pictures: list[Path]) -> None:
    """In a picture of equal tiles, each tile's best box is there, shifted."""
    pytest.importorskip('sahi')
    patch = cv2.imread(str(pictures[0]))[:64, :64]
    (alone,) = dino_mm.predict(model, patch, score_thr=0.0)
    (found,) = dino_mm.predict(model, np.tile(patch, (2, 2, 1)), score_thr=0.0, tiles=64, overlap=0.0)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    for x, y in product((0, 64), (0, 64)):
        expected = alone.boxes[0] + [x, y, x, y]
        assert np.abs(found.boxes - expected).max(1).min() < 0.01
