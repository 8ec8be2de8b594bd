"""Switches of speed and memory: they change no numbers, or by a stated amount, and do what they promise."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import build_detector as build
from conftest import make_samples
from mmdet.models import DetDataPreprocessor
from mmdet.structures import DetDataSample
from mmengine.config import Config
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import pad

from dino_mm.models import DINO
from dino_mm.models.layers.attention import DeformableAttention
from dino_mm.models.layers.tokens import measure_levels
from dino_mm.models.structures import collate_targets

PADDED = ((64, 96), (48, 64))


def training_step(model: DINO) -> dict[str, Tensor]:
    """Losses, and gradients by parameter name."""
    torch.manual_seed(1)
    inputs, samples = make_samples((2, 1), sizes=PADDED)
    losses = model.loss(inputs.double(), samples)
    sum(losses.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**{k: v.detach() for k, v in losses.items()}, **grads}


# Activation checkpointing


@pytest.mark.parametrize('dropout', [0.0, 0.3])
def test_checkpointing_changes_nothing(dropout: float, tiny_cfg: Config) -> None:
    for part in (tiny_cfg.encoder, tiny_cfg.decoder):
        part.dropout = dropout
    kept = training_step(build(tiny_cfg))
    tiny_cfg.encoder.num_cp, tiny_cfg.decoder.num_cp = 1, 1
    torch.testing.assert_close(training_step(build(tiny_cfg)), kept, rtol=0, atol=0)


def test_a_checkpointed_layer_keeps_nothing(tiny_cfg: Config) -> None:
    """But its input tensors; and each one lets the same number of tensors go."""
    saved = {part: [count_saved(tiny_cfg, part, num_cp) for num_cp in range(4)] for part in ('encoder', 'decoder')}
    for counts in saved.values():
        steps = [counts[i] - counts[i + 1] for i in range(3)]
        assert steps[0] > 10
        assert steps == [steps[0]] * 3
    assert saved['encoder'][3] == 3 * len(['query', 'reference'])
    # Besides: the branches that refine the boxes, the position queries, the norm.
    assert saved['decoder'][3] < saved['decoder'][0] / 2


def count_saved(cfg: Config, part: str, num_cp: int) -> int:
    """Tensors that three layers of the encoder or of the decoder save for the gradients."""
    cfg[part].update(num_layers=3, num_cp=num_cp)
    model = build(cfg)
    inputs, samples = make_samples((1, 1), sizes=PADDED)
    tokens = model.pre_transformer(model.extract_feat(inputs.double()), samples)
    memory = model.forward_encoder(tokens)
    selection, _ = model.pre_decoder(memory, tokens)
    count = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if part == 'encoder':
            model.forward_encoder(tokens)
        else:
            model.forward_decoder(memory, tokens, selection)
    return count


@pytest.mark.parametrize(('part', 'num_cp'), [('encoder', 2), ('decoder', 3), ('decoder', -1)])
def test_number_of_checkpointed_layers_is_checked(part: str, num_cp: int, tiny_cfg: Config) -> None:
    tiny_cfg[part].num_cp = num_cp
    layers = tiny_cfg[part].num_layers
    with pytest.raises(ValueError, match=f'`num_cp` is {num_cp}, but there are {layers} layers: set .* 0 to {layers}'):
        build(tiny_cfg)


# Half precision


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_geometry_and_losses_stay_float32_under_autocast(
    dtype: torch.dtype, tiny_cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_cfg.denoising.update(label_noise_ratio=0, box_noise_scale=0)
    tiny_cfg.encoder.num_cp = tiny_cfg.decoder.num_cp = 1
    model = build(tiny_cfg).float()
    inputs, samples = make_samples((2, 1), sizes=PADDED)
    full = model.loss(inputs, samples)
    islands: dict[str, list[Tensor]] = {}

    def spy(owner: object, method: str) -> None:
        original: Callable = getattr(owner, method)

        def spying(*args, **kwargs):
            result = original(*args, **kwargs)
            islands.setdefault(method, []).append(result)
            return result

        monkeypatch.setattr(owner, method, spying)

    matcher = model.bbox_head.criterion.matcher
    parts = [
        (DeformableAttention, 'sampling_locations'),
        (matcher, 'cost'),
        (model.positional_encoding, 'forward'),
        (model, 'pre_transformer'),
        (model, 'pre_decoder'),
        (model, 'forward_decoder'),
    ]
    for owner, method in parts:
        spy(owner, method)
    model.bbox_head.register_forward_hook(lambda head, args, output: islands.update(predictions=list(output)))
    with torch.autocast('cpu', dtype=dtype):
        losses = model.loss(inputs, samples)
        sum(losses.values()).backward()

    (tokens,) = islands.pop('pre_transformer')
    assert tokens.features.dtype is dtype  # autocast is on, and the rest below is no accident
    ((selection, denoising),) = islands.pop('pre_decoder')
    (states,) = islands.pop('forward_decoder')
    islands['tokens'] = [tokens.positions, tokens.centers, tokens.levels.valid_ratios]
    islands['boxes'] = [selection.reference, selection.boxes, denoising.reference, *states.references]
    islands['losses'] = list(losses.values())
    assert len(islands['sampling_locations']) == 1 + 2 + 2  # two are computed again for the gradients
    for name, tensors in islands.items():
        assert {tensor.dtype for tensor in tensors} == {torch.float32}, name
        assert all(tensor.isfinite().all() for tensor in tensors), name
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in model.parameters())
    total, expected = sum(losses.values()).item(), sum(full.values()).item()
    assert total == pytest.approx(expected, rel=0.02)


# Compilation


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_parts(model: DINO, backend: str) -> None:
    """As the detector's documentation says."""
    model.backbone.compile(fullgraph=True, backend=backend)
    model.forward_transformer = torch.compile(model.forward_transformer, fullgraph=True, backend=backend)


