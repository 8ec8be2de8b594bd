"""A report on what went wrong, after a test."""

from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from dino_mm.evaluation.coco_metric import CheckedCocoMetric
from dino_mm.evaluation.predictions import ReportError
from dino_mm.registry import HOOKS

from .visualization_hook import image_prefixes


@HOOKS.register_module()
class ReportHook(Hook):
    """Writes the predictions of a test and a report on them, ``report.html``, into a folder.

    Args:
        folder: Where to write.

    Raises:
        ReportError: Before the test: the evaluator has no ``CheckedCocoMetric`` with an ``ann_file``, the pictures are
            not in one folder, or ``folder`` cannot be written into. After it: see
            :func:`dino_mm.evaluation.report.analyse`.
    """

    priority = 'LOWEST'  # the log has the figures of the test even where no report can be made of it

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._metric: CheckedCocoMetric | None = None

    def before_test(self, runner: Runner) -> None:
        """Have the metric write its predictions."""
        from dino_mm.visualization.report_page import writable_folder  # matplotlib, which other runs do not need

        writable_folder(self.folder)
        self._metric = _find_metric(runner)
        self._metric.outfile_prefix = str(self.folder / 'predictions')
        _picture_folder(runner)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Write the report."""
        from dino_mm.evaluation.report import analyse
        from dino_mm.visualization.report_page import write_report

        if not is_main_process() or self._metric is None or self._metric.coco_file is None:
            return
        predictions, classes = self.folder / 'predictions.bbox.json', (self._metric.dataset_meta or {}).get('classes')
        analysis = analyse(predictions, self._metric.coco_file, _picture_folder(runner), classes)
        runner.logger.info(f'Report: {write_report(analysis, self.folder)}')


def _find_metric(runner: Runner) -> CheckedCocoMetric:
    for metric in runner.test_evaluator.metrics:
        if isinstance(metric, CheckedCocoMetric) and metric.coco_file is not None and 'bbox' in metric.metrics:
            return metric
    raise ReportError(
        "A report needs `test_evaluator = dict(type='dino_mm.CheckedCocoMetric', ann_file=..., metric='bbox')` in the "
        'config.'
    )


def _picture_folder(runner: Runner) -> str:
    folders = sorted(image_prefixes(runner.test_dataloader.dataset))
    if len(folders) != 1:
        raise ReportError(f'A report needs the pictures in one folder, not in {folders}: use `dino-mm report`.')
    return folders[0]
