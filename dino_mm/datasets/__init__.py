"""Data sets and transforms; importing this package registers them."""

from .coco import CheckedCocoDataset
from .loading import LoadImageFromFile
from .transforms import ResizeShortestEdge

__all__ = ['CheckedCocoDataset', 'LoadImageFromFile', 'ResizeShortestEdge']
