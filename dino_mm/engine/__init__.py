"""What the command-line tools share, optimizer groups, loading through the runner, and loops that resume exactly."""

from .check_hook import CheckRunHook
from .load_checkpoint_hook import LoadCheckpointHook
from .loops import EpochBasedTrainLoop, IterBasedTrainLoop
from .param_groups import ParamGroupConstructor
from .visualization_hook import DetVisualizationHook

__all__ = [
    'CheckRunHook',
    'DetVisualizationHook',
    'EpochBasedTrainLoop',
    'IterBasedTrainLoop',
    'LoadCheckpointHook',
    'ParamGroupConstructor',
]
