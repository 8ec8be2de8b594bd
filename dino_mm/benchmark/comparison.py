"""The two sides of a comparison: a DINO of ours and MMDetection's with the same weights, as wholes and in parts."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import mmdet
import torch
from mmdet.structures import DetDataSample, SampleList
from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dino_mm.engine.compilation import compile_detector
from dino_mm.models.structures import collate_targets
from dino_mm.registry import MODELS
from dino_mm.shipped import cfg as shipped_config

from .profiling import OperatorCounter, PeakMemory, stopwatch

#: MMDetection's own DINO.
MMDET_CONFIG = Path(mmdet.__file__).parent / '.mim' / 'configs' / 'dino' / 'dino-4scale_r50_8xb2-12e_coco.py'
#: Width of MMDetection's DINO: its decoder's position embedding has it fixed.
MMDET_WIDTH = 256
#: Work that a whole model does.
WHOLE = ('inference', 'training-step')
#: Work of a part in a training step, forward and backward.
COMPONENTS = (
    'matching-and-loss',
    'denoising',
    'query-selection',
    'encoder-layer',
    'decoder-layer',
    'encoder-attention',
    'decoder-attention',
)
DTYPES = {name: getattr(torch, name) for name in ('float32', 'float64', 'bfloat16', 'float16')}
SideName = Literal['ours', 'mmdet']


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Args:
        config: A config file, or the name of a shipped one.
        cfg_options: Settings that override the config, by dotted key.
        height, width: Size of every image, pixels; no image is padded.
        batch: Images.
        boxes: Objects of each image.
        queries: Matching queries; None is the config's number.
        threads: Threads of torch.
        dtype: Name in ``DTYPES``; the two half types by autocast.
        compile: Compile ours: 'parts' or 'cuda-graphs', see :func:`compile_detector`; '' does not.
        device: Device, as torch names it.
        seed: Seed of weights, images, boxes and noise.
    """

    config: str
    cfg_options: dict[str, Any] = field(default_factory=dict)
    height: int = 480
    width: int = 640
    batch: int = 2
    boxes: int = 8
    queries: int | None = None
    threads: int = 2
    dtype: str = 'float32'
    compile: str = ''
    device: str = 'cpu'
    seed: int = 0


def read_config(name: str, cfg_options: dict[str, Any]) -> Config:
    """A config file, or a shipped config of that name, with settings that override it."""
    config = Config.fromfile(name if Path(name).is_file() else shipped_config(name))
    config.merge_from_dict(cfg_options)
    return config


def our_config(setting: Setting) -> ConfigDict:
    """The model of the config measured, with the position embedding that MMDetection's weights belong to.

    Raises:
        ValueError: MMDetection has no counterpart.
    """
    model = read_config(setting.config, setting.cfg_options).model
    if model.embed_dims != MMDET_WIDTH:
        raise ValueError(f'`model.embed_dims` is {model.embed_dims}: DINO of MMDetection only runs with {MMDET_WIDTH}.')
    model.backbone.init_cfg = None  # weights are random
    model.num_queries = setting.queries or model.num_queries
    model.positional_encoding.update(mmdet_base().positional_encoding)
    model.positional_encoding.pop('num_feats')
    return model


def mmdet_base() -> ConfigDict:
    """MMDetection's DINO as it ships it."""
    return Config.fromfile(MMDET_CONFIG).model


def mmdet_config(ours: ConfigDict) -> ConfigDict:
    """MMDetection's DINO with backbone, neck and sizes of ``ours``, so that the code alone makes the difference."""
    config = Config(dict(model=mmdet_base()))
    changes: dict[str, Any] = {
        'type': 'mmdet.DINO',
        'num_queries': ours.num_queries,
        'num_feature_levels': ours.num_feature_levels,
        'bbox_head.num_classes': ours.bbox_head.num_classes,
        'dn_cfg.group_cfg.num_dn_queries': ours.denoising.num_dn_queries,
        'test_cfg.max_per_img': ours.test_cfg.max_per_img,
    }
    sampling = dict(num_levels=ours.num_feature_levels)
    for name, attention in (('encoder', 'self_attn_cfg'), ('decoder', 'cross_attn_cfg')):
        part = ours[name]
        heads = dict(num_heads=part.num_heads, dropout=part.dropout)
        changes |= {
            f'{name}.num_layers': part.num_layers,
            f'{name}.layer_cfg.{attention}': dict(heads, **sampling, num_points=part.num_points),
            f'{name}.layer_cfg.ffn_cfg.feedforward_channels': part.feedforward_channels,
            f'{name}.layer_cfg.ffn_cfg.ffn_drop': part.dropout,
        }
    changes['decoder.layer_cfg.self_attn_cfg'] = heads
    config.merge_from_dict({f'model.{key}': value for key, value in changes.items()})
    return ConfigDict(config.model.to_dict(), backbone=ours.backbone.to_dict(), neck=ours.neck.to_dict())


