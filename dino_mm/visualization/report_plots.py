"""The plots of a report on a test, as PNG."""

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dino_mm.evaluation.calibration import MIN_SCORE, NUM_BINS
from dino_mm.evaluation.error_types import ERRORS
from dino_mm.evaluation.report import Analysis

DPI = 110
INK, GREY, BLUE, RED, GREEN = '#222222', '#bbbbbb', '#1f77b4', '#d62728', '#2ca02c'
#: Curves that have a colour and a line of the legend of their own: of more classes, those with the lowest AP50.
NAMED_CURVES = 10
#: Classes of the confusion matrix: of more, those with the most errors.
CONFUSION_CLASSES = 24
#: With more classes than these, the cells of the confusion matrix have no numbers.
WRITTEN_CLASSES = 16
NAME_LETTERS = 18


def plot_errors(analysis: Analysis) -> bytes:
    """Bars: by how much AP50 would rise without each kind of error."""
    names = [name for name, _ in ERRORS.values()]
    costs = [analysis.costs[kind] for kind in ERRORS]
    figure, axes = _figure(8, 3.2)
    bars = axes.barh(range(len(names)), costs, color=BLUE, height=0.65)
    axes.bar_label(bars, [f'{cost:.3f}' for cost in costs], padding=4)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, max(0.02, 1.15 * max(costs)))
    axes.set_xlabel(f'AP50 gained if this error never happened (AP50 now: {analysis.summary["AP50"]:.3f})')
    return _png(figure)


def plot_precision_recall(analysis: Analysis) -> bytes:
    """Precision over recall: each class at IoU 0.5, and the mean over classes at several IoUs."""
    figure = Figure(figsize=(11, 4.8), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    recalls = np.linspace(0, 1, analysis.precision.shape[1])
    present = [i for i, c in enumerate(analysis.per_class) if c.num_gts]
    ranked = sorted(present, key=lambda i: analysis.per_class[i].ap50)
    for label in reversed(ranked):
        result, curve = analysis.per_class[label], analysis.precision[0, :, label]
        if label in ranked[:NAMED_CURVES]:
            left.plot(recalls, curve, linewidth=1.3, label=f'{_name(result.name)}, {result.ap50:.2f}')
        else:
            left.plot(recalls, curve, linewidth=0.7, color=GREY)
    mean = analysis.precision[:, :, present].mean(2)
    left.plot(recalls, mean[0], linewidth=2.4, color=INK, label=f'all classes, {mean[0].mean():.2f}')
    left.plot(analysis.threshold.recall, analysis.threshold.precision, 'o', color=RED, markersize=8)
    left.annotate(
        f'score {analysis.threshold.score:.2f}',
        (analysis.threshold.recall, analysis.threshold.precision),
        (-6, -14),
        textcoords='offset points',
        ha='right',
        color=RED,
        bbox=dict(facecolor='white', alpha=0.8, edgecolor='none', pad=1),
    )
    hidden = len(ranked) - NAMED_CURVES
    left.set_title('Classes at IoU 0.50, and their AP50' + (f' ({hidden} best ones in grey)' if hidden > 0 else ''))
    for place in range(0, len(analysis.ious), 2):
        iou, shade = analysis.ious[place], 0.85 - 0.075 * place
        right.plot(recalls, mean[place], color=str(shade - 0.1), linewidth=1.6, label=f'IoU {iou:.2f}')
    right.set_title('Mean over classes')
    left.set_ylabel('precision')
    for axes in (left, right):
        axes.set(xlabel='recall', xlim=(0, 1.005), ylim=(0, 1.02))
        axes.legend(loc='best', fontsize=8, framealpha=0.8, edgecolor='none')
        _tidy(axes)
    return _png(figure)


def plot_confusion(analysis: Analysis) -> bytes:
    """The confusion matrix; colours are shares of each row."""
    chosen = confused_classes(analysis.confusion)
    table = analysis.confusion[np.ix_([*chosen, -1], [*chosen, -1])]
    names = [_name(analysis.classes[label]) for label in chosen]
    side = max(5.0, 2.2 + 0.36 * len(table))
    figure, axes = _figure(side + 1, side)
    # The last row is no class, so that it has no total: it is shaded by the largest number in it.
    totals = np.append(analysis.confusion[chosen].sum(1), table[-1].max())
    shares = table / np.maximum(totals, 1)[:, None]
    image = axes.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    if len(chosen) <= WRITTEN_CLASSES:
        for (row, column), count in np.ndenumerate(table):
            if count:
                colour = 'white' if shares[row, column] > 0.55 else INK
                axes.text(column, row, str(count), ha='center', va='center', fontsize=8, color=colour)
    axes.set_xticks(range(len(table)), [*names, 'not found'], rotation=90)
    axes.set_yticks(range(len(table)), [*names, 'no object left'])
    axes.axhline(len(chosen) - 0.5, color=INK, linewidth=0.8)
    axes.axvline(len(chosen) - 0.5, color=INK, linewidth=0.8)
    axes.set(xlabel='detected as', ylabel='is')
    figure.colorbar(image, ax=axes, shrink=0.6, label='share of the row')
    return _png(figure)


def confused_classes(confusion: np.ndarray) -> list[int]:
    """The classes that the confusion matrix shows: all, or those with the most errors, in their order."""
    wrong = confusion.sum(0)[:-1] + confusion.sum(1)[:-1] - 2 * confusion.diagonal()[:-1]
    return sorted(np.argsort(-wrong, kind='stable')[:CONFUSION_CLASSES].tolist())


def plot_calibration(analysis: Analysis) -> bytes:
    """Reliability diagram: share of correct detections over the score, and how many detections there are."""
    result = analysis.calibration
    figure = Figure(figsize=(6.5, 5.6), layout='constrained')
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    centres = (np.arange(NUM_BINS) + 0.5) / NUM_BINS
    axes.bar(centres, np.nan_to_num(result.precisions), 0.92 / NUM_BINS, color=BLUE, label='correct at IoU 0.50')
    axes.plot([0, 1], [0, 1], '--', color=INK, linewidth=1, label='where score and share agree')
    filled = result.counts > 0
    axes.plot(result.scores[filled], result.precisions[filled], 'o', color=RED, markersize=5, label='mean of the bin')
    axes.set(ylabel='share of correct detections', xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(f'ECE {result.ece:.3f}, from score {MIN_SCORE:g} on')
    axes.legend(loc='upper left', fontsize=9, frameon=False)
    below.bar(centres, result.counts, 0.92 / NUM_BINS, color=GREY)
    below.set_yscale('symlog')
    below.set(ylabel='detections', xlabel='score')
    for each in (axes, below):
        _tidy(each)
    return _png(figure)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout='constrained')
    axes = figure.subplots()
    axes.spines[['top', 'right']].set_visible(False)
    return figure, axes


def _tidy(axes: Axes) -> None:
    axes.grid(True, alpha=0.25)
    axes.spines[['top', 'right']].set_visible(False)


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format='png', dpi=DPI)
    return stream.getvalue()


def _name(name: str) -> str:
    return name if len(name) <= NAME_LETTERS else name[: NAME_LETTERS - 1] + '…'
