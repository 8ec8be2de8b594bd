"""The report: figures equal to the metric's, errors in one line, a page that stands alone."""

import json
import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT
from PIL import Image
from report_cases import CLASSES, SIZE, Case, noisy_case, write_case

from dino_mm.datasets.coco_rules import AnnotationError
from dino_mm.evaluation import CheckedCocoMetric
from dino_mm.evaluation.error_types import ERRORS
from dino_mm.evaluation.predictions import ReportError
from dino_mm.evaluation.report import SUMMARY, Analysis, analyse
from dino_mm.visualization.report_page import write_report
from dino_mm.visualization.report_plots import CONFUSION_CLASSES, confused_classes
from dino_mm.visualization.worst_images import worst_images


def analysis_of(case: Case, classes: tuple[str, ...] | None = None) -> Analysis:
    return analyse(case.predictions, case.file(), case.images, classes)


def run_metric(case: Case, classes: tuple[str, ...]) -> tuple[np.ndarray, dict[str, float]]:
    """The evaluator's own figures and what the metric makes of them; its predictions replace those of the case."""
    rows, file = json.loads(case.predictions.read_text()), case.file()
    labels = {category: label for label, category in enumerate(file.category_ids(classes))}
    samples = []
    for image in file.images:
        own = [row for row in rows if row['image_id'] == image['id'] and row['category_id'] in labels]
        boxes = torch.tensor([row['bbox'] for row in own]).reshape(-1, 4)
        instances = dict(
            bboxes=torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
            scores=torch.tensor([row['score'] for row in own]),
            labels=torch.tensor([labels[row['category_id']] for row in own]),
        )
        samples.append(dict(img_id=image['id'], ori_shape=SIZE[::-1], pred_instances=instances))
    prefix = str(case.predictions).removesuffix('.bbox.json')
    metric = CheckedCocoMetric(
        str(case.ann), metric='bbox', proposal_nums=(1, 10, 100), classwise=True, outfile_prefix=prefix
    )
    stats = []

    class Recording(metric.evaluator):
        def summarize(self) -> None:
            super().summarize()
            stats.append(self.stats)

    metric.evaluator = Recording
    metric.dataset_meta = dict(classes=classes)
    metric.process({}, samples)
    result = metric.evaluate(len(samples))
    return stats[0], result


@pytest.mark.parametrize('classes', [CLASSES, ('owl', 'cat', 'dog'), ('dog', 'cat')])
def test_figures_are_those_of_the_metric(classes: tuple[str, ...], tmp_path: Path) -> None:
    case = noisy_case(tmp_path, crowds=True)
    content = json.loads(case.ann.read_text())
    content['images'][3].update(width=20, height=20)  # not true: the pictures are larger
    outside = dict(content['annotations'][0], id=9999, bbox=[300.0, 300.0, 20.0, 20.0])
    content['annotations'].append(outside)
    case.ann.write_text(json.dumps(content))

    stats, metrics = run_metric(case, classes)
    analysis = analysis_of(case, classes)
    assert 0.02 < stats[0] < 0.5
    for name, (place, _) in SUMMARY.items():
        value = analysis.summary[name]
        assert (math.isnan(value) and stats[place] == -1) or value == pytest.approx(stats[place], abs=1e-6), name
    assert round(analysis.summary['AP'], 3) == metrics['coco/bbox_mAP']
    assert round(analysis.summary['AP50'], 3) == metrics['coco/bbox_mAP_50']
    by_name = {result.name: result for result in analysis.per_class}
    assert list(by_name) == list(classes)
    for name, result in by_name.items():
        assert round(result.ap, 3) == pytest.approx(metrics[f'coco/{name}_precision'], abs=1e-9)
    assert np.mean([result.ap50 for result in analysis.per_class]) == pytest.approx(stats[1], abs=1e-6)
    assert analysis.errors.ap50() == pytest.approx(stats[1], abs=1e-6)


def test_classes_have_their_sizes(tmp_path: Path) -> None:
    small, medium, large = (0, 0, 20, 20), (30, 0, 40, 40), (80, 0, 100, 100)
    truth = [(0, 'cat', small), (0, 'cat', large), (0, 'dog', medium)]
    analysis = analysis_of(write_case(tmp_path, truth, [(0, 'cat', large, 0.9), (0, 'dog', medium, 0.8)]))
    results = {result.name: result for result in analysis.per_class}
    assert results['cat'].ap_small == 0.0
    assert [results['cat'].ap_large, results['dog'].ap_medium, results['dog'].ap] == pytest.approx([1, 1, 1])
    assert results['cat'].ap == pytest.approx(51 / 101)
    assert math.isnan(results['dog'].ap_large)
    assert math.isnan(results['owl'].ap)
    assert [result.num_gts for result in analysis.per_class] == [0, 1, 2]  # the file's rows are turned round


