"""Data sets and transforms; importing this package registers them."""

from .coco import CheckedCocoDataset
from .transforms import ResizeShortestEdge

__all__ = ['CheckedCocoDataset', 'ResizeShortestEdge']
