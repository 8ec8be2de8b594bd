"""Pictures of a test: where they go, and that they show something whatever their depth."""

import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from mmdet.structures import DetDataSample
from mmengine.dataset import ConcatDataset, RepeatDataset
from mmengine.structures import InstanceData
from mmengine.visualization import Visualizer as MMEngineVisualizer

from dino_mm.datasets import CheckedCocoDataset
from dino_mm.engine import DetVisualizationHook
from dino_mm.engine.visualization_hook import image_prefixes, picture_root, place_of
from dino_mm.registry import HOOKS


@pytest.fixture(autouse=True)
def _visualizer() -> None:
    """Hooks ask for one."""
    MMEngineVisualizer.get_instance('of the tests')


def write(path: Path, dtype: type = np.uint8) -> Path:
    """A grey ramp over all values of the type."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, np.iinfo(dtype).max, 64, dtype=np.float64).astype(dtype)
    assert cv2.imwrite(str(path), np.repeat(ramp[None], 32, 0))
    return path


def dataset(root: Path, prefix: str, names: list[str]) -> CheckedCocoDataset:
    """A data set of pictures without objects, read only as far as the hook needs."""
    images = [dict(id=i, file_name=name, width=64, height=32) for i, name in enumerate(names)]
    content = dict(images=images, annotations=[], categories=[dict(id=1, name='thing')])
    (root / f'{prefix}.json').write_text(json.dumps(content))
    return CheckedCocoDataset(
        data_root=str(root),
        ann_file=f'{prefix}.json',
        data_prefix=dict(img=prefix),
        metainfo=dict(classes=('thing',)),
        test_mode=True,
        lazy_init=True,
        pipeline=[],
    )


class Visualizer:
    """Keeps what it is told to draw."""

    def __init__(self) -> None:
        self.drawn: list[tuple[str | None, np.ndarray]] = []

    def add_datasample(self, name: str, image: np.ndarray, *, out_file: str | None, **_: object) -> None:
        self.drawn.append((out_file, image))


def draw(paths: list[Path | str], data: object, out: str | None) -> Visualizer:
    """Run a test's hook over pictures, two in a batch."""
    hook = HOOKS.build(dict(type='dino_mm.DetVisualizationHook', draw=True, test_out_dir=out))
    hook._visualizer = Visualizer()
    runner = SimpleNamespace(test_dataloader=SimpleNamespace(dataset=data), work_dir='elsewhere', timestamp='now')
    hook.before_test(runner)
    samples = [DetDataSample(metainfo=dict(img_path=str(p)), pred_instances=InstanceData()) for p in paths]
    for start in range(0, len(samples), 2):
        hook.after_test_iter(runner, start, {}, samples[start : start + 2])
    return hook._visualizer


def test_pictures_keep_their_sub_folders_in_the_named_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ['1.png', 'a/1.png', 'b/1.png', 'a/b/1.png']
    paths = [write(tmp_path / 'data' / 'val' / name) for name in names]
    drawn = draw(paths, dataset(tmp_path / 'data', 'val', names), 'shown').drawn
    assert [out for out, _ in drawn] == [f'shown/{name}' for name in names]
    assert all(Path(out).parent.is_dir() for out, _ in drawn)


def test_data_sets_in_wrappers_share_their_common_folder(tmp_path: Path) -> None:
    paths = [write(tmp_path / name / '1.png') for name in ('x', 'y', 'z')]
    x, y = (dataset(tmp_path, name, ['1.png']) for name in 'xy')
    both = ConcatDataset([x, y], lazy_init=True)
    assert image_prefixes(both) == {str(tmp_path / 'x'), str(tmp_path / 'y')}
    assert image_prefixes(RepeatDataset(x, times=2, lazy_init=True)) == {str(tmp_path / 'x')}
    drawn = draw(paths, both, str(tmp_path / 'shown')).drawn
    assert [Path(out).relative_to(tmp_path / 'shown').as_posix() for out, _ in drawn] == [
        'x/1.png',
        'y/1.png',
        'z/1.png',
    ]


@pytest.mark.parametrize(
    ('path', 'prefixes', 'place'),
    [
        ('/d/val/1.png', ['/d/val/'], '1.png'),
        ('/d/val/a/1.png', ['/d/val'], 'a/1.png'),
        ('/d/val/../other/1.png', ['/d/val'], 'elsewhere/d/other/1.png'),
        ('/d/valid/1.png', ['/d/val'], 'elsewhere/d/valid/1.png'),
        ('/e/1.png', ['/d/val'], 'elsewhere/e/1.png'),
        ('/d/val/1.png', [], 'elsewhere/d/val/1.png'),
        ('/d/val/1.png', ['/d/val', '/e/val'], 'd/val/1.png'),
        ('s3://bucket/val/a/1.png', ['s3://bucket/val/'], 'a/1.png'),
        ('/d/val/1.xyz', ['/d/val'], '1.xyz.png'),
    ],
)
def test_places(path: str, prefixes: list[str], place: str) -> None:
    assert place_of(path, picture_root(prefixes)).as_posix() == place


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_pictures_of_any_depth_show_something(tmp_path: Path, dtype: type) -> None:
    path = write(tmp_path / 'val' / '1.png', dtype)
    data = dataset(tmp_path, 'val', ['1.png'])
    ((_, image),) = draw([path], data, None).drawn
    assert image.dtype == np.uint8
    assert image.shape == (32, 64, 3)
    assert (image[0, 0, 0], image[0, -1, 0]) == (0, 255)

    hook = DetVisualizationHook(draw=True, interval=3)
    hook._visualizer = Visualizer()
    for step in range(6):
        hook.after_val_iter(SimpleNamespace(iter=10), step, {}, [DetDataSample(metainfo=dict(img_path=str(path)))])
    assert [out for out, _ in hook._visualizer.drawn] == [None, None]  # iterations 12 and 15
    assert image.tobytes() == hook._visualizer.drawn[0][1].tobytes()


def test_nothing_is_drawn_unless_asked(tmp_path: Path) -> None:
    hook = DetVisualizationHook(test_out_dir=str(tmp_path / 'shown'))
    hook.before_test(SimpleNamespace())
    hook.after_test_iter(SimpleNamespace(), 0, {}, [DetDataSample(metainfo=dict(img_path='none.png'))])
    assert not (tmp_path / 'shown').exists()
