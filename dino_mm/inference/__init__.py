"""Detections of pictures and videos, in memory and as files."""

from .prediction import Prediction, predict
from .sources import SourceError

__all__ = ['Prediction', 'SourceError', 'predict']
