"""The parts of ``tools/gpu_report.py``: each measures one thing and gives a row as soon as it has one."""

import gc
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from mmdet.structures import SampleList
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dino_mm.engine.compilation import compile_detector
from dino_mm.ops.deformable_sampling import use_backend
from dino_mm.registry import MODELS

from .comparison import Setting, SideName, build_side, make_batch, read_config
from .machine import environment
from .profiling import LABEL_CHECK, OperatorCounter, PeakMemory, stopwatch

R50 = 'dino-resnet/dino_r50_4scale_12ep.py'
SIDES: tuple[SideName, ...] = ('ours', 'mmdet')
#: Files that a wait is traced to.
MODEL_CODE = re.compile(r'/(dino_mm/(?!benchmark)|mmdet/|mmcv/)')
Batch = tuple[Tensor, SampleList]


class Precision(NamedTuple):
    """How a step computes."""

    autocast: torch.dtype | None = None
    tf32: bool = False


PRECISIONS = {
    'fp32': Precision(),
    'tf32': Precision(tf32=True),
    'fp16': Precision(torch.float16, True),
    'bf16': Precision(torch.bfloat16, True),
}


@dataclass(frozen=True)
class Plan:
    """Sizes of everything that is measured."""

    base: Setting
    """Images and boxes; its batch is the smaller of the two that are trained on."""
    large_batch: int = 8
    repeats: int = 8
    precisions: tuple[str, ...] = ('fp32', 'tf32', 'fp16', 'bf16')
    profiled: tuple[str, ...] = ('fp32', 'bf16')
    zoo: tuple[str, ...] = (
        'dino-swin/dino_swin_large_384_5scale_12ep.py',
        'dino-internimage/dino_internimage_large_4scale_12ep.py',
        'dino-vitdet/dino_vitdet_large_4scale_12ep.py',
        'dino-focal/dino_focalnet_large_lrf_384_fl4_5scale_12ep.py',
        'dino-convnext/dino_convnext_large_384_4scale_12ep.py',
    )
    compiler: str = 'inductor'
    #: In float64, which takes minutes to compile: graphs are captured and differentiated, and run as they are.
    parity_compiler: str = 'aot_eager'

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return torch.device(self.base.device)


FULL = Plan(Setting(R50, height=800, width=1333, batch=2, device='cuda', threads=8))
#: A model of little width on a CPU, to see that every part runs; its times mean nothing.
SMALL = Plan(
    Setting(
        R50,
        {
            'model.backbone.depth': 18,
            'model.backbone.base_channels': 8,
            'model.neck.in_channels': [16, 32, 64],
            'model.encoder.num_layers': 1,
            'model.decoder.num_layers': 2,
            'model.encoder.feedforward_channels': 32,
            'model.decoder.feedforward_channels': 32,
            'model.num_queries': 20,
            'model.bbox_head.num_classes': 5,
            'model.test_cfg.max_per_img': 10,
        },
        height=64,
        width=96,
        batch=1,
        threads=1,
    ),
    large_batch=2,
    repeats=2,
    precisions=('fp32', 'bf16'),
    zoo=(R50,),
    compiler='eager',
    parity_compiler='eager',
)


class Row(NamedTuple):
    """Something found."""

    text: str
    """For people."""
    data: dict[str, Any]
    """For the JSON file."""


class Trainee:
    """A model with its optimizer.

    Args:
        model: Ours or MMDetection's, on its device.
        fused: Whether AdamW is one kernel.
    """

    def __init__(self, model: nn.Module, fused: bool = False) -> None:
        self.model: Any = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        # A rate of 0: the weights, and so the work, stay the same in all steps.
        self.optimizer = torch.optim.AdamW(self.parameters, 0.0, weight_decay=1e-4, fused=fused or None)
        # As mmengine's AmpOptimWrapper; steps whose gradients overflow leave the weights alone.
        self.scaler = torch.amp.GradScaler(self.device.type)

    def backward(self, batch: Batch, precision: Precision) -> None:
        """Forward, losses, backward."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        with self.autocast(precision):
            total, _ = self.model.parse_losses(self.model(*batch, mode='loss'))
        scaled = precision.autocast is torch.float16
        (self.scaler.scale(total) if scaled else total).backward()

    def step(self, batch: Batch, precision: Precision) -> None:
        """A training step: :meth:`backward`, clipping, AdamW."""
        self.backward(batch, precision)
        if precision.autocast is torch.float16:
            self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, 0.1)
        if precision.autocast is torch.float16:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    def detect(self, batch: Batch, precision: Precision) -> SampleList:
        """Detections of the batch."""
        with torch.no_grad(), self.autocast(precision):
            return self.model(*batch, mode='predict')

    def autocast(self, precision: Precision) -> AbstractContextManager:
        """The context of a forward pass."""
        if precision.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, precision.autocast)

    def run(self, work: str, batch: Batch, precision: Precision) -> Any:
        """``training``, ``gradients``, which is training without clipping and AdamW, or ``inference``."""
        self.model.train(work != 'inference')
        return dict(training=self.step, gradients=self.backward, inference=self.detect)[work](batch, precision)


def set_tf32(allowed: bool) -> None:
    """Products and convolutions in TF32 from now on, or in full float32."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def build(side: SideName, plan: Plan) -> Trainee:
    """One side's R50, each with the optimizer that its configs have: ours runs AdamW as one kernel on a GPU."""
    model = build_side(side, plan.base).to(plan.device)
    return Trainee(model, fused=side == 'ours' and plan.device.type == 'cuda')