def build_side(side: SideName, setting: Setting) -> Any:
    """One side's model. Ours loads the weights of MMDetection's.

    Raises:
        RuntimeError: The DINO of the installed MMDetection has other weights.
    """
    init_default_scope('mmdet')
    config = our_config(setting)
    torch.manual_seed(setting.seed)
    theirs = MODELS.build(mmdet_config(config))
    encoded = theirs.decoder.ref_point_head.layers[0].in_features
    if encoded != 2 * config.embed_dims:
        raise RuntimeError(
            f'MMDetection {mmdet.__version__} encodes a box in {encoded} numbers, MMDetection 3.3 and dino_mm in '
            f'{2 * config.embed_dims}, so the two cannot have the same weights. Compare where mmdet 3.3 is installed: '
            '`make setup` in a checkout of dino_mm.'
        )
    theirs.init_weights()
    if side == 'mmdet':
        return theirs
    ours = MODELS.build(config)
    ours.load_state_dict(theirs.state_dict())
    return ours


def make_batch(setting: Setting, num_classes: int) -> tuple[Tensor, SampleList]:
    """Random images (batch, 3, height, width), as normalised, and data samples with random boxes."""
    generator = torch.Generator().manual_seed(setting.seed)
    shape = (setting.height, setting.width)
    inputs = torch.randn(setting.batch, 3, *shape, generator=generator)
    meta = dict(img_shape=shape, ori_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0))
    scale = torch.tensor([setting.width, setting.height])
    samples = []
    for i in range(setting.batch):
        # A box of 3 to 40 % of the image's sides, anywhere in it.
        size = 0.03 + 0.37 * torch.rand(setting.boxes, 2, generator=generator)
        corner = (1 - size) * torch.rand(setting.boxes, 2, generator=generator)
        labels = torch.randint(num_classes, (setting.boxes,), generator=generator)
        boxes = torch.cat([corner * scale, (corner + size) * scale], 1)
        gts = InstanceData(bboxes=boxes.to(torch.get_default_dtype()), labels=labels)
        samples.append(DetDataSample(metainfo=dict(meta, img_id=i), gt_instances=gts).to(setting.device))
    return inputs.to(setting.device, torch.get_default_dtype()), samples


class Work(NamedTuple):
    """Something to measure."""

    forward: Callable[[], Any]
    """Its outputs, in any nesting of containers."""
    leaves: list[Tensor]
    """Inputs that get a gradient."""
    training: bool = True
    """Whether the model is in training mode, and the backward pass follows."""


class Side:
    """One side's model and batch, and what to measure of them.

    Args:
        side: Whose model.
        setting: What is measured.
    """

    def __init__(self, side: SideName, setting: Setting) -> None:
        MMLogger.get_instance('benchmark', log_level='WARNING')  # mmengine tells every parameter's initialisation
        warnings.filterwarnings('ignore', message='torch.meshgrid')
        torch.set_num_threads(setting.threads)
        dtype = DTYPES[setting.dtype]
        half = dtype.itemsize < torch.float32.itemsize
        if not half:
            torch.set_default_dtype(dtype)  # mmdet makes its denoising queries in the default type
        self.device = torch.device(setting.device)
        self.seed = setting.seed
        self.model = build_side(side, setting).to(self.device)
        self.is_compiled = bool(setting.compile) and side == 'ours'
        if self.is_compiled:
            compile_detector(self.model, cuda_graphs=setting.compile == 'cuda-graphs')
        self.autocast = (lambda: torch.autocast(self.device.type, dtype)) if half else nullcontext
        self.inputs, self.samples = make_batch(setting, self.model.bbox_head.num_classes)
        self.parts = (our_parts if side == 'ours' else mmdet_parts)(self)
        self._work: dict[str, Work] = {
            'inference': Work(self.predict, [], training=False),
            'training-step': Work(self.loss, []),
        }

    def loss(self) -> dict[str, Tensor]:
        """Losses of the batch."""
        return self.model(self.inputs, self.samples, mode='loss')

    @torch.no_grad()
    def predict(self) -> SampleList:
        """Detections of the batch."""
        return self.model(self.inputs, self.samples, mode='predict')

    def scores(self) -> list[list[float]]:
        """Scores of the detections of each image."""
        self.model.eval()
        with self.autocast():
            detected = self.predict()
        return [sample.pred_instances.scores.tolist() for sample in detected]

    def num_queries(self) -> int:
        """Queries of the decoder in a training step, denoising ones included."""
        call = self.record(self.model.decoder, 'forward')
        query = call.kwargs['query'] if 'query' in call.kwargs else call.args[0]
        return query.shape[1]

    def time(self, name: str) -> dict[str, float]:
        """Seconds of each pass of a work, once."""
        seconds: dict[str, float] = {}
        self._run(name, lambda phase: stopwatch(seconds, phase, self.device))
        return seconds

    def memory(self, name: str) -> int | None:
        """Peak memory of a work, bytes above what was in use before; gradients of parameters are part of it."""
        self.work(name)  # its inputs are there before
        if self.is_compiled:
            self._run(name, lambda phase: nullcontext())  # the compiler's own memory does not count
        with PeakMemory(self.device) as peak:
            self._run(name, lambda phase: nullcontext())
        return peak.bytes

    def count(self, name: str) -> dict[str, dict[str, Counter[str]]]:
        """``calls`` and ``waits`` of each pass of a work, as :class:`OperatorCounter` has them."""
        counters: dict[str, OperatorCounter] = {}
        self._run(name, lambda phase: counters.setdefault(phase, OperatorCounter(self.device)))
        return {phase: dict(calls=counter.calls, waits=counter.waits) for phase, counter in counters.items()}

    def work(self, name: str) -> Work:
        """The work of that name; a part's inputs are those that it has in a training step."""
        if name not in self._work:
            self._work[name] = self.parts[name]()
        return self._work[name]

    def _run(self, name: str, measure: Callable[[str], Any]) -> None:
        """Do a work once, each pass within the context that ``measure`` gives for it."""
        work = self.work(name)
        self.model.train(work.training)
        for tensor in (*self.model.parameters(), *work.leaves):
            tensor.grad = None
        torch.manual_seed(self.seed)
        with measure('forward'), self.autocast():
            outputs = work.forward()
        if work.training:
            ends = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
            ones = [torch.ones_like(end) for end in ends]
            with measure('backward'):
                torch.autograd.backward(ends, ones)

    def record(self, owner: Any, method: str) -> Any:
        """The first call of ``owner.method`` in a training step: its ``args`` and ``kwargs``."""
        self.model.train()
        torch.manual_seed(self.seed)
        with ExitStack() as stack:
            spy = stack.enter_context(mock.patch.object(owner, method, wraps=getattr(owner, method)))
            stack.enter_context(self.autocast())
            self.loss()
        return spy.call_args_list[0]

    def replay(self, owner: Any, method: str = 'forward') -> Work:
        """Work that repeats the first call of ``owner.method``, on copies of its arguments."""
        call = self.record(owner, method)
        args, kwargs = cut_off((call.args, call.kwargs))
        return Work(lambda: getattr(owner, method)(*args, **kwargs), leaves_of((args, kwargs)))


