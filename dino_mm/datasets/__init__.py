"""Data sets and transforms; importing this package registers them."""

from .coco import CheckedCocoDataset
from .transforms import LoadReadableImage, ResizeShortestEdge

__all__ = ['CheckedCocoDataset', 'LoadReadableImage', 'ResizeShortestEdge']