@pytest.mark.usefixtures('_fresh_dynamo')
@pytest.mark.parametrize(
    ('sizes', 'selector', 'backend'),
    [
        pytest.param(None, 'dino_mm.MixedQuerySelector', 'aot_eager', marks=pytest.mark.slow),
        (PADDED, 'dino_mm.MixedQuerySelector', 'eager'),
        (PADDED, 'dino_mm.PureQuerySelector', 'eager'),
        (None, None, 'eager'),
    ],
)
def test_inference_compiles_without_graph_breaks(
    sizes: tuple | None, selector: str | None, backend: str, tiny_cfg: Config
) -> None:
    tiny_cfg.query_selector = selector and dict(type=selector)
    model = build(tiny_cfg).eval()
    inputs, samples = make_samples((1, 1), sizes=sizes)
    names = list(model.state_dict())
    with torch.no_grad():
        expected = [dict(sample.pred_instances.items()) for sample in model.predict(inputs.double(), samples)]
        compile_parts(model, backend)
        actual = [dict(sample.pred_instances.items()) for sample in model.predict(inputs.double(), samples)]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    assert list(model.state_dict()) == names


@pytest.mark.slow
@pytest.mark.usefixtures('_fresh_dynamo')
def test_a_training_step_compiles_up_to_the_head(tiny_cfg: Config) -> None:
    tiny_cfg.encoder.num_cp = tiny_cfg.decoder.num_cp = 1
    tiny_cfg.denoising.update(label_noise_ratio=0, box_noise_scale=0)
    model = build(tiny_cfg)
    expected = training_step(model)
    model.zero_grad()
    compile_parts(model, 'aot_eager')
    torch.testing.assert_close(training_step(model), expected, rtol=0, atol=1e-8)


@pytest.mark.usefixtures('_fresh_dynamo')
def test_images_of_all_sizes_share_one_graph_in_batches_of_a_fixed_size(tiny_cfg: Config) -> None:
    """After the first batch, whose sizes torch takes for constants."""
    model = build(tiny_cfg).eval()
    counter = CompileCounter()
    compiled = torch.compile(model.forward_transformer, fullgraph=True, backend=counter)
    feats = model.extract_feat(torch.randn(2, 3, 96, 128, dtype=torch.float64))
    graphs = []
    with torch.no_grad():
        for sizes in (((64, 96), (48, 64)), ((96, 70), (50, 128)), ((33, 34), (95, 127)), ((64, 96), (80, 40))):
            samples = make_samples((0, 0), sizes=sizes)[1]
            for sample in samples:
                sample.set_metainfo(dict(batch_input_shape=(96, 128)))
            torch.testing.assert_close(
                compiled(feats, samples)['references'],
                model.forward_transformer(feats, samples)['references'],
                rtol=0,
                atol=1e-9,
            )
            graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2, 2]


