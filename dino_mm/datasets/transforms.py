"""Transforms in which detrex's input differs from mmdet's."""

from mmdet.datasets.transforms import Resize

from dino_mm.registry import TRANSFORMS


@TRANSFORMS.register_module()
class ResizeShortestEdge(Resize):
    """Resize to a shorter edge, unless the longer would pass a limit; detectron2's rounding.

    mmcv rounds once, from a single factor, and differs by a pixel for some sizes.

    Args:
        scale: (shorter edge, limit of the longer edge), pixels.
        backend: 'pillow' filters when it shrinks, as detrex does; 'cv2' is faster and does not.
        interpolation: Interpolation method.
    """

    def __init__(self, scale: tuple[int, int], backend: str = 'pillow', interpolation: str = 'bilinear') -> None:
        super().__init__(scale=scale, keep_ratio=False, backend=backend, interpolation=interpolation)

    def _resize_img(self, results: dict) -> None:
        height, width = results['img'].shape[:2]
        results['scale'] = shortest_edge_size(height, width, *results['scale'])
        super()._resize_img(results)


def shortest_edge_size(height: int, width: int, shorter: int, limit: int) -> tuple[int, int]:
    """Size (width, height) with the given ``shorter`` edge, or with the longer edge ``limit`` if that is smaller."""
    scale = shorter / min(height, width)
    new_height, new_width = scale * height, scale * width
    if height < width:
        new_height = float(shorter)
    else:
        new_width = float(shorter)
    if max(new_height, new_width) > limit:
        scale = limit / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return int(new_width + 0.5), int(new_height + 0.5)
