"""Detectors as files for other runtimes."""

from .errors import ExportError
from .exporting import export_detector

__all__ = ['ExportError', 'export_detector']
