"""Files of detections, read back; and the whole command in this process."""

import csv
import json
import os
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
from commands import python
from detectors import CLASSES, SquareDetector, cut, picture_of, tiny_model, write_tiny, write_video
from forked import run_tool
from numpy.typing import NDArray
from PIL import Image
from test_env import without

import dino_mm
from dino_mm.datasets.coco_file import read_coco_file
from dino_mm.inference import command
from dino_mm.inference.command import Request, UsageError, predict_to_folder
from dino_mm.inference.detections import Detections
from dino_mm.inference.outputs import FORMATS, OutputFolder, _encode
from dino_mm.inference.prediction import Detector
from dino_mm.inference.sources import PICTURES, Frame, Source, find_sources
from dino_mm.visualization.detections import draw_detections, label_colour


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with pictures of rectangles in two folders and a video."""
    monkeypatch.chdir(tmp_path)
    for name, boxes in {
        'in/a.png': [(3, 5, 10, 11), (20, 20, 60, 50)],
        'in/b.jpg': [],
        'in/sub/a.png': [(90, 60, 96, 64)],
    }.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(name, picture_of(boxes))
    write_video(tmp_path / 'in/v.avi', 3)
    return tmp_path


def write(sources: object, out: Path, *formats: str) -> list[dino_mm.Prediction]:
    """Write all files; what was found, in the same order."""
    detector = Detector(SquareDetector())
    with OutputFolder(out, detector.classes, True, formats) as output:
        for frame, found in detector.run(find_sources(sources), pytest.fail):
            output.add(frame, found)
    return list(dino_mm.predict(SquareDetector(), sources))


def names(folder: Path) -> list[str]:
    """All files below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())


GIVEN = ['in/**/*']


def test_files_have_the_places_of_their_sources(folder: Path) -> None:
    write(GIVEN, folder / 'out', *FORMATS)
    assert names(folder / 'out') == [
        'a.png',
        'b.jpg',
        'classes.txt',
        'labels/a.txt',
        'labels/b.txt',
        'labels/sub/a.txt',
        'labels/v/000000.txt',
        'labels/v/000001.txt',
        'labels/v/000002.txt',
        'predictions.csv',
        'predictions.json',
        'sub/a.png',
        'v.mp4',
    ]


def test_coco_reads_back(folder: Path) -> None:
    expected = write(GIVEN, folder / 'out', 'coco')
    file = read_coco_file(str(folder / 'out/predictions.json'))
    assert [category['name'] for category in file.categories] == ['small', 'large']
    stated = [image['file_name'] for image in file.images]
    assert stated == ['a.png', 'b.jpg', 'sub/a.png', 'v/000000.jpg', 'v/000001.jpg', 'v/000002.jpg']
    assert [(i.get('video'), i.get('frame')) for i in file.images[2:4]] == [(None, None), ('in/v.avi', 0)]
    label_of = {category: label for label, category in enumerate(file.category_ids(['small', 'large']))}
    for image, found in zip(file.images, expected, strict=True):
        assert (image['height'], image['width']) == found.image.shape[:2]
        rows = file.by_image.get(image['id'], [])
        boxes = [(x, y, x + w, y + h) for x, y, w, h in (row['bbox'] for row in rows)]
        assert boxes == list(map(tuple, found.boxes.tolist()))
        assert [row['score'] for row in rows] == found.scores.tolist()
        assert [label_of[row['category_id']] for row in rows] == found.labels.tolist()
    assert set(file.findings.by_rule) <= {'no-segmentation'}