def damage(case: Case, row: dict | None = None, **content: object) -> None:
    """Change the first prediction, or keys of the annotation file."""
    rows = json.loads(case.predictions.read_text())
    rows[0].update(row or {})
    case.predictions.write_text(json.dumps(rows))
    case.ann.write_text(json.dumps({**json.loads(case.ann.read_text()), **content}))


BAD_INPUT = {
    'image': (lambda c: damage(c, {'image_id': 999}), r'image_id 999\): give the annotation file'),
    'category': (lambda c: damage(c, {'category_id': 999}), r"category_id 999\).*has 'owl', 'dog', 'cat'"),
    'box': (lambda c: damage(c, {'bbox': [1, 2, 3]}), r'1 predictions have no `bbox` of four.*entries 0'),
    'score': (lambda c: damage(c, {'score': 1.5}), r'`score` that is no number from 0 to 1 \(entries 0\)'),
    'no list': (lambda c: c.predictions.write_text('{}'), 'holds a dict, not a list'),
    'entries': (lambda c: c.predictions.write_text('[{}, 7]'), r'2 predictions are no objects.*entries 0, 1'),
    'no JSON': (lambda c: c.predictions.write_text('[{'), 'no JSON'),
    'bytes': (lambda c: c.predictions.write_bytes(b'\xff\xfe\x00\xd8['), 'no JSON'),
    'empty': (lambda c: c.predictions.write_text('[]'), 'holds no predictions'),
    'missing': (lambda c: c.predictions.unlink(), 'cannot be read'),
    'no boxes': (lambda c: damage(c, annotations=[]), 'has no boxes of the classes owl, dog, cat'),
    'picture': (lambda c: (c.images / '0.png').unlink(), r'lacks pictures of .*ann.json \(0.png\)'),
    'damaged picture': (lambda c: (c.images / '0.png').write_bytes(b'no'), r'cannot be read \(image ids 10\)'),
}


@pytest.mark.parametrize('name', list(BAD_INPUT))
def test_bad_input_is_one_line(name: str, tmp_path: Path) -> None:
    case = write_case(tmp_path, [(0, 'cat', (0, 0, 40, 40))], [(0, 'cat', (0, 0, 40, 40), 0.9)])
    spoil, pattern = BAD_INPUT[name]
    spoil(case)
    with pytest.raises(ReportError, match=pattern) as caught:
        analysis_of(case)
    assert '\n' not in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    case = write_case(tmp_path, [(0, 'cat', (0, 0, 40, 40))], [(0, 'cat', (0, 0, 40, 40), 0.9)])
    with pytest.raises(ReportError, match=r'out.pkl is a pickle.*--report DIR'):
        analyse(tmp_path / 'out.pkl', case.file(), case.images)
    with pytest.raises(ReportError, match='There is no folder'):
        analyse(case.predictions, case.file(), tmp_path / 'none')
    with pytest.raises(AnnotationError, match=r"no categories bird.*'owl', 'dog', 'cat'"):
        analyse(case.predictions, case.file(), case.images, ['bird'])
    (tmp_path / 'crowd').mkdir()
    crowd = write_case(tmp_path / 'crowd', [], [(0, 'cat', (0, 0, 9, 9), 0.9)], [(0, 'cat', (0, 0, 9, 9))])
    with pytest.raises(ReportError, match='has no boxes'):
        analysis_of(crowd)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    case = write_case(tmp_path, [(0, 'cat', (0, 0, 40, 40))], [(0, 'cat', (0, 0, 40, 40), 0.9)])
    (tmp_path / 'file').touch()
    with pytest.raises(ReportError, match=r'file/report cannot be written into .*: name another folder'):
        write_report(analysis_of(case), tmp_path / 'file/report')
    with pytest.raises(ReportError, match=r'cannot be read as a log .*vis_data/scalars.json'):
        write_report(analysis_of(case), tmp_path / 'report', case.predictions)
    assert not (tmp_path / 'report/report.html').exists()


def test_page_stands_alone(tmp_path: Path) -> None:
    analysis = analysis_of(noisy_case(tmp_path))
    page = write_report(analysis, tmp_path / 'new' / 'report')
    names = ['calibration.png', 'confusion.png', 'errors.png', 'precision_recall.png', 'report.html']
    assert sorted(path.name for path in page.parent.iterdir()) == names
    for name in names[:-1]:
        assert Image.open(page.parent / name).width > 400
    text = page.read_text()
    assert page.stat().st_size < 5_000_000
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert 'http' not in re.sub('base64,[^"]+', '', text)
    assert text.count('data:image/png') == 4
    assert text.count('data:image/jpeg') == 24
    assert text.count('class="todo"') == 6
    assert f'<b>{analysis.summary["AP"]:.3f}</b>' in text
    for result in analysis.per_class:
        assert f'<td>{result.name}</td><td>{result.num_gts}</td>' in text


