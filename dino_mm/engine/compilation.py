"""The detector compiled part by part."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from dino_mm.registry import HOOKS

from ..models.detectors.dino import DINO
from ..ops.tracing import IS_TORCH_2_7

#: Names of a backbone's parts that are compiled: attention in windows and networks of a Swin, whose stages torch works
#: on for minutes where sizes are symbols; stages of ResNet, timm, InternImage; blocks of a plain transformer.
PARTS = (r'\.(w_msa|ffn)$', r'(^|\.)(layer|(stages|layers|blocks)\.)\d+$')
#: Graphs of one function beyond which torch runs it as ever.
RECOMPILE_LIMIT = 64


def compile_detector(model: DINO, cuda_graphs: bool = False, **options: Any) -> None:
    """Compile a detector in place, part by part; what it computes, and the names of its parameters, stay.

    The parts are the stages of the backbone and the layers of encoder and decoder, so that layers of one kind share
    their code; all else runs as ever. They are compiled when they are first called, for images of all sizes.

    Args:
        model: The detector.
        cuda_graphs: For tests on a GPU: backbone, neck, encoder, query selection, decoder and head are compiled as
            wholes, for each size of batches anew, and replayed as CUDA graphs.
        options: Those of ``torch.compile``, such as ``backend``; ``dynamic`` is True but for ``cuda_graphs``.

    Raises:
        RuntimeError: torch is too old.
    """
    if not IS_TORCH_2_7:
        raise RuntimeError(f'To compile a detector takes torch 2.7 or newer, not {torch.__version__}.')
    # torch counts all stages as one function, and there are graphs for training and tests, with and without padding.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    if cuda_graphs:
        options = dict(mode='reduce-overhead', dynamic=False) | options
        # The decoder calls the head's branches too, so their weights are for its graph to cast.
        parts = [model.backbone, model.neck, model.encoder, model.query_selector, model.decoder, model.bbox_head]
        _begin_steps(model)
    else:
        options = dict(dynamic=True) | options
        parts = [*backbone_parts(model.backbone), *model.encoder.layers, *model.decoder.layers]
    for part in parts:
        part.compile(**options)


def backbone_parts(backbone: nn.Module) -> Iterator[nn.Module]:
    """See ``PARTS``: outermost ones only; the backbone itself if none has a name that is known."""
    of_patterns = ([name for name, _ in backbone.named_modules() if re.search(part, name)] for part in PARTS)
    names = next(filter(None, of_patterns), [''])
    return (backbone.get_submodule(name) for name in names if not any(name.startswith(f'{other}.') for other in names))


def _begin_steps(model: DINO) -> None:
    """Have each detection tell torch that the graphs' outputs of the one before may be overwritten."""
    extract_feat = model.extract_feat

    def beginning(batch_inputs: Tensor) -> tuple[Tensor, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        return extract_feat(batch_inputs)

    model.extract_feat = beginning  # type: ignore[method-assign]


@HOOKS.register_module()
class CompileHook(Hook):
    """Compiles the detector before a run; ``--compile`` of our tools is this hook.

    Args:
        cuda_graphs, options: See :func:`compile_detector`.
    """

    def __init__(self, cuda_graphs: bool = False, **options: Any) -> None:
        self.cuda_graphs = cuda_graphs
        self.options = options

    def before_run(self, runner: Runner) -> None:
        """Compile, under whatever wraps the detector."""
        model = next(module for module in runner.model.modules() if isinstance(module, DINO))
        compile_detector(model, self.cuda_graphs, **self.options)

    def before_train(self, runner: Runner) -> None:
        """Refuse to train with CUDA graphs.

        Raises:
            ValueError: ``cuda_graphs`` is set.
        """
        if self.cuda_graphs:
            raise ValueError('`cuda_graphs` of the CompileHook is for tests: leave it out to train.')
