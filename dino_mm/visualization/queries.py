"""How queries find their objects: reference boxes and sampling points, layer by layer of the decoder."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from mmdet.apis import inference_detector
from torch import Tensor, nn

from dino_mm.models import DINO
from dino_mm.models.layers.attention import DeformableAttention

from .dataset_summary import read_picture

COLOURS = ('#ffd92f', '#66c2a5', '#e78ac3', '#8da0cb', '#fc8d62')
BEFORE, AFTER = 'white', '#ff3030'
PANEL = 2.5
"""Width and height of a panel in inches."""


@dataclass
class DecoderTrace:
    """What the decoder did with the queries of an image; coordinates are in [0, 1] of the image without padding.

    Attributes:
        references: num_layers + 1 boxes (num_queries, 4), cxcywh: the initial ones, then each layer's.
        points: Of each layer (num_queries, num_heads, num_levels, num_points, 2), (x, y) of the sampling points.
        weights: Of each layer (num_queries, num_heads, num_levels, num_points); the sum of each head is 1.
        scores: (num_queries, num_classes) in [0, 1], of the last layer.
    """

    references: list[Tensor] = field(default_factory=list)
    points: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    scores: Tensor = field(default_factory=lambda: torch.zeros(0, 0))


def trace_decoder(model: DINO, image: str | Path) -> DecoderTrace:
    """Detect in an image and keep what the decoder's layers did.

    Args:
        model: A detector in evaluation mode that is not compiled, with its config in ``cfg``, as ``get_model`` gives.
        image: The image file.

    Raises:
        TypeError: ``model`` is no DINO.
    """
    if not isinstance(model, DINO):
        raise TypeError(f'Queries are traced in a DINO, not in a {type(model).__name__}.')
    trace = DecoderTrace()
    last_branch = model.bbox_head.cls_branches[model.decoder.num_layers - 1]

    def keep_references(module: nn.Module, inputs: Any, output: Any) -> None:
        trace.references = [reference[0].float().cpu() for reference in output.references]

    def keep_scores(module: nn.Module, inputs: Any, output: Tensor) -> None:
        trace.scores = output[0].float().sigmoid().cpu()

    with ExitStack() as stack:
        stack.callback(model.decoder.register_forward_hook(keep_references).remove)
        stack.callback(last_branch.register_forward_hook(keep_scores).remove)
        for layer in model.decoder.layers:
            stack.enter_context(_watch(layer.get_submodule('cross_attn'), trace))
        inference_detector(model, str(image))
    return trace


@contextmanager
def _watch(attention: Any, trace: DecoderTrace) -> Iterator[None]:
    """Keep the points and the weights of an attention's calls."""
    attend: DeformableAttention = attention
    original = attend.sampling_locations

    def keep_points(offsets: Tensor, reference: Tensor, levels: Any) -> Tensor:
        locations = original(offsets, reference, levels)
        # Locations are shares of the padded maps; of these, the image takes the valid part.
        trace.points.append((locations / levels.valid_ratios[:, None, None, :, None])[0].float().cpu())
        return locations

    def keep_weights(module: nn.Module, inputs: Any, output: Tensor) -> None:
        weights = output[0].float().unflatten(-1, (attend.num_heads, -1)).softmax(-1)
        trace.weights.append(weights.unflatten(-1, (attend.num_levels, attend.num_points)).cpu())

    hook = attend.attention_weights.register_forward_hook(keep_weights)
    attention.sampling_locations = keep_points
    try:
        yield
    finally:
        del attention.sampling_locations  # the method of the class is seen again
        hook.remove()


def draw_queries(model: DINO, image: str | Path, out_png: str | Path, num_queries: int = 3) -> None:
    """Draw the queries with the highest scores: a row for each query, a panel for each layer of the decoder.

    The larger a sampling point, the larger its attention weight.

    Args:
        model: See :func:`trace_decoder`.
        image: The image file.
        out_png: Picture to write.
        num_queries: Number of queries.
    """
    trace = trace_decoder(model, image)
    picture = np.asarray(read_picture(Path(image)))
    best = trace.scores.max(1).values.topk(min(num_queries, len(trace.scores))).indices.tolist()
    num_layers = len(trace.points)
    figure = Figure(figsize=(PANEL * num_layers, PANEL * len(best) + 0.8), layout='constrained')
    grid = figure.subplots(len(best), num_layers, squeeze=False)
    classes = (getattr(model, 'dataset_meta', None) or {}).get('classes')
    for row, query in zip(grid, best, strict=True):
        score, label = (float(value) for value in trace.scores[query].max(0))
        name = classes[int(label)] if classes else f'class {label:.0f}'
        row[0].set_ylabel(f'{name} {score:.2f}')
        window = _window(trace, query, picture.shape)
        for layer, axes in enumerate(row):
            _draw_layer(axes, picture, window, trace, query, layer)
    for layer, axes in enumerate(grid[0]):
        axes.set_title(f'layer {layer + 1}')
    _draw_legend(figure, trace.points[0].shape[2])
    Path(out_png).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, dpi=110)


def _window(trace: DecoderTrace, query: int, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom in pixels of what the panels of a query show: its boxes and most of its points."""
    boxes = torch.stack([reference[query] for reference in trace.references])
    points = torch.cat([layer[query].flatten(0, 2) for layer in trace.points])
    corners = [boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2]
    low = torch.minimum(corners[0].amin(0), points.quantile(0.05, 0))
    high = torch.maximum(corners[1].amax(0), points.quantile(0.95, 0))
    size = torch.tensor([shape[1], shape[0]])
    margin = 0.08 * (high - low) + 4 / size
    low, high = ((low - margin).clamp(0, 1) * size).floor(), ((high + margin).clamp(0, 1) * size).ceil()
    return int(low[0]), int(low[1]), max(int(high[0]), int(low[0]) + 1), max(int(high[1]), int(low[1]) + 1)


def _draw_layer(
    axes: Axes, picture: np.ndarray, window: tuple[int, int, int, int], trace: DecoderTrace, query: int, layer: int
) -> None:
    """Sampling points of a layer, the box that they lie around, and the box that the layer makes of it."""
    left, top, right, bottom = window
    height, width = picture.shape[:2]
    axes.imshow(picture[top:bottom, left:right], extent=(left, right, bottom, top), alpha=0.75)
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
    points = trace.points[layer][query] * torch.tensor([width, height])
    for level in range(points.shape[1]):
        x, y = points[:, level].flatten(0, 1).T.numpy()
        sizes = 120 * trace.weights[layer][query][:, level].flatten().numpy()
        axes.scatter(x, y, sizes, COLOURS[level % len(COLOURS)], linewidths=0.3, edgecolors='black')
    for index, colour, style in ((layer, BEFORE, '--'), (layer + 1, AFTER, '-')):
        cx, cy, w, h = (trace.references[index][query] * torch.tensor([width, height, width, height])).tolist()
        box = Rectangle((cx - w / 2, cy - h / 2), w, h, fill=False, edgecolor=colour, linestyle=style, linewidth=1.6)
        axes.add_patch(box)


def _draw_legend(figure: Figure, num_levels: int) -> None:
    entries = [
        Line2D([], [], color=BEFORE, linestyle='--', label='reference box'),
        Line2D([], [], color=AFTER, label='refined box'),
    ]
    for level in range(num_levels):
        colour = COLOURS[level % len(COLOURS)]
        entries.append(Line2D([], [], marker='o', color=colour, linestyle='', label=f'points on level {level + 1}'))
    figure.legend(handles=entries, loc='outside lower center', ncols=4, facecolor='#999999', fontsize=9)