def test_yolo_and_csv_read_back(folder: Path) -> None:
    expected = write(GIVEN, folder / 'out', 'yolo', 'csv')
    assert (folder / 'out/classes.txt').read_text() == 'small\nlarge\n'
    with (folder / 'out/predictions.csv').open() as file:
        lines = list(csv.DictReader(file))
    for found in expected:
        stem = Path(found.source).relative_to('in').with_suffix('')
        stem = stem if found.frame is None else stem / f'{found.frame:06d}'
        rows = np.array([line.split() for line in (folder / f'out/labels/{stem}.txt').read_text().splitlines()], float)
        rows = rows.reshape(-1, 5)
        height, width = found.image.shape[:2]
        centres, sizes = rows[:, 1:3] * [width, height], rows[:, 3:] * [width, height]
        np.testing.assert_allclose(np.hstack([centres - sizes / 2, centres + sizes / 2]), found.boxes, atol=1e-5)
        assert rows[:, 0].tolist() == found.labels.tolist()

        key = (found.source, '' if found.frame is None else str(found.frame))
        own = [line for line in lines if (line['file'], line['frame']) == key]
        corners = [[float(line[side]) for side in ('left', 'top', 'right', 'bottom')] for line in own]
        assert corners == found.boxes.tolist()
        assert [(line['name'], float(line['score'])) for line in own] == list(
            zip(found.names, found.scores.tolist(), strict=True)
        )
    assert len(lines) == sum(len(found.boxes) for found in expected)


def test_pictures_and_videos_are_annotated(folder: Path) -> None:
    write(GIVEN, folder / 'out')
    drawn = cv2.imread('out/a.png')
    assert tuple(drawn[49, 40, ::-1]) == tuple(drawn[30, 20, ::-1]) == label_colour(1)
    assert tuple(drawn[35, 40]) == (255, 255, 255)  # within the box
    video = find_sources('out/v.mp4')
    frames = [frame for frame, _ in Detector(SquareDetector()).run(video, pytest.fail)]
    assert [(frame.image.shape, frame.fps) for frame in frames] == [((64, 96, 3), 10.0)] * 3
    assert np.abs(frames[0].image[21:28, :2].reshape(-1, 3).mean(0)[::-1] - label_colour(0)).max() < 60


@pytest.mark.parametrize('suffix', PICTURES)
def test_every_format_shows_colours(suffix: str, folder: Path) -> None:
    """Grey formats become PNG."""
    picture = folder / f'x{suffix.upper()}'
    Image.fromarray(picture_of([(20, 20, 60, 50)])).convert('L' if suffix == '.pgm' else 'RGB').save(picture)
    write(picture, folder / 'out')
    path = folder / 'out' / ('x.png' if suffix == '.pgm' else picture.name)
    assert np.abs(cv2.imread(str(path))[49, 40, ::-1].astype(int) - label_colour(1)).max() < 50


def test_what_a_format_does_not_take_is_one_line(folder: Path) -> None:
    image = np.zeros((1, 17000, 3), np.uint8)
    with pytest.raises(OSError, match=r'^x\.webp cannot be written: its format takes no 17000x1 pixels\. Give --no'):
        _encode(image, Path('x.webp'))


def test_drawing_takes_boxes_on_the_rim_and_any_name() -> None:
    image = np.zeros((50, 60, 3), np.uint8)
    boxes = np.array([[0, 0, 60, 50], [59, 49, 60, 50], [10, 10, 10.2, 40]], np.float32)
    drawn = draw_detections(image, boxes, np.array([0, 1, 2]), ['a', 'Straße 0.50', 'x' * 99])
    assert drawn.shape == image.shape
    assert tuple(drawn[49, 0, ::-1]) == label_colour(0)
    assert not image.any()
    assert not draw_detections(image, np.zeros((0, 4)), np.zeros(0, int), []).any()
    assert len({label_colour(label) for label in range(80)}) == 80


def write_and_raise(kind: type[BaseException], out: Path, frames: list) -> None:
    """Write some frames, then fail."""
    with suppress(kind), OutputFolder(out, ['small', 'large'], True, FORMATS) as output:
        for frame, found in frames:
            output.add(frame, found)
        raise kind


def test_an_error_leaves_no_incomplete_file(folder: Path) -> None:
    frames = list(Detector(SquareDetector()).run(find_sources(['in/v.avi', 'in/a.png']), pytest.fail))
    write_and_raise(RuntimeError, folder / 'out', frames[:2])
    assert names(folder / 'out') == ['labels/v/000000.txt', 'labels/v/000001.txt']
    write_and_raise(RuntimeError, folder / 'other', [])
    assert not (folder / 'other').exists()


