"""A report on a test: one HTML file that needs no other, and its plots as PNG."""

import base64
import tempfile
from collections.abc import Iterable
from html import escape
from math import isnan
from pathlib import Path

import numpy as np

from dino_mm.evaluation.calibration import MIN_SCORE
from dino_mm.evaluation.error_types import ERRORS, Kind
from dino_mm.evaluation.predictions import ReportError
from dino_mm.evaluation.report import SUMMARY, Analysis, ClassResult

from .curves import plot_learning_curve
from .report_plots import (
    confused_classes,
    plot_calibration,
    plot_confusion,
    plot_errors,
    plot_precision_recall,
)
from .worst_images import worst_images

PAGE = 'report.html'
#: Pairs of classes that are listed below the confusion matrix.
NUM_PAIRS = 10

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1120px; margin: 2em auto;
  padding: 0 1em }
h1 { margin-bottom: 0 } h2 { margin-top: 2.2em; border-bottom: 1px solid #ddd; padding-bottom: .2em }
p { max-width: 75ch } .files { color: #666; margin-top: .3em; overflow-wrap: anywhere }
img { max-width: 100%; height: auto }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(6.8em, 1fr)); gap: .8em; margin: 1.2em 0 }
.tile { border: 1px solid #ddd; border-radius: 6px; padding: .5em .9em }
.tile b { display: block; font-size: 1.5em } .tile small { color: #666 }
.todo { border-left: 4px solid #1f77b4; padding-left: .8em }
table { border-collapse: collapse; margin: 1em 0 }
th, td { padding: .25em .8em; border-bottom: 1px solid #eee; text-align: right } th { border-bottom: 2px solid #ccc }
th:first-child, td:first-child, td.text, th.text { text-align: left } th.text { min-width: 8em }
.definitions th.text { min-width: 17em }
td.bar { background: linear-gradient(90deg, #cfe3f3 var(--share), transparent var(--share)); min-width: 5.5em }
.scroll { overflow-x: auto }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 1em }
figure { margin: 0 } figcaption { color: #444; font-size: .87em; overflow-wrap: anywhere }
.true { color: #1b9a4b } .detected { color: #d97706 }
@media (max-width: 700px) {
  .scroll img { width: 640px; max-width: none }
  th, td { padding: .25em .4em } .definitions th.text { min-width: 11em } td.bar { min-width: 3.5em }
}
"""

#: What to do about the error that costs the most.
ADVICE = {
    Kind.WRONG_CLASS: 'See in the confusion matrix which classes are mixed up, then look at the labels of these '
    'classes: are they told apart in one way throughout? If so, add images of them.',
    Kind.BADLY_PLACED: 'Look in the worst images whether the true boxes are tight and drawn in one way. If so, train '
    'longer or with larger images.',
    Kind.BOTH: 'Look at the worst images: objects of one class beside, or inside, objects of another are often the '
    'reason. More images of such scenes help.',
    Kind.DUPLICATE: 'DINO learns to give each object one detection, without NMS. Many duplicates often mean that the '
    'training was short: train longer, and look whether objects are labelled twice.',
    Kind.BACKGROUND: 'Look in the worst images for objects that nobody labelled. If there are none, add images of what '
    'is taken for an object, without a label.',
    Kind.MISSED: 'Compare AP by size. If small objects are missed, use larger images; if all sizes are, add images of '
    'the classes with the lowest AP.',
}


def write_report(analysis: Analysis, folder: str | Path, curve: Path | None = None) -> Path:
    """Write ``report.html`` and the plots into a folder.

    Args:
        analysis: Of :func:`~dino_mm.evaluation.report.analyse`.
        folder: Where to write; made if it does not exist.
        curve: ``vis_data/scalars.json`` of the training, whose learning curve is to be in the report.

    Returns:
        The HTML file. It is written last, so that a page that is there is whole.

    Raises:
        ReportError: The folder cannot be written into, or ``curve`` cannot be read; one line.
    """
    folder = writable_folder(folder)
    plots = {
        'errors.png': plot_errors(analysis),
        'precision_recall.png': plot_precision_recall(analysis),
        'confusion.png': plot_confusion(analysis),
        'calibration.png': plot_calibration(analysis),
    }
    if curve is not None:
        plots['learning_curve.png'] = _learning_curve(curve)
    page = ''.join(_page(analysis, plots))
    for name, content in {**plots, PAGE: page.encode()}.items():
        part = folder / f'{name}.part'
        part.write_bytes(content)
        part.replace(folder / name)
    return folder / PAGE


def writable_folder(folder: str | Path) -> Path:
    """Make a folder; ReportError if it cannot be written into."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise ReportError(f'{folder} cannot be written into ({error.strerror}): name another folder.') from None


def _learning_curve(scalars: Path) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / 'curve.png'
        try:
            plot_learning_curve(scalars, picture)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ReportError(
                f'{scalars} cannot be read as a log ({error}): give `vis_data/scalars.json` of the training.'
            ) from None
        return picture.read_bytes()


def _page(analysis: Analysis, plots: dict[str, bytes]) -> Iterable[str]:
    title = f'Test report: {Path(analysis.file.path).name}'
    yield f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
    yield f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
    yield from _head(analysis, title)
    yield from _errors(analysis, plots['errors.png'])
    yield from _curves(analysis, plots['precision_recall.png'])
    yield from _classes(analysis)
    yield from _confusion(analysis, plots['confusion.png'])
    yield from _calibration(analysis, plots['calibration.png'])
    if 'learning_curve.png' in plots:
        yield '<h2>Training</h2>' + _plot(plots['learning_curve.png'], 'learning curve')
        yield _text(
            'Losses should fall and AP should rise.',
            'If AP still rises at the end, train longer. If it falls while the losses fall, the model learns the '
            'training images by heart: add images or augmentation.',
        )
    yield from _worst(analysis)
    yield '</body></html>\n'


def _head(analysis: Analysis, title: str) -> Iterable[str]:
    objects = len(analysis.errors.truth_labels)
    yield f'<h1>{escape(title)}</h1><p class="files">{escape(analysis.file.path)}: {len(analysis.file.images)} images, '
    yield f'{objects} objects, {len(analysis.classes)} classes. Pictures: {escape(str(analysis.folder))}</p>'
    yield '<div class="tiles">'
    for name, (_, meaning) in SUMMARY.items():
        yield f'<div class="tile" title="{meaning}"><small>{name}</small><b>{_figure(analysis.summary[name])}</b></div>'
    best = analysis.threshold
    yield f'</div><p>AP and AR are COCO&#8217;s, from 0 to 1: AP is the {SUMMARY["AP"][1]}, as the test prints it. '
    yield f'With <b>{best.score:.2f} as the lowest score</b>, precision is {best.precision:.2f} and recall '
    yield f'{best.recall:.2f} at IoU 0.50. F1, {best.f1:.2f}, is highest there, over all classes. Counts and images '
    yield 'below are of the detections from this score on.</p>'


def _errors(analysis: Analysis, plot: bytes) -> Iterable[str]:
    costs = analysis.costs
    worst = max(costs, key=lambda kind: costs[kind])
    yield '<h2>Which errors cost the most</h2>' + _plot(plot, 'cost of each kind of error')
    if costs[worst] > 0:
        advice = f'Most AP is lost to the error &#8220;{ERRORS[worst][0]}&#8221;. {ADVICE[worst]}'
    else:
        advice = 'To mend one kind of error alone gains nothing. If AP50 is below 1, several kinds come together: look '
        advice += 'at the worst images.'
    yield _text(
        'A bar tells how much AP50 would rise if this one kind of error never happened.',
        advice,
    )
    yield '<div class="scroll"><table class="definitions"><tr><th>error</th><th class="text">what it is</th>'
    yield f'<th>count from score {analysis.threshold.score:.2f} on</th><th>cost in AP50</th></tr>'
    for kind, (name, meaning) in ERRORS.items():
        yield f'<tr><td>{name}</td><td class="text">{meaning}</td><td>{analysis.shown_errors.count(kind)}</td>'
        yield f'<td>{costs[kind]:.3f}</td></tr>'
    yield '</table></div><p>The kinds are those of TIDE (Bolya et al. 2020). The cost is of all detections, whatever '
    yield 'their scores: a missed object costs nothing where a detection below the lowest score finds it.</p>'


def _curves(analysis: Analysis, plot: bytes) -> Iterable[str]:
    yield '<h2>Precision and recall</h2>' + _plot(plot, 'precision over recall')
    yield _text(
        'A curve shows the precision that is left as the lowest score falls and recall rises; the red dot is the score '
        'of the highest F1.',
        'A curve that ends early is of a class whose objects are not found: add images of it. If the right-hand curves '
        'lie far apart, boxes are placed loosely.',
    )


def _classes(analysis: Analysis) -> Iterable[str]:
    yield '<h2>Classes and sizes</h2>'
    yield _text(
        'AP of each class, the lowest first, and of its small, medium and large objects.',
        'Begin with classes at the top that have many objects. A class with few objects has an unsure AP: label more.',
    )
    yield '<div class="scroll"><table><tr><th>class</th><th>objects</th><th>AP</th><th>AP50</th><th>small</th>'
    yield '<th>medium</th><th>large</th></tr>'
    for result in sorted(analysis.per_class, key=_by_ap):
        yield f'<tr><td>{escape(result.name)}</td><td>{result.num_gts}</td>'
        for value in (result.ap, result.ap50, result.ap_small, result.ap_medium, result.ap_large):
            share = 0.0 if isnan(value) else value
            yield f'<td class="bar" style="--share:{share:.0%}">{_figure(value)}</td>'
        yield '</tr>'
    yield '</table></div>'


def _by_ap(result: ClassResult) -> tuple[bool, float]:
    return isnan(result.ap), result.ap


def _confusion(analysis: Analysis, plot: bytes) -> Iterable[str]:
    shown = len(confused_classes(analysis.confusion))
    yield '<h2>Which classes are mixed up</h2>' + _plot(plot, 'confusion matrix')
    part = '' if shown == len(analysis.classes) else f' The {shown} classes with the most errors are shown.'
    yield _text(
        'A row tells as what the objects of a class were detected; the last column counts objects not found, the last '
        f'row detections of background and duplicates.{part}',
        'Look at the labels of two classes with a dark cell between them. Many detections in the last row can also be '
        'objects that nobody labelled.',
    )
    pairs = analysis.confusion[:-1, :-1] * (1 - np.eye(len(analysis.classes), dtype=int))
    order = [divmod(int(i), len(analysis.classes)) for i in np.argsort(-pairs, axis=None, kind='stable')[:NUM_PAIRS]]
    rows = [
        f'<tr><td>{escape(analysis.classes[true])}</td><td class="text">{escape(analysis.classes[other])}</td>'
        f'<td>{pairs[true, other]}</td></tr>'
        for true, other in order
        if pairs[true, other]
    ]
    if rows:
        yield '<table><tr><th>is</th><th class="text">detected as</th><th>times</th></tr>' + ''.join(rows) + '</table>'


def _calibration(analysis: Analysis, plot: bytes) -> Iterable[str]:
    result = analysis.calibration
    yield '<h2>What a score is worth</h2>' + _plot(plot, 'reliability diagram')
    if isnan(result.ece):
        advice = f'No detection has a score of {MIN_SCORE:g} or more: train longer.'
    elif abs(result.bias) < 0.02:
        advice = (
            f'As a whole, scores are neither too high nor too low. One score is off by {result.ece:.2f} on average.'
        )
    else:
        side = 'high' if result.bias > 0 else 'low'
        advice = f'On average, scores are too {side} by {abs(result.bias):.2f}.'
    yield _text(
        'Where a bar reaches the dashed line, a detection with this score is correct as often as the score says.',
        f'{advice} Choose a threshold by this picture rather than by the score alone; AP does not depend on it.',
    )


def _worst(analysis: Analysis) -> Iterable[str]:
    images = worst_images(analysis)
    if not images:
        yield '<h2>The worst images</h2><p>No image has an error from this score on.</p>'
        return
    yield f'<h2>The worst {len(images)} images</h2>'
    yield _text(
        'Images with the most errors: <b class="true">green</b> are true boxes, <b class="detected">orange</b> are '
        'detections with class, score and error.',
        'Ask of each image whether the label or the detection is wrong, and mend the labels first.',
    )
    yield '<div class="images">'
    for image in images:
        yield f'<figure>{_image(image.jpeg, image.file_name, "jpeg")}'
        yield f'<figcaption>{escape(image.file_name)}: {image.caption}</figcaption></figure>'
    yield '</div>'


def _text(reading: str, doing: str) -> str:
    return f'<p>{reading}</p><p class="todo">{doing}</p>'


def _plot(content: bytes, text: str) -> str:
    """On a phone it keeps a size at which its text can be read, and scrolls."""
    return f'<div class="scroll">{_image(content, text, "png")}</div>'


def _image(content: bytes, text: str, kind: str) -> str:
    return f'<img alt="{escape(text)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def _figure(value: float) -> str:
    return '&#8211;' if isnan(value) else f'{value:.3f}'
