"""The data set: a verified COCO file, its pictures, and errors of a pipeline that say where they come from."""

import os
import traceback
from collections.abc import Sequence
from typing import Any

from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmengine.logging import print_log

from dino_mm.registry import DATASETS

from .coco_file import CocoFile, log_findings, read_coco_file
from .coco_pictures import is_local, missing_pictures, read_sizes
from .coco_rules import AnnotationError, Findings, Id, has_area_inside, passes_size
from .loading import UnreadableImageError, UnsupportedImageError
from .skipped import SkippedPictures


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """mmdet's ``CocoDataset`` over a verified file, see :func:`read_coco_file`; all checks are off the training loop.

    - Label i is ``metainfo['classes'][i]``, whatever the order of the file's categories.
    - An error in the pipeline names the image, the transform and what it was given.
    - ``filter_empty_gt`` also removes images whose annotations are all crowd or all left out.

    Args:
        *args, **kwargs: Of mmdet's ``CocoDataset``.
        on_fault: 'error' refuses a file with faults, naming them all; 'drop' leaves faulty entries out, with a count.
        on_unreadable: 'error' ends a training at a picture that cannot be read; 'skip' takes another one at random,
            names the picture once, and ends the training when that happens to more than 1 % of the pictures read.

    Raises:
        ValueError: ``on_unreadable`` is something else, or 'skip' in a test, whose figures would be of other pictures.
    """

    def __init__(self, *args: Any, on_fault: str = 'error', on_unreadable: str = 'error', **kwargs: Any) -> None:
        self.on_fault = on_fault
        self.skipped: SkippedPictures | None = None
        self.on_unreadable = on_unreadable
        if on_unreadable != 'error' and (on_unreadable != 'skip' or kwargs.get('test_mode', False)):
            raise ValueError(
                f"`on_unreadable` of a data set is 'error' or, in training, 'skip', not {on_unreadable!r}"
                f'{" in a test" if on_unreadable == "skip" else ""}.'
            )
        super().__init__(*args, **kwargs)

    def full_init(self) -> None:
        """Read the file, unless that is done."""
        if self._fully_initialized:
            return
        super().full_init()
        if self.on_unreadable == 'skip':
            self.skipped = SkippedPictures(len(self))

    def load_data_list(self) -> list[dict]:
        """Read and verify the annotations, and look which pictures there are."""
        file = read_coco_file(self.ann_file, self.on_fault, self.backend_args, needs_annotations=not self.test_mode)
        classes = self.metainfo['classes']
        self.cat_ids = file.category_ids(classes)
        self.cat2label = {category: label for label, category in enumerate(self.cat_ids)}
        self.findings = Findings(self.ann_file)
        file.note_classes(classes, self.findings)
        self._check_pictures(file)
        self.cat_img_map = _images_of_categories(file, self.cat_ids)
        data_list = [
            self.parse_data_info({'raw_img_info': image, 'raw_ann_info': file.by_image.get(image['id'], [])})
            for image in file.images
        ]
        log_findings(self.findings)
        # A metric of the same process finds the file here; in training it would only take memory.
        self.coco_file = file if self.test_mode else None
        return data_list

    def parse_data_info(self, raw_data_info: dict) -> dict:
        """Parse one image and its annotations, counting what is left out."""
        image = raw_data_info['raw_img_info']
        data_info = super().parse_data_info({'raw_img_info': {**image, 'img_id': image['id']}, 'raw_ann_info': []})
        for annotation in raw_data_info['raw_ann_info']:
            label = self.cat2label.get(annotation['category_id'])
            if label is None:
                continue
            x, y, width, height = annotation['bbox']
            if not has_area_inside(annotation['bbox'], image['width'], image['height']):
                self.findings.add('no-box-area', f'annotation {annotation["id"]} of image {image["id"]}')
                continue
            if width < 1 or height < 1:
                self.findings.add('tiny-box', f'annotation {annotation["id"]} of image {image["id"]}')
                continue
            if passes_size(annotation['bbox'], image['width'], image['height']):
                self.findings.add('passes-picture', f'annotation {annotation["id"]} of image {image["id"]}')
            instance = dict(ignore_flag=annotation['iscrowd'], bbox=[x, y, x + width, y + height], bbox_label=label)
            if annotation.get('segmentation'):
                instance['mask'] = annotation['segmentation']
            data_info['instances'].append(instance)
        return data_info

    def filter_data(self) -> list[dict]:
        """Apply ``filter_cfg``."""
        data_list = super().filter_data()
        if self.test_mode or not (self.filter_cfg or {}).get('filter_empty_gt', False):
            return data_list
        kept = [d for d in data_list if any(not i['ignore_flag'] for i in d['instances'])]
        if not kept:
            raise AnnotationError(f'{self.ann_file}: none of {len(self.data_list)} images has a box to train on.')
        print_log(
            f'{self.ann_file}: {len(self.data_list) - len(kept)} images without boxes removed, {len(kept)} left',
            logger='current',
        )
        return kept

    def require_pictures(self) -> None:
        """Raise AnnotationError if pictures were missing when the data set was made; runners ask before they start."""
        self.findings.raise_faults(self.on_fault)

    def prepare_data(self, idx: int) -> Any:
        """Run the pipeline on one image; an error in it names the image and the transform.

        None stands for a picture that is skipped: the data set goes on with another one.
        """
        try:
            sample = super().prepare_data(idx)
            if self.skipped is not None:
                self.skipped.count_read()
            return sample
        except Exception as error:
            info = self.get_data_info(idx)
            if self.skipped is not None and isinstance(error, UnreadableImageError):
                self.skipped.skip(idx, info['img_id'], error)
                return None
            raise RuntimeError(
                f'Cannot prepare image id {info["img_id"]} ({info["img_path"]}): '
                + describe_failure(error, self.pipeline.transforms, self.ann_file)
            ) from error

    def _check_pictures(self, file: CocoFile) -> None:
        folder = self.data_prefix['img']
        unknown = read_sizes(file, folder, self.findings, self.backend_args)
        if unknown:
            self.findings.raise_faults(self.on_fault)
        missing: set[Id] = set()
        if is_local(folder, self.backend_args):
            for image in missing_pictures(file, folder):
                missing.add(image['id'])
                self.findings.add('missing-picture', f'id {image["id"]} ({os.path.join(folder, image["file_name"])})')
        if self.on_fault == 'drop' and unknown | missing:
            file.leave_out(unknown | missing)
            self.findings.dropped = True


