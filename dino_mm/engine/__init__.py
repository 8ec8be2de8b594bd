"""What the command-line tools share, optimizer groups, and loading through the runner."""

from .load_checkpoint_hook import LoadCheckpointHook
from .param_groups import ParamGroupConstructor

__all__ = ['LoadCheckpointHook', 'ParamGroupConstructor']
