"""What the command-line tools share: compilation, optimizer groups, loading by the runner, loops that resume."""

from .check_hook import CheckRunHook
from .compilation import CompileHook, compile_detector
from .heartbeat_hook import HeartbeatHook
from .load_checkpoint_hook import LoadCheckpointHook
from .loops import EpochBasedTrainLoop, IterBasedTrainLoop
from .param_groups import ParamGroupConstructor
from .preemption_hook import PreemptionHook
from .skip_not_finite_hook import SkipNotFiniteHook
from .visualization_hook import DetVisualizationHook

__all__ = [
    'CheckRunHook',
    'CompileHook',
    'DetVisualizationHook',
    'EpochBasedTrainLoop',
    'HeartbeatHook',
    'IterBasedTrainLoop',
    'LoadCheckpointHook',
    'ParamGroupConstructor',
    'PreemptionHook',
    'SkipNotFiniteHook',
    'compile_detector',
]
