"""Metrics; importing this package registers them."""

from .coco_metric import CheckedCocoMetric

__all__ = ['CheckedCocoMetric']
