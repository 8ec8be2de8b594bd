"""What there is to read, and what is said of what cannot be read."""

import os
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import cv2
import numpy as np
import pytest
from detectors import cut, picture_of, write_video
from numpy.typing import NDArray

from dino_mm.datasets import LoadImageFromFile
from dino_mm.inference import SourceError
from dino_mm.inference.sources import Frame, count_frames, find_sources, read_frames


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: two pictures, a video, other files, and a sub-folder with a picture."""
    (tmp_path / 'data' / 'sub').mkdir(parents=True)
    for name in ('data/b.png', 'data/a.JPG', 'data/sub/a.jpg'):
        (tmp_path / name).write_bytes(cv2.imencode('.png', picture_of([]))[1].tobytes())
    (tmp_path / 'data' / 'c.mp4').touch()
    (tmp_path / 'data' / 'notes.txt').touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ('given', 'expected'),
    [
        ('data/b.png', [('data/b.png', 'b.png', 'b', 'picture')]),
        (Path('data/notes.txt'), [('data/notes.txt', 'notes.txt', 'notes.txt', 'picture')]),
        (
            'data',
            [
                ('data/a.JPG', 'a.JPG', 'a', 'picture'),
                ('data/b.png', 'b.png', 'b', 'picture'),
                ('data/c.mp4', 'c.mp4', 'c', 'video'),
            ],
        ),
        (
            'data/**/*.[jJ]*',
            [('data/a.JPG', 'a.JPG', 'a', 'picture'), ('data/sub/a.jpg', 'sub/a.jpg', 'sub/a', 'picture')],
        ),
        (['data/b.png', 'data/../data/b.png'], [('data/b.png', 'b.png', 'b', 'picture')]),
        (
            ['data/sub', 'data/b.png'],
            [('data/sub/a.jpg', 'sub/a.jpg', 'sub/a', 'picture'), ('data/b.png', 'b.png', 'b', 'picture')],
        ),
        ('0', [('0', 'webcam_0', 'webcam_0', 'video')]),
        (1, [('1', 'webcam_1', 'webcam_1', 'video')]),
        ('https://x.org/a/b.png?k=1', [('https://x.org/a/b.png?k=1', 'b.png', 'b', 'picture')]),
        ('https://x.org/a/b.mp4', [('https://x.org/a/b.mp4', 'b.mp4', 'b', 'video')]),
        ('rtsp://camera:554/', [('rtsp://camera:554/', 'camera_554', 'camera_554', 'video')]),
    ],
)
def test_everything_there_is_to_read(given: object, expected: list[tuple], folder: Path) -> None:
    assert [(s.name, s.place, s.stem, s.kind) for s in find_sources(given)] == expected


def test_results_have_places_of_their_own(folder: Path) -> None:
    (folder / 'data' / 'b.jpg').touch()
    given = ['data/b.png', 'data/b.jpg', 'http://x.org/b.png', 'http://y.org/b.png', picture_of([]), picture_of([])]
    found = find_sources(given)
    assert [source.stem for source in found] == ['b', 'b.jpg', 'b.png', 'b-2', 'array_4', 'array_5']
    assert [source.kind for source in found[-2:]] == ['array', 'array']


def test_a_file_whose_name_looks_like_a_pattern_or_a_number(folder: Path) -> None:
    for name in ('a[1].png', '0'):
        Path(name).touch()
        assert [(s.name, s.kind) for s in find_sources(name)] == [(name, 'picture')]


@pytest.mark.parametrize(
    ('given', 'said'),
    [
        ('x.jpg', 'There is no file or folder x.jpg.'),
        ('x*.jpg', 'No picture or video fits x*.jpg; known endings are .bmp, '),
        ('empty', 'The folder empty holds no picture or video; known endings are .bmp, '),
        ('outer', "Its sub-folders are not searched: give 'outer/**/*' for them."),
        ([], 'There is nothing to read: '),
        (np.zeros((4, 4), np.uint8), 'An array of uint8, shape (4, 4), is no picture: '),
        (np.zeros((4, 4, 3)), 'An array of float64, shape (4, 4, 3), is no picture: '),
    ],
)
def test_nothing_to_read_is_one_line(given: object, said: str, folder: Path) -> None:
    Path('empty').mkdir()
    Path('outer/inner').mkdir(parents=True)
    with pytest.raises(SourceError) as caught:
        find_sources(given)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def load(name: str) -> NDArray:
    return cv2.imread(name)[:]  # an error for None


def read(path: Path) -> tuple[list[Frame], list[str]]:
    """The frames and the errors of a source."""
    errors: list[SourceError] = []
    (source,) = find_sources(path)
    return list(read_frames(source, load, errors.append)), [str(error) for error in errors]


@pytest.mark.parametrize(('name', 'code'), [('v.avi', 'MJPG'), ('v.mp4', 'mp4v'), ('v.mkv', 'mp4v')])
def test_frames_of_a_video(name: str, code: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / name, 12, code)
    frames, errors = read(path)
    assert errors == []
    assert [frame.number for frame in frames] == list(range(12))
    assert {frame.fps for frame in frames} == {10.0}
    assert count_frames(find_sources(path)[0]) == 12
    columns = [np.flatnonzero(frame.image[24, :, 0] > 128) for frame in frames]
    assert [(c[0], c[-1]) for c in columns] == [(i, i + 7) for i in range(12)]


@pytest.mark.parametrize(('name', 'code'), [('v.avi', 'MJPG'), ('v.mkv', 'mp4v')])
def test_a_cut_video_gives_what_it_has(name: str, code: str, tmp_path: Path) -> None:
    path = cut(write_video(tmp_path / name, 60, code), 0.6)
    frames, errors = read(path)
    assert 5 < len(frames) < 55
    assert errors == [
        f'{path}: the video ends after {len(frames)} of 60 frames, which are used. '
        'The file is cut or damaged: copy it again.'
    ]


def encode(path: Path, steps: Sequence[int], **options: str) -> Path:
    """A video in H.264 whose frames follow one another after some thirtieths of a second."""
    av = pytest.importorskip('av')
    with av.open(str(path), 'w', options=options) as container:
        stream = container.add_stream('h264', rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 96, 64, 'yuv420p', Fraction(1, 90000)
        noise = np.random.default_rng(0)
        for time in np.cumsum(steps):
            pixels = noise.integers(0, 256, (64, 96, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format='rgb24')
            frame.pts, frame.time_base = int(time) * 3000, stream.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize('name', ['v.mp4', 'v.mkv', 'v.mov', 'v.ts'])
@pytest.mark.parametrize('steps', [[1], [1, 2, 3]], ids=['constant', 'varying'])
def test_a_whole_video_is_not_taken_for_a_cut_one(name: str, steps: list[int], tmp_path: Path) -> None:
    frames, errors = read(encode(tmp_path / name, steps * (60 // len(steps))))
    assert errors == []
    assert len(frames) == 60


def test_a_cut_video_with_its_index_in_front(tmp_path: Path) -> None:
    path = cut(encode(tmp_path / 'v.mp4', [1] * 60, movflags='faststart'))
    frames, errors = read(path)
    assert 15 < len(frames) < 45
    assert [error.startswith(f'{path}: the video ends after {len(frames)} of 60 frames, ') for error in errors] == [
        True
    ]


def test_pictures_and_videos_by_their_address(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / 'a.png'), picture_of([(5, 5, 9, 9)]))
    write_video(tmp_path / 'v.avi', 4)
    handler = partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}'
        sources = find_sources([f'{address}/{name}' for name in ('a.png', 'none.png', 'v.avi', 'none.avi')])
        loader = LoadImageFromFile()
        errors: list[SourceError] = []
        read_all = [
            list(read_frames(source, lambda path: loader(dict(img_path=path))['img'], errors.append))
            for source in sources
        ]
        server.shutdown()
    assert [len(frames) for frames in read_all] == [1, 0, 4, 0]
    np.testing.assert_array_equal(read_all[0][0].image, picture_of([(5, 5, 9, 9)]))
    assert [str(error).partition(':')[0] for error in errors] == [
        'Cannot read the picture http',
        'Cannot open the video http',
    ]
    assert 'HTTP Error 404' in str(errors[0])


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    video = cut(write_video(tmp_path / 'v.mp4', 10, 'mp4v'))  # its index was at the end
    picture = tmp_path / 'x.png'
    picture.write_bytes(b'no picture')
    for path, said in ((video, f'Cannot open the video {video}'), (picture, f'Cannot read the picture {picture}')):
        frames, errors = read(path)
        assert frames == []
        assert [error.startswith(said) for error in errors] == [True]
        assert len(errors[0].splitlines()) == 1


@pytest.mark.skipif(not Path('/proc/self/fd').is_dir(), reason='asks the kernel which files are open')
def test_a_video_is_read_as_frames_are_asked_for(tmp_path: Path) -> None:
    (source,) = find_sources(write_video(tmp_path / 'v.avi', 40))
    frames = read_frames(source, cv2.imread, pytest.fail)
    assert next(frames).number == 0
    open_files = {os.path.realpath(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd')}
    assert str(tmp_path / 'v.avi') in open_files
    frames.close()
    open_files = {os.path.realpath(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd')}
    assert str(tmp_path / 'v.avi') not in open_files
