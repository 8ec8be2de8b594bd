"""Sampling points and reference boxes of queries."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model_cfg
from mmdet.apis import inference_detector
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

import dino_mm
from dino_mm.datasets.loading import UnreadableImageError
from dino_mm.models import DINO
from dino_mm.registry import MODELS
from dino_mm.visualization.queries import draw_queries, trace_decoder

SIZE = (150, 90)


@pytest.fixture
def model() -> DINO:
    """An untrained detector whose boxes differ, for images that are padded."""
    config = Config.fromfile(dino_mm.cfg('dino_digits'))
    config.model = tiny_model_cfg()
    config.model.data_preprocessor.pad_size_divisor = 64
    torch.manual_seed(0)
    detector = MODELS.build(config.model).eval()
    for parameter in detector.bbox_head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    detector.cfg = config
    init_default_scope('mmdet')  # as `get_model` does
    return detector


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (SIZE[1], SIZE[0], 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'image.png')
    return tmp_path / 'image.png'


def test_points_lie_where_the_offsets_say(model: DINO, image: Path) -> None:
    """Offsets of (x, y) move a point by so many half sizes of the reference box, divided by the number of points."""
    x, y = 0.7, -1.3
    for layer in model.decoder.layers:
        offsets = layer.cross_attn.sampling_offsets
        torch.nn.init.zeros_(offsets.weight)
        offsets.bias.data = torch.tensor([x, y]).repeat(len(offsets.bias) // 2)
    trace = trace_decoder(model, image)
    assert len(trace.points) == len(trace.weights) == model.decoder.num_layers == len(trace.references) - 1 == 2
    num_points = model.decoder.layers[0].cross_attn.num_points
    for reference, points, weights in zip(trace.references, trace.points, trace.weights, strict=False):
        assert points.shape == (12, 2, 3, num_points, 2)
        expected = reference[:, :2] + torch.tensor([x, y]) * reference[:, 2:] / 2 / num_points
        torch.testing.assert_close(points, expected[:, None, None, None].expand_as(points))
        torch.testing.assert_close(weights.sum((2, 3)), torch.ones(12, 2))
    assert (trace.references[0] - trace.references[2]).abs().max() > 0.01


def test_scores_are_those_of_the_detections(model: DINO, image: Path) -> None:
    trace = trace_decoder(model, image)
    detected = inference_detector(model, str(image)).pred_instances.scores
    expected = trace.scores.flatten().topk(10).values
    assert set(detected.tolist()) <= set(expected.tolist())  # boxes without area inside the image are left out
    assert len(detected) > 0


def test_the_model_is_as_before(model: DINO, image: Path) -> None:
    before = inference_detector(model, str(image)).pred_instances
    trace_decoder(model, image)
    for layer in model.decoder.layers:
        assert 'sampling_locations' not in vars(layer.cross_attn)
    assert not any(module._forward_hooks for module in model.modules())
    after = inference_detector(model, str(image)).pred_instances
    assert torch.equal(before.bboxes, after.bboxes)
    with pytest.raises(UnreadableImageError):
        trace_decoder(model, image.with_name('none.png'))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize('num_queries', [2, 99])
def test_picture_has_a_panel_for_each_query_and_layer(
    num_queries: int, model: DINO, image: Path, tmp_path: Path
) -> None:
    out = tmp_path / 'new' / 'queries.png'
    draw_queries(model, image, out, num_queries)
    picture = Image.open(out)
    rows = min(num_queries, 12)
    assert picture.size == (round(2.5 * 2 * 110), round((2.5 * rows + 0.8) * 110))
    pixels = np.asarray(picture.convert('RGB')).astype(int)
    assert (np.abs(pixels - [0xFF, 0x30, 0x30]).max(-1) < 30).any()  # a refined box


def test_only_dino() -> None:
    with pytest.raises(TypeError, match='traced in a DINO, not in a Linear'):
        trace_decoder(torch.nn.Linear(1, 1), 'image.png')