class Detector(nn.Module):
    """From images of one size to the decoder's output and boxes."""

    def __init__(self, model: DINO) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model.forward_transformer(self.model.extract_feat(inputs))
        return output['hidden_states'], output['references'][-1]


def test_a_detector_is_exported_for_all_sizes(tiny_cfg: Config) -> None:
    """With deformable sampling as one operator a layer."""
    detector = Detector(build(tiny_cfg).eval())
    height, width = (32 * torch.export.Dim(name, min=2, max=8) for name in ('rows', 'columns'))
    with torch.no_grad():
        inputs = torch.randn(2, 3, 64, 96, dtype=torch.float64)
        program = torch.export.export(detector, (inputs,), dynamic_shapes=({2: height, 3: width},))
        names = [str(node.target) for node in program.graph.nodes if node.op == 'call_function']
        assert names.count('dino_mm.sample_levels.default') == 1 + 2
        assert not any('grid_sampler' in name for name in names)
        for size in ((64, 96), (128, 64), (160, 224)):
            inputs = torch.randn(2, 3, *size, dtype=torch.float64)
            torch.testing.assert_close(program.module()(inputs), detector(inputs), rtol=0, atol=1e-9)


@pytest.mark.slow
def test_a_detector_is_compiled_ahead_of_time(tiny_cfg: Config, tmp_path: Path) -> None:
    detector = Detector(build(tiny_cfg).eval())
    inputs = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        program = torch.export.export(detector, (inputs,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / 'detector.pt2'))
        loaded = torch._inductor.aoti_load_package(path)
        for example in (inputs, torch.randn_like(inputs)):
            # Proposals are float32, and its logarithm is off by 2.4e-7 in compiled code.
            torch.testing.assert_close(tuple(loaded(example)), detector(example), rtol=0, atol=1e-6)


# Memory format


def test_channels_last_changes_the_layout_and_no_numbers(tiny_cfg: Config) -> None:
    plain = build(tiny_cfg)
    expected = training_step(plain)
    tiny_cfg.channels_last = True
    model = build(tiny_cfg)
    model.load_state_dict(plain.state_dict())
    inputs = make_samples((1, 1))[0].double()
    feats = model.extract_feat(inputs)
    convolutions = [m for part in (model.backbone, model.neck) for m in part.modules() if hasattr(m, 'kernel_size')]
    weights = [m.weight for m in convolutions if isinstance(m, torch.nn.Conv2d)]
    assert len(weights) > 20
    for tensor in (*feats, *weights):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert not plain.extract_feat(inputs)[0].is_contiguous(memory_format=torch.channels_last)
    actual = training_step(model)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-9, msg=name)


# Batches of a fixed size


def preprocess(options: dict, training: bool, sizes: tuple = PADDED) -> tuple[Tensor, list[DetDataSample]]:
    """Images, 255 everywhere, as mmdet's preprocessor pads them."""
    samples = make_samples((2, 1), sizes=sizes)[1]
    images = [torch.full((3, *size), 255, dtype=torch.uint8) for size in sizes]
    preprocessor = DetDataPreprocessor(mean=[0, 0, 0], std=[255, 255, 255], **options)
    data = preprocessor(dict(inputs=images, data_samples=samples), training=training)
    return data['inputs'], data['data_samples']