def describe_failure(error: Exception, transforms: Sequence[Any], ann_file: str) -> str:
    """In words: which transform failed, on what, why, and what to do.

    Args:
        error: What a pipeline raised.
        transforms: The pipeline's outermost transforms.
        ann_file: The file that lists the image.
    """
    failed, results = None, None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get('self')
        if isinstance(owner, BaseTransform) or any(owner is transform for transform in transforms):
            failed, results = owner, frame.f_locals.get('results')
    why = f'{type(error).__name__}: {error}'.rstrip('.')
    loading = isinstance(failed, LoadImageFromFile)
    if failed is None:
        return f'{why}.'
    image = results.get('img') if isinstance(results, dict) else None
    given = '' if image is None else f' on an image of {image.dtype}, shape {image.shape}'
    advice = ''
    if loading and not isinstance(error, UnsupportedImageError):
        advice = f' If the file is missing or damaged, replace it, or remove the image from {ann_file}.'
    return f'{type(failed).__name__} failed{given}. {why}.{advice}'


def _images_of_categories(file: CocoFile, categories: Sequence[Id]) -> dict[Id, list[Id]]:
    """Category -> its images, one entry for each object; mmdet's samplers and filters read it."""
    images: dict[Id, list[Id]] = {category: [] for category in categories}
    for annotation in file.annotations:
        if annotation['category_id'] in images:
            images[annotation['category_id']].append(annotation['image_id'])
    return images
