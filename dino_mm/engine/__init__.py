"""What the command-line tools share: compilation, optimizer groups, loading by the runner, loops that resume."""

from .check_hook import CheckRunHook
from .checkpoint_hook import CheckpointHook
from .compilation import CompileHook, compile_detector
from .heartbeat_hook import HeartbeatHook
from .load_checkpoint_hook import LoadCheckpointHook
from .logger_hook import LoggerHook
from .loops import EpochBasedTrainLoop, IterBasedTrainLoop
from .param_groups import ParamGroupConstructor
from .preemption_hook import PreemptionHook
from .report_hook import ReportHook
from .runtime_info_hook import RuntimeInfoHook
from .skip_not_finite_hook import SkipNotFiniteHook
from .visualization_hook import DetVisualizationHook

__all__ = [
    'CheckRunHook',
    'CheckpointHook',
    'CompileHook',
    'DetVisualizationHook',
    'EpochBasedTrainLoop',
    'HeartbeatHook',
    'IterBasedTrainLoop',
    'LoadCheckpointHook',
    'LoggerHook',
    'ParamGroupConstructor',
    'PreemptionHook',
    'ReportHook',
    'RuntimeInfoHook',
    'SkipNotFiniteHook',
    'compile_detector',
]
