"""Detectors for tests of prediction: a tiny DINO, and one whose answers can be counted by hand."""

from pathlib import Path

import cv2
import numpy as np
import torch
from conftest import tiny_model_cfg
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.structures import InstanceData
from numpy.typing import NDArray

import dino_mm
from dino_mm.models import DINO

CLASSES = ('person', 'car', 'dog', 'cat', 'bus')
LOAD = dict(type='LoadImageFromFile', _scope_='dino_mm', imdecode_backend='cv2')
PACK = dict(type='PackDetInputs', meta_keys=('img_id', 'ori_shape', 'img_shape'))


def write_tiny(folder: Path) -> tuple[Path, Path]:
    """Config and checkpoint of a tiny DINO with ``CLASSES``, whose boxes and classes differ from query to query."""
    config = dino_mm.get_config('dino_digits')
    config.model = tiny_model_cfg()
    path, weights = folder / 'tiny.py', folder / 'tiny.pth'
    config.dump(path)
    torch.manual_seed(0)
    model = dino_mm.get_model(path, device='cpu')
    for parameter in model.bbox_head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=CLASSES))), weights)
    return path, weights


def tiny_model(folder: Path) -> DINO:
    """That detector."""
    config, weights = write_tiny(folder)
    return dino_mm.get_model(config, weights, device='cpu')


class SquareDetector(BaseModel):
    """Finds the connected regions of bright pixels: label 0 for those of at most 100 pixels, 1 for larger ones.

    The score is 0.9 for small ones, and from 0.51 to 0.8 for large ones, by size. It notes the size of each batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.cfg = Config(dict(default_scope='mmdet', test_dataloader=dict(dataset=dict(pipeline=[LOAD, PACK]))))
        self.dataset_meta = dict(classes=('small', 'large'))
        self.batches: list[int] = []

    def forward(self, *args, **kwargs) -> None:
        raise NotImplementedError

    def test_step(self, data: dict) -> list[DetDataSample]:
        self.batches.append(len(data['inputs']))
        return [self._detect(image.numpy()) for image in data['inputs']]

    def _detect(self, image: NDArray) -> DetDataSample:
        count, _, stats, _ = cv2.connectedComponentsWithStats((image[0] > 200).astype(np.uint8))
        boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h, _ in stats[1:].tolist()]).float().reshape(-1, 4)
        areas = torch.tensor(stats[1:, 4])
        scores = torch.where(areas > 100, (0.5 + areas / 10000).clamp(max=0.8), 0.9)
        found = InstanceData(bboxes=boxes, scores=scores, labels=(areas > 100).long())
        assert len(found) == count - 1
        return DetDataSample(pred_instances=found)


def picture_of(boxes: list[tuple[int, int, int, int]], width: int = 96, height: int = 64) -> NDArray[np.uint8]:
    """A black picture with white rectangles, xyxy."""
    image = np.zeros((height, width, 3), np.uint8)
    for left, top, right, bottom in boxes:
        image[top:bottom, left:right] = 255
    return image


def write_video(path: Path, frames: int, code: str = 'MJPG', fps: float = 10.0) -> Path:
    """A video with a white square of 8 pixels that moves by one pixel a frame, 96 x 64."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), fps, (96, 64))
    assert writer.isOpened()
    for i in range(frames):
        writer.write(picture_of([(i % 80, 20, i % 80 + 8, 28)]))
    writer.release()
    return path


def cut(path: Path, part: float = 0.5) -> Path:
    """A copy that ends early."""
    content = path.read_bytes()
    copy = path.with_name(f'cut_{path.name}')
    copy.write_bytes(content[: int(len(content) * part)])
    return copy
