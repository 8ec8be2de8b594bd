"""What the command-line tools share: compilation, optimizer groups, loading by the runner, loops that resume."""

from .check_hook import CheckRunHook
from .checkpoint_hook import CheckpointHook
from .compilation import CompileHook, compile_detector
from .load_checkpoint_hook import LoadCheckpointHook
from .logger_hook import LoggerHook
from .loops import EpochBasedTrainLoop, IterBasedTrainLoop
from .param_groups import ParamGroupConstructor
from .report_hook import ReportHook
from .visualization_hook import DetVisualizationHook

__all__ = [
    'CheckRunHook',
    'CheckpointHook',
    'CompileHook',
    'DetVisualizationHook',
    'EpochBasedTrainLoop',
    'IterBasedTrainLoop',
    'LoadCheckpointHook',
    'LoggerHook',
    'ParamGroupConstructor',
    'ReportHook',
    'compile_detector',
]