@pytest.mark.parametrize(
    ('options', 'training', 'shape'),
    [
        (dict(batch_augments=[dict(type='mmdet.BatchFixedSizePad', size=(96, 128))]), True, (96, 128)),
        (dict(pad_size_divisor=128), True, (128, 128)),
        (dict(pad_size_divisor=128), False, (128, 128)),
    ],
)
def test_padding_to_a_fixed_size_is_masked(options: dict, training: bool, shape: tuple[int, int]) -> None:
    inputs, samples = preprocess(options, training)
    boxes = [sample.gt_instances.bboxes for sample in samples]
    assert inputs.shape[-2:] == shape
    maps = [inputs, inputs[..., ::16, ::16]]
    levels, _, padding = measure_levels(maps, samples)
    parts = padding.split([x.shape[2] * x.shape[3] for x in maps], 1)
    mask, coarse = (part.view(-1, *x.shape[2:]) for part, x in zip(parts, maps, strict=True))
    sizes = levels.valid_ratios * levels.sizes
    assert torch.equal(mask, inputs[:, 0] == 0)  # every pixel of the images is 1, of the padding 0
    assert torch.equal(coarse, mask[:, ::16, ::16])
    assert sizes.tolist() == [[[96, 64], [6, 4]], [[64, 48], [4, 3]]]
    targets = collate_targets(samples, 5)
    for i, (height, width) in enumerate(PADDED):
        corners = torch.cat([(boxes[i][:, :2] + boxes[i][:, 2:]) / 2, boxes[i][:, 2:] - boxes[i][:, :2]], 1)
        torch.testing.assert_close(targets.boxes[i, : len(boxes[i])], corners / torch.tensor([width, height] * 2))


def test_padding_reaches_the_predictions_only_through_the_position_queries(tiny_cfg: Config) -> None:
    """The decoder embeds boxes in parts of the padded map, as detrex does. All else, gradients too, stays the same.

    That is, from the neck on: convolutions and norms before it do see the zeros beside the image.
    """
    model = build(tiny_cfg)
    inputs, samples = make_samples((2, 1))
    feats = [feat.detach().requires_grad_() for feat in model.extract_feat(inputs.double())]
    torch.nn.init.zeros_(model.decoder.ref_point_head.layers[-1].weight)
    constant, constant_grads = with_and_without_padding(model, feats, samples)
    torch.testing.assert_close(constant[0], constant[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(constant_grads[0], constant_grads[1], rtol=1e-5, atol=1e-5)
    assert all(grad.abs().max() > 0.01 for grad in constant_grads[0])

    torch.nn.init.normal_(model.decoder.ref_point_head.layers[-1].weight)
    (plain, padded), _ = with_and_without_padding(model, feats, samples)
    torch.testing.assert_close(plain['selected'], padded['selected'], rtol=0, atol=1e-5)
    assert (plain['refined'] - padded['refined']).abs().max() > 1e-3


def with_and_without_padding(model: DINO, feats: list[Tensor], samples: list[DetDataSample]) -> tuple[list, list]:
    """Boxes, and gradients of a function of them with respect to ``feats``, for images of 64 x 96 pixels."""
    boxes, grads = [], []
    for height, width in ((64, 96), (96, 160)):
        for sample in samples:
            sample.set_metainfo(dict(batch_input_shape=(height, width)))
        strides = [64 // feat.shape[2] for feat in feats]
        maps = tuple(
            pad(feat, (0, (width - 96) // stride, 0, (height - 64) // stride), value=7.0)
            for feat, stride in zip(feats, strides, strict=True)
        )
        states = model.forward_transformer(maps, samples)
        goal = torch.linspace(-1, 1, states['hidden_states'].numel(), dtype=torch.float64)
        grads.append(torch.autograd.grad(states['hidden_states'].flatten() @ goal, feats))
        selected, *refined = states['references']
        boxes.append(dict(selected=selected.detach(), refined=torch.stack(refined).detach()))
    return boxes, grads


def test_a_fixed_size_smaller_than_an_image_is_named() -> None:
    """mmdet's padding states its own size for the batch, even where an image is larger in one direction."""
    options = dict(batch_augments=[dict(type='mmdet.BatchFixedSizePad', size=(48, 128))])
    inputs, samples = preprocess(options, training=True)
    with pytest.raises(ValueError, match=r'image id 0 \(0\.jpg\) has 64 x 96 pixels .* 48 x 128\. .*`size` must be'):
        measure_levels([inputs], samples)
