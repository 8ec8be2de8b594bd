"""The learning curve of a training run: its losses and its evaluations over the iterations."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

LOSSES = {
    'loss': ('total of all layers', '#222222', 2.0),
    'loss_cls': ('classification, last layer', '#1f77b4', 1.4),
    'loss_bbox': ('box L1, last layer', '#ff7f0e', 1.4),
    'loss_iou': ('box GIoU, last layer', '#2ca02c', 1.4),
}
"""Plotted training scalars: label, colour and line width in points.

DINO adds up the same three parts for each decoder layer, the encoder and the denoising queries.
"""

METRICS = {
    'coco/bbox_mAP': ('mAP (IoU 0.50:0.95)', '#1f77b4', -15),
    'coco/bbox_mAP_50': ('AP50', '#d62728', 8),
}
"""Plotted evaluation scalars: label, colour, and how many points its values stand over the line."""

MAX_ANNOTATED = 12
"""With more evaluations than this the values of some are left out, as they would overlap."""


@dataclass
class History:
    """What a training run logged.

    Attributes:
        train: Per training scalar its (iteration, value) pairs in order.
        evaluations: Per metric its (iteration, value) pairs in order.
        last_iteration: The last iteration of which anything was logged.
    """

    train: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    evaluations: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    last_iteration: int = 0


def read_history(scalars_json: Path) -> History:
    """Read the ``vis_data/scalars.json`` that mmengine writes in training, one JSON object a line.

    Args:
        scalars_json: The file of one run.

    Returns:
        The scalars of ``LOSSES`` and ``METRICS``, those that the run logged.
    """
    history = History()
    for line in scalars_json.read_text().splitlines():
        record = json.loads(line)
        # mmengine gives the step of an evaluation in epochs unless told otherwise. There are never
        # more epochs than iterations: the larger number is the iteration in either case.
        iteration = max(record['step'], history.last_iteration)
        history.last_iteration = iteration
        for names, series in ((LOSSES, history.train), (METRICS, history.evaluations)):
            for name in names:
                if name in record:
                    series.setdefault(name, []).append((iteration, record[name]))
    return history


def plot_learning_curve(scalars_json: Path, out_png: Path) -> None:
    """Draw the losses (upper panel) and the box AP (lower panel) of a run over its iterations.

    Args:
        scalars_json: ``vis_data/scalars.json`` in the work directory of the run.
        out_png: Picture to write, 1350x1200 px.
    """
    history = read_history(scalars_json)
    figure = Figure(figsize=(9, 8), layout='constrained')
    figure.suptitle(f'Learning curve, {history.last_iteration} iterations', fontsize=14)
    losses, metrics = figure.subplots(2, 1, sharex=True)
    _plot_losses(losses, history)
    _plot_metrics(metrics, history)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, dpi=150)


def _plot_losses(axes: Axes, history: History) -> None:
    for name, points in history.train.items():
        label, colour, width = LOSSES[name]
        axes.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=width)
    axes.set_yscale('log')
    # A loss often stays within one or two decades: label 2 and 5 as well.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_formatter('')
    axes.set_ylabel('training loss (log scale)')
    _finish(axes, 'best')


def _plot_metrics(axes: Axes, history: History) -> None:
    for name, points in history.evaluations.items():
        label, colour, height = METRICS[name]
        axes.plot(*zip(*points, strict=True), 'o-', label=label, color=colour, markersize=4)
        # Counted from the end, so that the last value, the result of the run, is always told.
        stride = -(-len(points) // MAX_ANNOTATED)
        for point in points[::-stride]:
            axes.annotate(
                f'{point[1]:.3f}',
                point,
                xytext=(0, height),
                textcoords='offset points',
                ha='center',
                color=colour,
                fontsize=8,
            )
    axes.set_ylim(-0.08, 1.08)
    axes.set_xlim(left=0)
    axes.set_xlabel('training iteration')
    axes.set_ylabel('box AP on validation images (0 to 1)')
    _finish(axes, 'lower right')


def _finish(axes: Axes, legend_place: Literal['best', 'lower right']) -> None:
    axes.grid(True, which='major', alpha=0.25)
    axes.spines[['top', 'right']].set_visible(False)
    if axes.lines:
        axes.legend(loc=legend_place, fontsize=9, frameon=False)
    else:
        axes.text(0.5, 0.5, 'nothing logged', transform=axes.transAxes, ha='center')