def batch_of(plan: Plan, trainee: Trainee, images: int) -> Batch:
    """A batch of so many images."""
    return make_batch(replace(plan.base, batch=images), trainee.model.bbox_head.num_classes)


def prepare(plan: Plan) -> None:
    """Settings of a process that measures."""
    MMLogger.get_instance('gpu_report', log_level='ERROR')
    warnings.filterwarnings('ignore')
    init_default_scope('mmdet')
    torch.set_num_threads(plan.base.threads)
    if plan.device.type == 'cpu':
        use_backend('pytorch')  # a CPU's own way reads on the host where to sample


def versions(plan: Plan) -> Iterator[Row]:
    """What everything below depends on."""
    found = environment()
    yield Row('\n'.join(f'{name:<10} {text}' for name, text in found.items()), found)


def waits(plan: Plan) -> Iterator[Row]:
    """Where the host waits for the GPU, with the lines of code; on a CPU, what would make it wait."""
    for side in SIDES:
        trainee = build(side, plan)
        batch = batch_of(plan, trainee, plan.base.batch)
        for sample in batch[1]:  # padded, as real batches are
            height, width = sample.img_shape
            sample.set_metainfo(dict(img_shape=(height - 8, width - 8)))
        # A CPU's AdamW counts its steps on the host, a GPU's too, but in a tensor of the host.
        for work in ('training' if plan.device.type == 'cuda' else 'gradients', 'inference'):
            for _ in range(2):
                trainee.run(work, batch, Precision())
            kinds = count_waits(partial(trainee.run, work, batch, Precision()), plan.device)
            lines = [f'{number:>6}  {place}' for place, number in kinds.most_common(None if side == 'ours' else 3)]
            text = f'{side:<6}{work}, {plan.base.batch} images: {kinds.total()} waits'
            yield Row('\n'.join([text, *lines]), dict(side=side, work=work, waits=kinds.total(), places=dict(kinds)))


def count_waits(run: Callable[[], Any], device: torch.device) -> Counter[str]:
    """Waits by the line of ours, mmdet's or mmcv's that causes them; on a CPU by their kind."""
    if device.type != 'cuda':
        with OperatorCounter(device) as counter:
            run()
        del counter.waits[LABEL_CHECK]
        return counter.waits
    found: Counter[str] = Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if 'called a synchronizing' in str(message):  # not what torch says of this mode itself
            frames = [frame for frame in traceback.extract_stack() if MODEL_CODE.search(frame.filename)]
            places = [f'{"/".join(frame.filename.split("/")[-2:])}:{frame.lineno}' for frame in frames[-2:]]
            found[' > '.join(places) or 'outside of dino_mm, mmdet and mmcv'] += 1

    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter('always')
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode('warn')
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode('default')
    return found


def speed(plan: Plan) -> Iterator[Row]:
    """Training steps of both batches and inference of one image in all precisions: both sides in turns."""
    trainees = {side: build(side, plan) for side in SIDES}
    for work, images in (('training', plan.base.batch), ('training', plan.large_batch), ('inference', 1)):
        batch = batch_of(plan, trainees['ours'], images)
        for name in plan.precisions:
            measured = in_turns(trainees, work, batch, PRECISIONS[name], plan.repeats)
            yield row_of(work, images, name, measured)


def in_turns(
    trainees: dict[Any, Trainee], work: str, batch: Batch, precision: Precision, repeats: int
) -> dict[str, dict[str, Any]]:
    """Median ``seconds`` and ``peak`` bytes above what was there of each side, or the ``error`` that it ends with."""
    measured: dict[str, dict[str, Any]] = {side: {} for side in trainees}
    set_tf32(precision.tf32)
    for side, trainee in trainees.items():
        try:
            for _ in range(2):
                trainee.run(work, batch, precision)
            with PeakMemory(trainee.device) as peak:
                trainee.run(work, batch, precision)
            measured[side] = dict(peak=peak.bytes, runs=[])
        except Exception as error:  # out of memory, or a precision that MMDetection does not run in
            measured[side] = dict(error=f'{type(error).__name__}: {error}'.splitlines()[0][:200])
            gc.collect()
    for _ in range(repeats):
        for side, trainee in trainees.items():
            if 'runs' in measured[side]:
                seconds: dict[str, float] = {}
                with stopwatch(seconds, work, trainee.device):
                    trainee.run(work, batch, precision)
                measured[side]['runs'].append(seconds[work])
    for found in measured.values():
        if 'runs' in found:
            found['seconds'] = median(found['runs'])
    return measured


