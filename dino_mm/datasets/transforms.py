"""Transforms in which detrex's input differs from mmdet's."""

import numpy as np
from mmcv.image.geometric import pillow_interp_codes
from mmdet.datasets.transforms import Resize
from numpy.typing import NDArray
from PIL import Image

from dino_mm.registry import TRANSFORMS


@TRANSFORMS.register_module(name=['ResizeShortestEdge', 'Resize'])
class ResizeShortestEdge(Resize):
    """Resize to a shorter edge, unless the longer would pass a limit; detectron2's rounding.

    mmcv rounds once, from a single factor, and differs by a pixel for some sizes. In this scope ``Resize`` is a second
    name of it: libraries that set the input size, such as sahi, look for a transform of just that type.

    Args:
        scale: (shorter edge, limit of the longer edge), pixels.
        backend: 'pillow' filters when it shrinks, as detrex does; 'cv2' is faster and does not.
        interpolation: Interpolation method.

    Under both backends, uint8 stays uint8, and float32 (after ``to_float32`` or ``PhotoMetricDistortion``) stays
    float32. Images of other types become float32 under 'pillow'.
    """

    def __init__(self, scale: tuple[int, int], backend: str = 'pillow', interpolation: str = 'bilinear') -> None:
        super().__init__(scale=scale, keep_ratio=False, backend=backend, interpolation=interpolation)

    def _resize_img(self, results: dict) -> None:
        image = results['img']
        height, width = image.shape[:2]
        results['scale'] = shortest_edge_size(height, width, *results['scale'])
        if self.backend != 'pillow' or image.dtype == np.uint8:
            super()._resize_img(results)
            return
        new_width, new_height = results['scale']
        results['img'] = resize_float(image, results['scale'], pillow_interp_codes[self.interpolation])
        results['img_shape'] = (new_height, new_width)
        results['scale_factor'] = (new_width / width, new_height / height)
        results['keep_ratio'] = self.keep_ratio


def resize_float(image: NDArray, size: tuple[int, int], resample: Image.Resampling) -> NDArray[np.float32]:
    """Resize an image, shape (height, width) or (height, width, channels), to ``size`` (width, height) with Pillow.

    mmcv has no such way: Pillow's images of several channels have 8 bits. Its filters are the same for both.
    """
    planes = np.moveaxis(np.atleast_3d(image), 2, 0).astype(np.float32)
    resized = np.stack([np.asarray(Image.fromarray(plane).resize(size, resample)) for plane in planes], axis=2)
    return resized if image.ndim == 3 else resized[..., 0]


def shortest_edge_size(height: int, width: int, shorter: int, limit: int) -> tuple[int, int]:
    """Size (width, height) with the given ``shorter`` edge, or with the longer edge ``limit`` if that is smaller.

    No edge gets shorter than one pixel.
    """
    scale = shorter / min(height, width)
    new_height, new_width = scale * height, scale * width
    if height < width:
        new_height = float(shorter)
    else:
        new_width = float(shorter)
    if max(new_height, new_width) > limit:
        scale = limit / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return max(1, int(new_width + 0.5)), max(1, int(new_height + 0.5))
