"""Pictures of detections in the folder that was named, one file for each picture of the data set."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
from mmdet.engine.hooks import DetVisualizationHook as MMDetVisualizationHook
from mmdet.structures import DetDataSample
from mmengine import fileio
from mmengine.runner import Runner
from torch.utils.data import Dataset

from dino_mm.registry import HOOKS

from ..datasets.loading import decode
from .check_hook import parts_of

#: Folder of pictures from outside the data sets' folders, below which they keep their whole paths.
ELSEWHERE = 'elsewhere'


@HOOKS.register_module()
class DetVisualizationHook(MMDetVisualizationHook):
    """mmdet's hook of that name, with another place for the pictures of a test, and with pictures of any depth.

    ``test_out_dir`` is the folder itself, relative to the current directory, not to the run's. Below it, pictures keep
    the sub-folders that they have in the data set.

    Arguments are mmdet's.
    """

    _root: Path | None = None

    def before_test(self, runner: Runner) -> None:
        """Find out where the test's pictures lie."""
        self._root = picture_root(image_prefixes(runner.test_dataloader.dataset)) if self.draw else None

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict, outputs: Sequence[DetDataSample]
    ) -> None:
        """Draw the first picture of every ``interval``-th batch."""
        step = runner.iter + batch_idx
        if self.draw and step % self.interval == 0:
            self._draw_sample(outputs[0], 'val_img', step)

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict, outputs: Sequence[DetDataSample]
    ) -> None:
        """Draw every picture."""
        for sample in outputs if self.draw else ():
            self._test_index += 1
            path = None
            if self.test_out_dir is not None:
                path = Path(self.test_out_dir) / place_of(sample.img_path, self._root)
                path.parent.mkdir(parents=True, exist_ok=True)
            self._draw_sample(sample, 'test_img', self._test_index, path)

    def _draw_sample(self, sample: DetDataSample, name: str, step: int, path: Path | None = None) -> None:
        content = fileio.get(sample.img_path, backend_args=self.backend_args)
        self._visualizer.add_datasample(
            os.path.basename(sample.img_path) if self.show else name,
            decode(content, 'cv2', sample.img_path)[..., ::-1],
            data_sample=sample,
            show=self.show,
            wait_time=self.wait_time,
            pred_score_thr=self.score_thr,
            out_file=path and str(path),
            step=step,
        )


def image_prefixes(dataset: Dataset) -> set[str]:
    """The folders of pictures of a data set, and of those that it wraps."""
    prefixes = [(getattr(part, 'data_prefix', None) or {}).get('img') for part in parts_of(dataset)]
    return {prefix for prefix in prefixes if prefix is not None}


def picture_root(prefixes: Iterable[str]) -> Path | None:
    """The folder that all ``prefixes`` are in, or are; None without any."""
    folders = [os.path.abspath(prefix) for prefix in prefixes]
    return Path(os.path.commonpath(folders)) if folders else None


def place_of(img_path: str, root: Path | None) -> Path:
    """Where a picture goes, relative to the folder for all; equal names in different folders stay apart.

    Args:
        img_path: The picture.
        root: The data sets' folder, see :func:`picture_root`.
    """
    path = Path(os.path.abspath(img_path))
    if root is not None and path.is_relative_to(root):
        place = path.relative_to(root)
    else:
        place = Path(ELSEWHERE, *path.parts[1:])
    # What can be read can not always be written.
    return place if cv2.haveImageWriter(place.name) else place.with_name(f'{place.name}.png')
