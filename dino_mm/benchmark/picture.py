"""The picture of a benchmark: ours against MMDetection's, and how what it costs grows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

OURS_COLOUR, MMDET_COLOUR = '#1f77b4', '#ff7f0e'
#: Bars of ratios above 1, where ours costs more.
WORSE_COLOUR = '#d62728'
#: Order of the axes along which costs are drawn, and how they are called.
AXES = {'size': 'image size, pixels', 'boxes': 'boxes in each image', 'queries': 'matching queries', 'batch': 'images'}


def plot_comparison(results: Sequence[dict[str, Any]], out_png: Path, title: str) -> None:
    """Draw the ratios of the first result as bars, and times against each axis that the others vary.

    Args:
        results: What ``tools/benchmark.py`` measured, one entry for each setting: ``axis``, ``position`` and
            ``measures``, as its JSON has them.
        out_png: Picture to write.
        title: Heading.
    """
    axes = [axis for axis in AXES if any(result['axis'] == axis for result in results)]
    bars = [m for m in results[0]['measures'] if m['shown'] and m['ratio'] is not None]
    height = 1.5 + 0.32 * len(bars)
    figure = Figure(figsize=(9, height + 3.6 * len(axes)), layout='constrained')
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(1 + len(axes), 1, height_ratios=[height] + [3.6] * len(axes), squeeze=False)[:, 0]
    _plot_ratios(panels[0], bars)
    for panel, axis in zip(panels[1:], axes, strict=True):
        _plot_growth(panel, axis, [result for result in results if result['axis'] == axis])
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, dpi=120)


def _plot_ratios(panel: Axes, bars: Sequence[dict[str, Any]]) -> None:
    for row, bar in enumerate(bars):
        colour = OURS_COLOUR if bar['ratio'] <= 1 else WORSE_COLOUR
        panel.barh(row, bar['ratio'], color=colour, height=0.65)
        if bar['range'][0] < bar['range'][1]:
            panel.plot(bar['range'], [row, row], color='black', linewidth=1.5, solid_capstyle='butt')
        place = (max(bar['ratio'], bar['range'][1]), row)
        panel.annotate(f'{bar["ratio"]:.2f}', place, (4, 0), textcoords='offset points', va='center', fontsize=8)
    panel.axvline(1, color='black', linewidth=0.8)
    panel.set_yticks(range(len(bars)), [bar['name'] for bar in bars], fontsize=8)
    panel.invert_yaxis()
    panel.set_xlabel("ours / MMDetection's; the line is the range of pairs of runs")
    _finish(panel)


def _plot_growth(panel: Axes, axis: str, results: Sequence[dict[str, Any]]) -> None:
    """Times of whole works, both passes: lines of both sides for each work."""
    results = sorted(results, key=lambda result: result['position'])
    positions = [result['position'] for result in results]
    names = [measure['name'] for measure in results[0]['measures'] if measure['drawn']]
    for number, name in enumerate(names):
        measures = [next(m for m in result['measures'] if m['name'] == name) for result in results]
        for side, colour in (('ours', OURS_COLOUR), ('mmdet', MMDET_COLOUR)):
            values = [measure[side] for measure in measures]
            panel.plot(positions, values, _STYLES[number % len(_STYLES)], color=colour, label=f'{name}, {side}')
    # With both scales logarithmic, cost in proportion to the axis is a line of slope 1 for any work.
    panel.set_xscale('log')
    panel.set_yscale('log')
    panel.set_xlabel(f'{AXES[axis]} (log scale)')
    panel.set_xticks(positions, [result['label'] for result in results], fontsize=8)
    panel.set_xticks([], minor=True)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter('{x:g}')
    panel.set_yticks([], minor=True)
    panel.tick_params(axis='y', labelsize=8)
    panel.set_ylabel('seconds (log scale)')
    panel.legend(fontsize=7, frameon=False, ncols=4, loc='lower left', bbox_to_anchor=(0, 1))  # above all lines
    _finish(panel)


_STYLES = ('o-', 's--', '^:', 'd-.', 'v-', 'x--', '+:')


def _finish(panel: Axes) -> None:
    panel.grid(True, which='major', alpha=0.25)
    panel.set_axisbelow(True)
    panel.spines[['top', 'right']].set_visible(False)
