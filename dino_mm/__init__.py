"""DINO for MMDetection 3.x as registered modules and mmengine configs, numerically equal to detrex's."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

from . import standin, threads
from .compat import check_versions
from .shipped import UnknownConfigError, cfg
from .version import __version__
from .zoo import get_config, get_model, list_models

if TYPE_CHECKING:
    from .checkpoints.errors import CheckpointError
    from .datasets import CheckedCocoDataset, LoadImageFromFile, ResizeShortestEdge
    from .engine import (
        CheckpointHook,
        CheckRunHook,
        CompileHook,
        DetVisualizationHook,
        EpochBasedTrainLoop,
        HeartbeatHook,
        IterBasedTrainLoop,
        LoadCheckpointHook,
        LoggerHook,
        ParamGroupConstructor,
        PreemptionHook,
        ReportHook,
        RuntimeInfoHook,
        SkipNotFiniteHook,
        compile_detector,
    )
    from .evaluation import CheckedCocoMetric
    from .export import ExportError, export_detector
    from .inference import Prediction, SourceError, predict
    from .models import (
        DINO,
        CDNGenerator,
        DINODecoder,
        DINOEncoder,
        DINOHead,
        FocalLoss,
        HungarianMatcher,
        InternImage,
        LearnedQueries,
        MixedQuerySelector,
        NormalizedGIoULoss,
        PadToBuckets,
        PureQuerySelector,
        SetCriterion,
        SimpleFeaturePyramid,
        SwinTransformer,
        TIMMBackbone,
        ViTDet,
    )

__all__ = [
    'DINO',
    'CDNGenerator',
    'CheckRunHook',
    'CheckedCocoDataset',
    'CheckedCocoMetric',
    'CheckpointError',
    'CheckpointHook',
    'CompileHook',
    'DINODecoder',
    'DINOEncoder',
    'DINOHead',
    'DetVisualizationHook',
    'EpochBasedTrainLoop',
    'ExportError',
    'FocalLoss',
    'HeartbeatHook',
    'HungarianMatcher',
    'InternImage',
    'IterBasedTrainLoop',
    'LearnedQueries',
    'LoadCheckpointHook',
    'LoadImageFromFile',
    'LoggerHook',
    'MixedQuerySelector',
    'NormalizedGIoULoss',
    'PadToBuckets',
    'ParamGroupConstructor',
    'Prediction',
    'PreemptionHook',
    'PureQuerySelector',
    'ReportHook',
    'ResizeShortestEdge',
    'RuntimeInfoHook',
    'SetCriterion',
    'SimpleFeaturePyramid',
    'SkipNotFiniteHook',
    'SourceError',
    'SwinTransformer',
    'TIMMBackbone',
    'UnknownConfigError',
    'ViTDet',
    '__version__',
    'cfg',
    'compile_detector',
    'export_detector',
    'get_config',
    'get_model',
    'list_models',
    'predict',
]
#: Where the classes are; none of these is imported before one of its classes is asked for.
_ROOMS = ('models', 'engine', 'datasets', 'evaluation', 'inference', 'checkpoints.errors', 'export')


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """A class of :data:`__all__`, imported now."""
        if name in __all__:
            for room in _ROOMS:
                found = getattr(importlib.import_module(f'.{room}', __name__), name, None)
                if found is not None:
                    globals()[name] = found
                    return found
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def _starts_a_command() -> bool:
    """Whether this is ``dino-mm``, ``python -m dino_mm`` or ``python -m dino_mm.env``.

    The first two begin without torch, and check before they need it. The last reports what is wrong where imports fail.
    """
    program = sys.argv[0] if sys.argv else ''
    if program == '-m':  # so it is called while Python looks for the module
        return not {'dino_mm', 'dino_mm.env'}.isdisjoint(getattr(sys, 'orig_argv', ()))
    return os.path.splitext(os.path.basename(program))[0] == 'dino-mm'


standin.install()
threads.bound_spinning()
if not _starts_a_command():
    check_versions()

    from .checkpoints.files import register_formats
    from .checkpoints.runner_types import allow_mmengine_checkpoints

    allow_mmengine_checkpoints()
    register_formats()
