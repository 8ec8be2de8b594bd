"""Real or drawn pictures, at the sizes at which an export is checked."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mmdet.structures import DetDataSample
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from ..datasets.loading import UnreadableImageError, UnsupportedImageError, decode
from ..models.detectors.dino import DINO
from .errors import ExportError

ENDINGS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff')


def read_pictures(folder: Path | None, count: int) -> list[NDArray[np.uint8]]:
    """Pictures, BGR, shape (height, width, 3): the first ``count`` of a folder, or drawn ones.

    Raises:
        ExportError: The folder has no picture that can be read.
    """
    if folder is None:
        return [_draw(seed) for seed in range(count)]
    if not folder.is_dir():
        raise ExportError(f'--images {folder} is no folder: name one with pictures, or leave --images out.')
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)[:count]
    if not paths:
        raise ExportError(f'--images {folder} has no picture ({", ".join(ENDINGS)}): name another folder.')
    try:
        pictures = [decode(path.read_bytes(), 'pillow', str(path)) for path in paths]
    except (UnreadableImageError, UnsupportedImageError) as error:
        raise ExportError(str(error)) from None
    return [pictures[i % len(pictures)] for i in range(count)]


def make_batch(
    model: DINO, pictures: Sequence[NDArray[np.uint8]], size: tuple[int, int], bs: int
) -> tuple[Tensor, list[DetDataSample]]:
    """A batch of the model's inputs, (bs, 3, height, width), and its data samples.

    The first picture has ``size`` (height, width); the others are smaller, so that the batch has padding.
    """
    inputs, samples = [], []
    for i, picture in enumerate(pictures[:bs]):
        height, width = (max(side * (8 - i) // 8, 1) for side in size)
        resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)
        inputs.append(torch.from_numpy(np.array(resized)).permute(2, 0, 1))
        meta = dict(img_id=i, img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0))
        samples.append(DetDataSample(metainfo=meta))
    data = model.data_preprocessor(dict(inputs=inputs, data_samples=samples), False)
    return data['inputs'], data['data_samples']


def sizes_of(samples: Sequence[DetDataSample]) -> Tensor:
    """(bs, 2) int64, (height, width) of the images without padding."""
    return torch.tensor([sample.img_shape[:2] for sample in samples])


def _draw(seed: int) -> NDArray[np.uint8]:
    """Coloured shapes on a gradient, 480 x 640 pixels, with noise."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(rng.uniform(0, 200, 3), rng.uniform(50, 255, 3), 640)
    image = Image.fromarray(np.broadcast_to(ramp, (480, 640, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(16):
        left, top = rng.integers((600, 440))
        box = [int(side) for side in (left, top, left + rng.integers(20, 240), top + rng.integers(20, 240))]
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape(box, fill=tuple(int(channel) for channel in rng.integers(0, 256, 3)))
    noise = rng.normal(0, 6, (480, 640, 3))
    return np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