def cut_off(tree: Any) -> Any:
    """``tree`` with copies of its tensors that have no past; those that had one take gradients."""

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, nn.Parameter):
            return leaf
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)

    return tree_map(copy, tree)


def leaves_of(tree: Any) -> list[Tensor]:
    """The tensors of ``tree`` that take gradients."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.requires_grad]


Parts = dict[str, Callable[[], Work]]


def common_parts(side: Side) -> Parts:
    """Parts that both sides have under the same name."""
    encoder, decoder = side.model.encoder.layers[0], side.model.decoder.layers[0]
    return {
        'encoder-layer': lambda: side.replay(encoder),
        'decoder-layer': lambda: side.replay(decoder),
        'encoder-attention': lambda: side.replay(encoder.self_attn),
        'decoder-attention': lambda: side.replay(decoder.cross_attn),
    }


def our_parts(side: Side) -> Parts:
    """Ours; padding the ground truth is counted with each part that uses it, as MMDetection's parts do the like."""
    model, samples = side.model, side.samples
    head = model.bbox_head

    def matching_and_loss() -> Work:
        predictions = cut_off(side.record(head, 'loss_by_feat').args[:3])
        return Work(
            lambda: head.loss_by_feat(*predictions, collate_targets(samples, head.num_classes)), leaves_of(predictions)
        )

    def denoising() -> Any:
        return model.denoising(collate_targets(samples, head.num_classes), model.num_queries)

    return common_parts(side) | {
        'matching-and-loss': matching_and_loss,
        'denoising': lambda: Work(denoising, []),
        'query-selection': lambda: side.replay(model.query_selector),
    }


def mmdet_parts(side: Side) -> Parts:
    """MMDetection's."""
    model, samples = side.model, side.samples

    def query_selection() -> Work:
        work = side.replay(model, 'pre_decoder')
        # It makes the denoising queries too, in training, and only then gives what its losses take: make them before.
        denoising = cut_off(model.dn_query_generator(samples))

        def forward() -> Any:
            with mock.patch.object(type(model.dn_query_generator), '__call__', return_value=denoising):
                return work.forward()

        return Work(forward, work.leaves + leaves_of(denoising))

    return common_parts(side) | {
        'matching-and-loss': lambda: side.replay(model.bbox_head, 'loss_by_feat'),
        'denoising': lambda: Work(lambda: model.dn_query_generator(samples), []),
        'query-selection': query_selection,
    }


def largest_difference(ours: Iterable[Iterable[float]], mmdet: Iterable[Iterable[float]]) -> float:
    """Largest difference of the two sides' scores, rank by rank."""
    pairs = zip(ours, mmdet, strict=True)
    return max((abs(a - b) for images in pairs for a, b in zip(*images, strict=True)), default=0.0)
