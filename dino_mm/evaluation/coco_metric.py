"""COCO evaluation with a choice of implementation."""

from mmdet.evaluation.metrics import CocoMetric
from mmdet.evaluation.metrics import coco_metric as mmdet_module

from dino_mm.datasets.coco import require_annotation_file
from dino_mm.registry import METRICS


@METRICS.register_module()
class CheckedCocoMetric(CocoMetric):
    """mmdet's ``CocoMetric`` over pycocotools or over faster-coco-eval, which gives equal figures sooner.

    Args:
        *args, **kwargs: Of mmdet's ``CocoMetric``.
        backend: 'pycocotools' or 'faster-coco-eval'.
    """

    def __init__(self, *args: object, backend: str = 'pycocotools', **kwargs: object) -> None:
        if kwargs.get('ann_file') is not None:
            require_annotation_file(str(kwargs['ann_file']), 'val_evaluator.ann_file` / `test_evaluator.ann_file')
        super().__init__(*args, **kwargs)
        self.evaluator = find_evaluator(backend)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Compute the metrics from the results of all images."""
        # mmdet's metric names its evaluator at module level only, so that is where it is exchanged.
        original = mmdet_module.COCOeval
        mmdet_module.COCOeval = self.evaluator
        try:
            return super().compute_metrics(results)
        finally:
            mmdet_module.COCOeval = original


def find_evaluator(backend: str) -> type:
    """The ``COCOeval`` class of a backend; ImportError or ValueError with the way out if there is none."""
    if backend == 'pycocotools':
        return mmdet_module.COCOeval
    if backend != 'faster-coco-eval':
        raise ValueError(f"evaluator.backend is {backend!r}; it can be 'pycocotools' or 'faster-coco-eval'.")
    try:
        from faster_coco_eval import COCOeval_faster
    except ImportError as error:
        raise ImportError(
            "evaluator.backend='faster-coco-eval' needs the package: `pip install faster-coco-eval`."
        ) from error
    return COCOeval_faster
