"""COCO-format detection data that says what it finds wrong."""

import json
import logging
import math
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset
from mmengine.logging import print_log

from dino_mm.registry import DATASETS


def require_annotation_file(path: str, key: str) -> None:
    """Raise FileNotFoundError, naming the config key, if the local file ``path`` is missing."""
    if '://' not in str(path) and not Path(path).is_file():
        raise FileNotFoundError(
            f'There is no annotation file {path}. Correct `{key}`; shipped configs look below the environment '
            'variable DATA_ROOT, by default data/coco/.'
        )


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """mmdet's ``CocoDataset`` with checks, all of them on the host and off the training loop.

    - A missing annotation file, classes that the file does not have, boxes with NaN: errors.
    - An image that cannot be read: an error that names it, as any error of the pipeline does.
    - Boxes without area inside the image, or under one pixel, are dropped, as mmdet does, with a count in the log.
    - ``filter_empty_gt`` also removes images whose annotations are all crowd or all dropped.
    """

    def load_data_list(self) -> list[dict]:
        """Load and check the annotations."""
        require_annotation_file(self.ann_file, 'dataset.ann_file` and `dataset.data_root')
        self._images_with_drops: list[int] = []
        self._num_dropped = 0
        data_list = super().load_data_list()
        if len(self.cat_ids) != len(self.metainfo['classes']):
            self._raise_unknown_classes()
        if self._num_dropped:
            print_log(
                f'{self.ann_file}: dropped {self._num_dropped} degenerate boxes (no area inside the image, or under '
                f'one pixel) in images with id {_shorten(self._images_with_drops)}',
                logger='current',
                level=logging.WARNING,
            )
        return data_list

    def parse_data_info(self, raw_data_info: dict) -> dict:
        """Parse one image's annotations, counting what mmdet drops."""
        image, annotations = raw_data_info['raw_img_info'], raw_data_info['raw_ann_info']
        for annotation in annotations:
            if not all(map(math.isfinite, annotation['bbox'])):
                raise ValueError(
                    f'{self.ann_file}: annotation {annotation["id"]} of image id {image["id"]} '
                    f'({image["file_name"]}) has the box {annotation["bbox"]}. Correct or remove it.'
                )
        data_info = super().parse_data_info(raw_data_info)
        wanted = [a for a in annotations if not a.get('ignore') and a['category_id'] in self.cat2label]
        if len(wanted) > len(data_info['instances']):
            self._num_dropped += len(wanted) - len(data_info['instances'])
            self._images_with_drops.append(image['id'])
        return data_info

    def filter_data(self) -> list[dict]:
        """Apply ``filter_cfg``."""
        data_list = super().filter_data()
        if self.test_mode or not (self.filter_cfg or {}).get('filter_empty_gt', False):
            return data_list
        kept = [d for d in data_list if any(not i['ignore_flag'] for i in d['instances'])]
        if not kept:
            raise ValueError(f'{self.ann_file}: none of {len(self.data_list)} images has a box to train on.')
        print_log(
            f'{self.ann_file}: {len(self.data_list) - len(kept)} images without boxes removed, {len(kept)} left',
            logger='current',
        )
        return kept

    def prepare_data(self, idx: int) -> Any:
        """Run the pipeline on one image; an error in it names the image."""
        try:
            return super().prepare_data(idx)
        except Exception as error:
            info = self.get_data_info(idx)
            raise RuntimeError(
                f'Cannot prepare image id {info["img_id"]} ({info["img_path"]}): {type(error).__name__}: {error}. '
                f'If the file is missing or damaged, replace it, or remove the image from {self.ann_file}.'
            ) from error

    def _raise_unknown_classes(self) -> None:
        names = [category['name'] for category in json.loads(Path(self.ann_file).read_text())['categories']]
        unknown = [name for name in self.metainfo['classes'] if name not in names]
        raise ValueError(
            f'{self.ann_file} has no categories {_shorten(unknown)}; it has {_shorten(names)}. '
            'Set `dataset.metainfo=dict(classes=(...))` to the names in the file.'
        )


def _shorten(items: list, limit: int = 10) -> str:
    """The items in one line, cut off after ``limit``."""
    text = ', '.join(map(str, items[:limit]))
    return text if len(items) <= limit else f'{text}, ... ({len(items)} in all)'