@pytest.mark.parametrize('found', [True, False])
def test_page_of_odd_results(found: bool, tmp_path: Path) -> None:
    """No error at all, or no correct detection; names that HTML would read as its own."""
    name, box = '<b>&"', (10, 10, 50, 50)
    rows = [(0, name, box if found else (100, 100, 40, 40), 0.05)]
    analysis = analysis_of(write_case(tmp_path, [(0, name, box)], rows, classes=[name, 'unused']))
    text = write_report(analysis, tmp_path / 'report').read_text()
    assert '<td>&lt;b&gt;&amp;&quot;</td>' in text
    assert name not in re.sub('base64,[^"]+', '', text)
    assert ('No image has an error' in text) == found
    assert 'To mend one kind of error alone gains nothing.' in text
    assert analysis.summary['AP'] == pytest.approx(float(found))
    assert math.isnan(analysis.calibration.ece)


def test_many_classes(tmp_path: Path) -> None:
    classes = [f'class number {i} with a long name' for i in range(60)]
    box = (10, 10, 50, 50)
    truth = [(i, name, box) for i, name in enumerate(classes)]
    rows = [(i, classes[i if i % 2 else (i + 2) % 60], box, 0.5 + i / 200) for i in range(60)]
    analysis = analysis_of(write_case(tmp_path, truth, rows, num_images=60, classes=classes))
    shown = confused_classes(analysis.confusion)
    assert len(shown) == CONFUSION_CLASSES
    mixed = {analysis.classes[i] for i in shown}
    assert mixed <= {name for i, name in enumerate(classes) if i % 2 == 0}
    text = write_report(analysis, tmp_path / 'report').read_text()
    assert f'The {CONFUSION_CLASSES} classes with the most errors are shown.' in text
    assert text.count('<td>1</td></tr>') == 10  # the pairs


def test_worst_images_come_first(tmp_path: Path) -> None:
    box, other, free = (10, 10, 50, 50), (100, 10, 50, 50), (10, 90, 50, 50)
    truth = [(image, 'cat', place) for image in range(4) for place in (box, other)]
    rows = [(image, 'cat', box, 0.9) for image in range(4)] + [(0, 'cat', other, 0.9), (3, 'dog', other, 0.9)]
    rows += [(1, 'owl', free, 0.9), (3, 'owl', free, 0.95), (3, 'cat', box, 0.9)]
    analysis = analysis_of(write_case(tmp_path, truth, rows, num_images=4))
    worst = worst_images(analysis)
    assert [(image.file_name, image.caption) for image in worst] == [
        ('3.png', 'wrong class 1, duplicate 1, background 1'),
        ('1.png', 'background 1, missed 1'),
        ('2.png', 'missed 1'),
    ]
    assert [image.file_name for image in worst_images(analysis, 1)] == ['3.png']
    assert worst[0].jpeg[:2] == b'\xff\xd8'


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    case = noisy_case(tmp_path, num_images=3)
    scalars = tmp_path / 'scalars.json'
    scalars.write_text('{"loss": 3.0, "step": 1}\n{"loss": 2.0, "step": 2}\n')

    def run(predictions: Path, *more: object) -> None:
        options = ('--ann', case.ann, '--images', case.images, '--out', tmp_path / 'report', *more)
        monkeypatch.setattr('sys.argv', ['report.py', str(predictions), *map(str, options)])
        runpy.run_path(str(ROOT / 'tools/report.py'), run_name='__main__')

    run(case.predictions, '--curve', scalars, '--classes', 'dog', 'cat', 'owl')
    analysis, said = analysis_of(case), capsys.readouterr().out
    assert f'AP {analysis.summary["AP"]:.3f}, AP50 {analysis.summary["AP50"]:.3f}' in said
    assert said.endswith(f'report: {tmp_path}/report/report.html\n')
    assert (tmp_path / 'report/learning_curve.png').exists()
    with pytest.raises(SystemExit, match=r'^error: .*none.json cannot be read \(No such file.*\)[^\n]*$'):
        run(tmp_path / 'none.json')
    case.ann.unlink()
    with pytest.raises(SystemExit, match=r'^error: There is no annotation file .*Correct `--ann`'):
        run(case.predictions)


def test_documentation_defines_every_kind_of_error() -> None:
    page = (ROOT / 'docs/report.md').read_text()
    for name, definition in ERRORS.values():
        assert f'| {name} | {definition} |' in page
