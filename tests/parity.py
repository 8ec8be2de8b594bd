"""Reference goldens of detrex, and the rule that makes a model's weights from tensor names and shapes alone.

The goldens in ``tests/data/parity`` are a small part of a larger set; where the whole set lies beside the repository,
it is used instead (:func:`golden`).
"""

import gzip
import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor

SMALL = Path(__file__).parent / 'data' / 'parity'
FULL = Path(__file__).resolve().parents[2] / 'shared' / 'parity'

MEAN = np.float32([123.675, 116.28, 103.53])
STD = np.float32([58.395, 57.12, 57.375])


def rule_weights(name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Value of a tensor by its detrex name and shape; None: stays as initialised."""
    if name.endswith(('num_batches_tracked', 'sampling_offsets.bias')):
        return None
    z = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)
    last = name.split('.')[-1]
    if last == 'running_var':
        value = 1 + 0.1 * np.abs(z)
    elif last == 'running_mean':
        value = 0.1 * z
    elif name.endswith('sampling_offsets.weight'):
        value = 0.1 * z / np.sqrt(np.prod(shape[1:]))
    elif re.search(r'(^|\.)class_embed\.\d+\.bias$', name):
        value = -3 + 0.5 * z
    elif 'gamma' in last or 'layer_scale' in last:
        value = 0.1 + 0.02 * z
    elif len(shape) <= 1:
        value = 1 + 0.05 * z if last == 'weight' else 0.05 * z
    else:
        value = z / np.sqrt(np.prod(shape[1:]))
    return 0.3 * value if re.search(r'(^|\.)bbox_embed\.\d+\.layers\.2\.', name) else value


def rule_state(arch: str, prefix: str = '') -> dict[str, Tensor]:
    """Detrex's state dict of ``arch`` with the rule's weights, in float64; names that begin with ``prefix``."""
    keys = golden(f'keys/{arch}.json')
    state = {}
    for name, shape in keys['tensors'].items():
        if not name.startswith(prefix) or name in keys['aliases'] or name in keys['non_float32']:
            continue
        value = rule_weights(name, tuple(shape))
        state[name] = grid_bias(*shape) if value is None else torch.from_numpy(np.asarray(value))
    for alias, name in keys['aliases'].items():
        if alias.startswith(prefix):
            state[alias] = state[name]
    return state


def grid_bias(length: int, num_heads: int = 8, num_points: int = 4) -> Tensor:
    """The sampling offsets' bias as deformable attention starts: a ring of directions, one step further a point."""
    angles = torch.arange(num_heads, dtype=torch.float32) * (2.0 * math.pi / num_heads)
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    directions = directions / directions.abs().max(-1, keepdim=True).values
    steps = torch.arange(1, num_points + 1)[:, None]
    ring = directions[:, None, None] * steps
    return ring.expand(-1, length // (num_heads * num_points * 2), -1, -1).flatten().double()


def image(seed: int, height: int, width: int) -> np.ndarray:
    """Synthetic RGB image (height, width, 3) uint8."""
    rng = np.random.Generator(np.random.PCG64(seed))
    blocks = rng.standard_normal((height // 16 + 1, width // 16 + 1, 3))
    full = np.kron(blocks, np.ones((16, 16, 1)))[:height, :width]
    return np.clip(127 + 40 * full, 0, 255).astype(np.uint8)


def batch(images: list[np.ndarray]) -> tuple[Tensor, list[DetDataSample]]:
    """Normalised images in float64, padded with 0, and their data samples."""
    height = max(img.shape[0] for img in images)
    width = max(img.shape[1] for img in images)
    inputs = torch.zeros(len(images), 3, height, width, dtype=torch.float64)
    samples = []
    for i, img in enumerate(images):
        normalized = (img.astype(np.float64) - MEAN) / STD
        inputs[i, :, : img.shape[0], : img.shape[1]] = torch.from_numpy(normalized.transpose(2, 0, 1))
        meta = dict(
            img_id=i,
            img_shape=img.shape[:2],
            ori_shape=img.shape[:2],
            batch_input_shape=(height, width),
            scale_factor=(1.0, 1.0),
        )
        samples.append(DetDataSample(metainfo=meta))
    return inputs, samples


def add_gts(samples: list[DetDataSample], boxes: list, labels: list) -> list[DetDataSample]:
    """Attach ground truth: boxes xyxy in pixels, labels."""
    for sample, image_boxes, image_labels in zip(samples, boxes, labels, strict=True):
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor(image_boxes, dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor(image_labels, dtype=torch.long),
        )
    return samples


def flat_sample(tensor: Tensor, count: int) -> Tensor:
    """``count`` values at evenly spaced flat indices, the first and last included."""
    return tensor.flatten()[torch.linspace(0, tensor.numel() - 1, count, dtype=torch.float64).long()]


def golden(name: str) -> Any:
    """Load ``name`` (``.npz`` or ``.json``) from the full set, else from the small one, where texts are compressed."""
    path = next(path for path in (FULL / name, SMALL / name, SMALL / f'{name}.gz') if path.exists())
    if path.suffix == '.gz':
        return json.loads(gzip.decompress(path.read_bytes()))
    if path.suffix == '.json':
        return json.loads(path.read_text())
    with np.load(path) as arrays:
        return dict(arrays)
