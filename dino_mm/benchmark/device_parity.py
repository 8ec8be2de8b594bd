"""Whether a device computes what a CPU does, in float64, in every way that the model can run.

The reference is detrex's, where its goldens are at hand (``tests/parity.py`` of a checkout), else the same model on the
CPU, which the tests hold equal to them.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from mmdet.structures import SampleList
from torch import Tensor

from dino_mm.engine.compilation import compile_detector
from dino_mm.registry import MODELS

from .comparison import make_batch, read_config
from .gpu_parts import R50, Plan, Row

SWIN = 'dino-swin/dino_swin_tiny_224_4scale_12ep.py'
INTERNIMAGE = 'dino-internimage/dino_internimage_tiny_4scale_12ep.py'
#: Config, name of detrex's architecture, golden of a detection or of a training step.
GOLDENS = (
    (R50, 'dino_r50_4scale', 'eval/dino_r50_4scale.npz', None),
    (INTERNIMAGE, 'dino_internimage_tiny_4scale', 'eval/dino_internimage_tiny_4scale.npz', None),
    (SWIN, 'dino_swin_tiny_224_4scale', 'train/dino_swin_tiny_224_4scale.json', 'both'),
    (R50, 'dino_r50_4scale', 'train/dino_r50_4scale.json', 'both'),
)
#: Relative to the largest number of a kind; what tests allow on a CPU, whose sums are in another order.
TOLERANCE = 1e-5
Values = dict[str, Tensor]


class Case(NamedTuple):
    """A model with its input, and what it should give."""

    name: str
    model: Any
    """In float64 on the CPU."""
    inputs: Tensor
    samples: SampleList
    training: bool
    expected: Values


def use_channels_last(model: Any) -> None:
    """As ``model.channels_last=True`` in the config."""
    model.channels_last = True
    model.backbone.to(memory_format=torch.channels_last)
    model.neck.to(memory_format=torch.channels_last)


#: How a model may run, each on top of the one before.
WAYS: dict[str, Callable[[Any, Plan], Any]] = {
    'eager': lambda model, plan: None,
    'channels last': lambda model, plan: use_channels_last(model),
    'and compiled': lambda model, plan: compile_detector(model, backend=plan.parity_compiler),
}


def parity(plan: Plan, goldens: ModuleType | None) -> Iterator[Row]:
    """The largest difference of each case in each way."""
    for case in golden_cases(goldens) if goldens else own_cases(plan):
        model = case.model.to(plan.device)
        samples = [sample.to(plan.device) for sample in case.samples]
        for way, change in WAYS.items():
            change(model, plan)
            name, difference = largest_difference(
                values(model, case.inputs.to(plan.device), samples, case.training), case.expected
            )
            equal = difference <= TOLERANCE
            text = f'{case.name}, {way}: {"equal" if equal else "DIFFERS"}, {difference:.1e} in {name}'
            yield Row(text, dict(case=case.name, way=way, equal=equal, difference=difference, where=name))


def values(model: Any, inputs: Tensor, samples: SampleList, training: bool) -> Values:
    """What is compared: losses and the norm of all gradients, or detections by rank; on the CPU."""
    model.train(training)
    if not training:
        with torch.no_grad():
            found = model(inputs, samples, mode='predict')[0].pred_instances
        return {name: found[name].detach().cpu().double() for name in ('scores', 'labels', 'bboxes')}
    model.zero_grad()
    losses = model(inputs, samples, mode='loss')
    sum(losses.values()).backward()
    losses['gradients'] = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return {name: loss.detach().cpu().double() for name, loss in losses.items()}


def largest_difference(actual: Values, expected: Values) -> tuple[str, float]:
    """Name and size of the largest difference, relative to the largest number of that name, or to 1e-3."""
    differences = {
        name: float((actual[name] - value).abs().max() / value.abs().max().clamp(min=1e-3))
        for name, value in expected.items()
    }
    return max(differences.items(), key=lambda item: item[1])


def golden_cases(goldens: ModuleType) -> Iterator[Case]:
    """With detrex's numbers."""
    for config, arch, name, case in GOLDENS:
        options = {'model.backbone.drop_path_rate': 0.0} if config == SWIN else {}
        model = MODELS.build(read_config(config, options).model).double()
        model.load_state_dict(goldens.rule_state(arch))
        golden = goldens.golden(name)[case] if case else goldens.golden(name)
        sizes = golden['image_sizes_hw'] if case else [(256, 320)]
        seeds = (3001, 3002) if case else (2022,)
        inputs, samples = goldens.batch([goldens.image(s, *size) for s, size in zip(seeds, sizes, strict=True)])
        if case:
            goldens.add_gts(samples, golden['gt_boxes_xyxy_px'], golden['gt_classes'])
            quiet(model)
            expected = {our_name(key): torch.tensor(value).double() for key, value in golden['losses'].items()}
        else:
            keys = {'scores': 'det_scores', 'labels': 'det_labels', 'bboxes': 'det_boxes'}
            # The repository's part of the goldens leaves some boxes out.
            expected = {key: torch.from_numpy(golden[of]).double() for key, of in keys.items() if of in golden}
        yield Case(name, model, inputs, samples, case is not None, expected)


def own_cases(plan: Plan) -> Iterator[Case]:
    """With the numbers of the CPU, whose weights are random."""
    for training in (False, True):
        torch.manual_seed(plan.base.seed)
        model = MODELS.build(read_config(plan.base.config, plan.base.cfg_options).model).double()
        quiet(model)
        small = replace(plan.base, height=min(plan.base.height, 256), width=min(plan.base.width, 320), device='cpu')
        inputs, samples = make_batch(small, model.bbox_head.num_classes)
        expected = values(model, inputs.double(), samples, training)
        yield Case('training' if training else 'detection', model, inputs.double(), samples, training, expected)


def quiet(model: Any) -> None:
    """No noise: random numbers of devices differ."""
    model.denoising.label_noise_ratio = model.denoising.box_noise_scale = 0.0


def our_name(name: str) -> str:
    """Our name of one of detrex's losses, such as ``loss_class_dn_0``."""
    kind, dn, layer = re.findall(r'^loss_([a-z]+?)(_dn)?(?:_(\d|enc))?$', name.replace('class', 'cls'))[0]
    prefix = {'': '', 'enc': 'enc_'}.get(layer, f'd{layer}.')
    return f'{prefix}{"dn_" if dn else ""}loss_{dict(giou="iou").get(kind, kind)}'