def row_of(work: str, images: int, precision: str, measured: dict[str, dict[str, Any]], way: str = 'eager') -> Row:
    """A line of the table."""
    cells = []
    for side, found in measured.items():
        if 'error' in found:
            cells.append(f'{side} fails: {found["error"]}')
            continue
        peak = '' if found['peak'] is None else f', {found["peak"] / 2**20:.0f} MiB'
        rate = images / found['seconds']
        cells.append(f'{side} {1000 * found["seconds"]:.1f} ms, {rate:.1f} images/s{peak}')
    text = f'{work:<9} {images} {precision:<5} {way:<9} ' + '; '.join(cells)
    data: dict[str, Any] = dict(work=work, images=images, precision=precision, way=way, **measured)
    if all('seconds' in measured.get(side, {}) for side in SIDES):
        data['ratio'] = measured['ours']['seconds'] / measured['mmdet']['seconds']
        text += f'; ratio {data["ratio"]:.2f}'
    return Row(text, data)


def compiled(plan: Plan) -> Iterator[Row]:
    """Ours, compiled: the smaller batch and one image, in half precision."""
    for work, images in (('training', plan.base.batch), ('inference', 1)):
        trainee = build('ours', plan)
        graphs = work == 'inference' and plan.device.type == 'cuda'
        compile_detector(trainee.model, cuda_graphs=graphs, backend=plan.compiler)
        start = time.perf_counter()
        batch = batch_of(plan, trainee, images)
        trainee.run(work, batch, PRECISIONS['bf16'])
        first = time.perf_counter() - start
        measured = in_turns({'ours': trainee}, work, batch, PRECISIONS['bf16'], plan.repeats)
        row = row_of(work, images, 'bf16', measured, 'compiled')
        yield Row(f'{row.text}; the first run took {first:.0f} s', row.data | dict(first_seconds=first))


def launches(plan: Plan) -> Iterator[Row]:
    """How long the GPU is busy, and how many kernels are launched; on a CPU, operator calls."""
    trainee = build('ours', plan)
    for work, images in (('training', plan.base.batch), ('inference', 1)):
        batch = batch_of(plan, trainee, images)
        for name in plan.profiled:
            set_tf32(PRECISIONS[name].tf32)
            data = profile_run(partial(trainee.run, work, batch, PRECISIONS[name]), plan.device)
            data |= dict(work=work, images=images, precision=name)
            numbers = ', '.join(f'{key} {value:.0f}' for key, value in data.items() if isinstance(value, float))
            yield Row(f'{work:<9} {images} {name:<5} {numbers}', data)


def profile_run(run: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """``wall_ms``, ``busy_ms`` and ``launches`` of the third run; on a CPU ``calls`` of operators."""
    for _ in range(3):
        run()
    if device.type != 'cuda':
        with OperatorCounter(device) as counter:
            run()
        return dict(calls=float(counter.num_calls))
    seconds: dict[str, float] = {}
    with stopwatch(seconds, 'wall', device):
        run()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        run()
        torch.cuda.synchronize()
    events = profiled.key_averages()
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    by_time = sorted(kernels, key=lambda event: -event.self_device_time_total)[:12]
    return dict(
        wall_ms=1000 * seconds['wall'],
        busy_ms=sum(event.self_device_time_total for event in kernels) / 1000,
        launches=float(sum(event.count for event in events if 'LaunchKernel' in event.key)),
        kernels={event.key[:100]: event.self_device_time_total / 1000 for event in by_time},
    )


def zoo(plan: Plan) -> Iterator[Row]:
    """A training step and a detection of the largest model of each family: seconds, and GiB with model and AdamW."""
    for config in plan.zoo:
        model_config = read_config(config, plan.base.cfg_options).model
        with plan.device:
            trainee = Trainee(MODELS.build(model_config).to(plan.device), fused=plan.device.type == 'cuda')
        for name in [name for name in plan.precisions if name != 'fp32' or plan.device.type == 'cpu']:
            yield zoo_row(config, trainee, plan, name)
        del trainee
        gc.collect()


def zoo_row(config: str, trainee: Trainee, plan: Plan, precision: str) -> Row:
    """One model in one precision."""
    measured, gib = {}, None
    for work, images in (('inference', 1), ('training', plan.base.batch)):
        batch = batch_of(plan, trainee, images)
        measured[work] = in_turns({'ours': trainee}, work, batch, PRECISIONS[precision], 3)['ours']
    if plan.device.type == 'cuda':
        gib = torch.cuda.max_memory_allocated() / 2**30  # since the peak of training was measured
    finite = all(p.grad is None or bool(p.grad.isfinite().all()) for p in trainee.parameters)
    data = dict(config=config, precision=precision, gib=gib, finite_gradients=finite, **measured)
    if any('error' in found for found in measured.values()):
        return Row(f'{config} {precision}: {[found.get("error") for found in measured.values()]}', data)
    times = ', '.join(f'{work} {1000 * found["seconds"]:.0f} ms' for work, found in measured.items())
    memory = '' if gib is None else f', {gib:.1f} GiB'
    return Row(f'{config} {precision:<5} {times}{memory}, gradients {"finite" if finite else "NOT FINITE"}', data)