def test_ctrl_c_keeps_what_was_read(folder: Path) -> None:
    frames = list(Detector(SquareDetector()).run(find_sources('in/v.avi'), pytest.fail))
    write_and_raise(KeyboardInterrupt, folder / 'out', frames[:1])
    assert names(folder / 'out') == [
        'classes.txt',
        'labels/v/000000.txt',
        'predictions.csv',
        'predictions.json',
        'v.mp4',
    ]
    assert len(read_coco_file('out/predictions.json').images) == 1


def request(folder: Path, *sources: str, **more: object) -> Request:
    """For the tiny detector, with all formats."""
    options = dict(
        model=str(folder / 'tiny.py'),
        weights=str(folder / 'tiny.pth'),
        sources=sources,
        out=folder / 'out',
        formats=FORMATS,
        device='cpu',
        score_thr=0.0,
    )
    return Request(**(options | more))


@pytest.fixture
def squares(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """The command with the detector of squares in place of a DINO."""
    monkeypatch.setattr(command, 'get_model', lambda *args, **kwargs: SquareDetector())
    (folder / 'tiny.py').touch()
    return folder


def test_what_cannot_be_read_does_not_stop_the_rest(squares: Path, capsys: pytest.CaptureFixture) -> None:
    Path('in/bad.png').write_bytes(b'no picture')
    video = cut(write_video(squares / 'long.avi', 40))
    status = predict_to_folder(request(squares, 'in', str(video), batch_size=4))
    done = capsys.readouterr()
    assert status == 1
    errors = done.err.splitlines()
    assert errors[0].startswith('error: Cannot read the picture in/bad.png: ')
    assert errors[1].startswith(f'error: {video}: the video ends after ')
    read = int(errors[1].split(' ends after ')[1].split()[0])
    assert len(errors) == 2
    images = read_coco_file('out/predictions.json').images
    assert len(images) == 2 + 3 + read
    assert done.out.startswith(f'{2 + 3 + read} pictures, ')
    assert sum(1 for _ in read_video('out/cut_long.mp4')) == read


def read_video(path: str) -> list[NDArray]:
    return [frame.image for frame, _ in Detector(SquareDetector()).run(find_sources(path), pytest.fail)]


@pytest.mark.parametrize(
    ('more', 'said'),
    [
        (
            dict(model='dino_r50_4scal_12ep'),
            "dino_mm ships no config 'dino_r50_4scal_12ep'. Near to it: dino_r50_4scale_12ep, ",
        ),
        (dict(sources=['nothing.png']), 'There is no file or folder nothing.png.'),
        (dict(sources=['in/empty']), 'The folder in/empty holds no picture or video; '),
        (dict(classes=['smal']), "The model has no class 'smal'; did you mean small?"),
        (dict(out=Path('in')), 'in/a.png would be overwritten by an annotated copy. Name another folder than in.'),
        (dict(out=Path('in/a.png/x')), 'in/a.png/x cannot be written into (Not a directory). Name another folder.'),
        (dict(device='cuda:99'), '--device cuda:99: '),
        (dict(device='gpu'), '--device gpu: '),
        (dict(score_thr=2.0), 'The score threshold is 2.0; it can be from 0 to 1.'),
    ],
)
def test_what_cannot_be_done_is_one_line_before_the_work(more: dict, said: str, squares: Path) -> None:
    Path('in/empty').mkdir()
    before = names(squares)
    with pytest.raises(UsageError) as caught:
        predict_to_folder(request(squares, **(dict(sources=['in']) | more)))
    assert str(caught.value).startswith(said)
    assert len(str(caught.value).splitlines()) == 1
    assert names(squares) == before
    assert not Path('out').exists()


def test_no_result_takes_the_place_of_another_source(squares: Path) -> None:
    Path('both').mkdir()
    write_video(squares / 'both/x.avi', 2)
    write_video(squares / 'both/x.mp4', 2, 'mp4v')
    with pytest.raises(UsageError, match=r'^both/x\.mp4 would be overwritten by an annotated copy\.'):
        predict_to_folder(request(squares, 'both', out=Path('both')))
    assert predict_to_folder(request(squares, 'both')) == 0
    assert {'x.mp4', 'x.mp4.mp4', 'labels/x/000001.txt', 'labels/x.mp4/000001.txt'} <= set(names(squares / 'out'))


@pytest.mark.skipif(os.name == 'nt' or os.geteuid() == 0, reason='may write everywhere')
def test_a_folder_that_is_not_ours(squares: Path) -> None:
    Path('locked').mkdir(mode=0o500)
    with pytest.raises(UsageError, match='locked/x cannot be written into'):
        predict_to_folder(request(squares, 'in', out=Path('locked/x')))


def test_nothing_readable_leaves_nothing(squares: Path, capsys: pytest.CaptureFixture) -> None:
    Path('bad.png').write_bytes(b'no picture')
    with pytest.raises(UsageError, match=r'^Nothing could be read, so nothing is written\.$'):
        predict_to_folder(request(squares, 'bad.png'))
    assert 'Cannot read the picture bad.png' in capsys.readouterr().err
    assert not Path('out').exists()


def test_ctrl_c_ends_the_command(squares: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    detect = SquareDetector.test_step

    def interrupted(self: SquareDetector, data: dict) -> list:
        if len(self.batches) == 2:
            raise KeyboardInterrupt
        return detect(self, data)

    monkeypatch.setattr(SquareDetector, 'test_step', interrupted)
    assert predict_to_folder(request(squares, 'in/v.avi')) == 130
    assert capsys.readouterr().out.startswith('2 pictures, 2 objects (2 small) in ')
    assert len(read_coco_file('out/predictions.json').images) == 2


def test_only_what_was_asked_for(squares: Path, capsys: pytest.CaptureFixture) -> None:
    assert predict_to_folder(request(squares, 'in/sub', pictures=False, formats=['csv'])) == 0
    assert capsys.readouterr().out.startswith('1 picture, 1 object (1 small) in ')
    assert names(squares / 'out') == ['predictions.csv']


def test_by_the_command_line(folder: Path) -> None:
    """The tool with a DINO, and without sahi."""
    config, weights = write_tiny(folder)
    tool = Path(__file__).parents[2] / 'tools' / 'predict.py'
    arguments = (config, 'in', '--weights', weights, '--out', 'out', '--score-thr', '0', '--device', 'cpu')
    done = run_tool(tool, *arguments, '--save', 'coco', '--classes', 'car', 'bus', '--batch-size', '2', cwd=folder)
    assert done.stdout.splitlines()[-1].startswith('5 pictures, ')
    file = json.loads((folder / 'out/predictions.json').read_text())
    assert {annotation['category_id'] for annotation in file['annotations']} <= {2, 5}
    (expected,) = dino_mm.predict(tiny_model(folder), 'in/a.png', score_thr=0.0, classes=['car', 'bus'])
    own = [annotation for annotation in file['annotations'] if annotation['image_id'] == 1]
    np.testing.assert_allclose([a['score'] for a in own], expected.scores, atol=1e-5)
    assert [CLASSES[a['category_id'] - 1] for a in own] == expected.names

    done = python(tool, *arguments, '--tiles', '64', cwd=folder, status=1, **without(folder, 'sahi'))
    assert done.stderr.splitlines() == [
        "error: Tiles need sahi, which cannot be imported (No module named 'sahi'). "
        "Install it with `pip install 'sahi>=0.12.8'`."
    ]


def test_frames_of_several_sizes_in_one_video(folder: Path) -> None:
    """Streams may change; the video keeps the size of its first frame."""
    source = Source('x.mp4', 'x.mp4', 'x', 'video')
    none = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    with OutputFolder(folder / 'out', ['small'], True, []) as output:
        for number, (width, height) in enumerate([(64, 48), (32, 48), (64, 48)]):
            output.add(Frame(source, picture_of([], width, height), number, 10.0), none)
    assert [image.shape for image in read_video('out/x.mp4')] == [(48, 64, 3)] * 3
