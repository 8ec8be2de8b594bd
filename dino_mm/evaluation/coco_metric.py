"""COCO evaluation on a verified annotation file, with a choice of implementation."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation.metrics import CocoMetric
from mmdet.evaluation.metrics import coco_metric as mmdet_module

from dino_mm.datasets.coco_file import CocoFile, read_coco_file, require_annotation_file
from dino_mm.datasets.coco_rules import AnnotationError, Id, has_area_inside
from dino_mm.registry import METRICS


@METRICS.register_module()
class CheckedCocoMetric(CocoMetric):
    """mmdet's ``CocoMetric`` over pycocotools or over faster-coco-eval, which gives equal figures sooner.

    The annotation file is verified as the data set's is, see :func:`read_coco_file`, before anything is trained. Ids of
    images and categories are numbered for the evaluator alone; result files have those of the annotation file.

    Args:
        ann_file: Annotation file; None takes the annotations from the data set.
        backend: 'pycocotools' or 'faster-coco-eval'.
        on_fault: 'error' or 'drop', as of the data set.
        **kwargs: Of mmdet's ``CocoMetric``.
    """

    def __init__(
        self,
        ann_file: str | None = None,
        *args: Any,
        backend: str = 'pycocotools',
        on_fault: str = 'error',
        **kwargs: Any,
    ) -> None:
        super().__init__(None, *args, **kwargs)
        self.evaluator = find_evaluator(backend)
        self.coco_file: CocoFile | None = None
        if ann_file is not None:
            require_annotation_file(str(ann_file), 'val_evaluator.ann_file` / `test_evaluator.ann_file')
            self.coco_file = read_coco_file(
                str(ann_file), on_fault, self.backend_args, needs_annotations=not self.format_only
            )

    @property
    def dataset_meta(self) -> dict | None:
        """Meta information of the data set, ``classes`` in it."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, meta: dict) -> None:
        # Runners set it before they train: a class that the file lacks is not met first at the first evaluation.
        self._dataset_meta = meta
        if self.coco_file is not None:
            self.coco_file.category_ids(meta['classes'])

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Store the predictions of a batch."""
        if self.coco_file is not None:
            self._coco_api = _IN_FILE  # tells mmdet that the data samples need no annotations
        super().process(data_batch, data_samples)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Compute the metrics from the results of all images."""
        if self.coco_file is not None:
            sizes = {gt['img_id']: (gt['width'], gt['height']) for gt, _ in results}
            self._coco_api = Truth(self.coco_file, self.dataset_meta['classes'], sizes)  # type: ignore[index]
            self.cat_ids = self._coco_api.get_cat_ids()
            self.img_ids = self._coco_api.get_img_ids()
        # mmdet's metric names its evaluator at module level only, so that is where it is exchanged.
        original = mmdet_module.COCOeval
        mmdet_module.COCOeval = self.evaluator
        try:
            return super().compute_metrics(results)
        finally:
            mmdet_module.COCOeval = original

    def results2json(self, results: Sequence[dict], outfile_prefix: str) -> dict:
        """Write the predictions with the annotation file's ids."""
        own = self.cat_ids
        if isinstance(self._coco_api, Truth):
            self.cat_ids = self._coco_api.category_ids
        try:
            return super().results2json(results, outfile_prefix)
        finally:
            self.cat_ids = own


#: Stands for the annotations while predictions are collected.
_IN_FILE = object()


class Truth(COCO):
    """A file's objects as evaluators want them: images and categories numbered from 1 on, categories as labels are.

    Evaluators sort category ids, so that only ascending ones keep the order of ``classes``.

    Args:
        file: The annotation file.
        classes: Names of the labels.
        sizes: Image id -> (width, height) in pixels of the pictures; boxes without area inside do not count.
    """

    def __init__(self, file: CocoFile, classes: Sequence[str], sizes: dict[Id, tuple[int, int]]) -> None:
        super().__init__()
        self.path = file.path
        self.category_ids = file.category_ids(classes)
        self._categories = {category: number for number, category in enumerate(self.category_ids, 1)}
        self._images = {image['id']: number for number, image in enumerate(file.images, 1)}
        self.dataset = dict(
            info={},
            images=[{**image, 'id': self._images[image['id']]} for image in file.images],
            categories=[dict(id=number, name=name) for number, name in enumerate(classes, 1)],
            annotations=[
                {**a, 'image_id': self._images[a['image_id']], 'category_id': self._categories[a['category_id']]}
                for a in file.annotations
                if a['category_id'] in self._categories and has_area_inside(a['bbox'], *sizes.get(a['image_id'], _ANY))
            ],
        )
        with contextlib.redirect_stdout(io.StringIO()):
            self.createIndex()
        self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs

    def loadRes(self, predictions: list[dict]) -> COCO:  # noqa: N802  (pycocotools' name)
        """Index predictions that have the file's ids."""
        for prediction in predictions:
            image = self._images.get(prediction['image_id'])
            if image is None:
                raise AnnotationError(
                    f'There is a prediction for image id {prediction["image_id"]}, which {self.path} does not have: '
                    "the evaluator's `ann_file` is not the data set's."
                )
            prediction.update(image_id=image, category_id=self._categories[prediction['category_id']])
        return super().loadRes(predictions)


#: Size of an image that was not predicted.
_ANY = (float('inf'), float('inf'))


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
