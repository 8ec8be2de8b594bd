"""Any model of timm as a backbone."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import timm
from mmcv.cnn import build_norm_layer
from mmdet.utils import OptConfigType, OptMultiConfig
from mmengine.model import BaseModule
from timm.models import group_parameters
from timm.models.focalnet import Downsample
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dino_mm.registry import MODELS

from ...checkpoints.loading import convert_backbones_on_load


@MODELS.register_module()
class TIMMBackbone(BaseModule):
    """Feature maps of a timm model; its unused layers and its head are left out, so every parameter gets a gradient.

    The model of timm is ``body.model``, its tensors keep timm's names. FocalNet rounds odd sizes up, as in the
    original; other models do what they do in timm: ConvNeXt rounds down, ViT takes any size with
    ``dynamic_img_size=True, dynamic_img_pad=True``, and for those that demand divisible sides the data preprocessor
    has ``pad_size_divisor``.

    Args:
        model_name: timm's name, with a pretrained tag or without, such as ``focalnet_tiny_lrf``.
        out_indices: Which of timm's feature maps, ascending; ``out_channels`` and ``strides`` tell what they are.
        pretrained: Load timm's weights from its hub, or from a file: ``pretrained_cfg_overlay=dict(file=...)``.
        output_norm: Norm over the channels of each output, ``dict(type='LN', eps=...)`` as a rule; None has none.
        frozen_stages: Freeze timm's coarse parameter groups up to this one: 0 is the stem, 1 the first stage and so
            on; -1 freezes nothing.
        norm_eval: Keep batch norms in evaluation mode, for batches too small to estimate statistics from.
        with_cp: Trade time for memory: keep no activations inside blocks, compute them again for the gradients.
        init_cfg: mmengine's initialisation.
        **model_args: timm's arguments of the model: ``drop_path_rate``, ``ls_init_value`` and others.

    Attributes:
        out_channels: Channels of each output.
        strides: Pixels of the image per pixel of each output.

    Raises:
        ValueError: timm has no such model; ``out_indices`` not ascending; ``pretrained`` beside ``init_cfg``; more
            stages to freeze than there are.
    """

    body: Any  # timm's FeatureGetterNet

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int],
        pretrained: bool = False,
        output_norm: OptConfigType = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: OptMultiConfig = None,
        **model_args: Any,
    ) -> None:
        super().__init__(init_cfg)
        _check_arguments(model_name, out_indices, pretrained, init_cfg)
        self.norm_eval = norm_eval
        self.body = timm.create_model(
            model_name,
            pretrained=pretrained,
            features_only=True,
            # The only extractor that keeps timm's names and prunes what the outputs do not need.
            feature_cls='getter',
            out_indices=tuple(out_indices),
            **model_args,
        )
        if hasattr(self.body.model, 'head'):
            self.body.model.head = nn.Identity()  # timm before 1.0.31 leaves a norm in ConvNeXt's, without gradients
        # MMDetection's NumClassCheckHook would compare the removed head's classes with the data set's.
        if hasattr(self.body.model, 'num_classes'):
            del self.body.model.num_classes
        if with_cp:
            self.body.model.set_grad_checkpointing()
        for module in self.body.modules():
            if isinstance(module, Downsample):
                module.register_forward_pre_hook(pad_to_stride)

        self.out_channels: list[int] = self.body.feature_info.channels()
        self.strides: list[int] = self.body.feature_info.reduction()
        self.output_norms = nn.ModuleDict()
        if output_norm is not None:
            for index, channels in zip(self.body.out_indices, self.out_channels, strict=True):
                self.output_norms[str(index)] = build_norm_layer(output_norm, channels)[1]
        self._frozen = freeze_stages(self.body.model, frozen_stages)
        convert_backbones_on_load(self)

    def forward(self, img: Tensor) -> tuple[Tensor, ...]:
        """Feature maps, (bs, channels, height, width) each, of ``img``, (bs, 3, height, width)."""
        features = self.body(img)
        if not self.output_norms:
            return tuple(features)
        norms = self.output_norms.values()
        return tuple(normalize_channels(norm, x) for norm, x in zip(norms, features, strict=True))

    def train(self, mode: bool = True) -> 'TIMMBackbone':
        """Switch the mode; frozen stages, and batch norms under ``norm_eval``, stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        if self.norm_eval:
            for module in self.body.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


def pad_to_stride(module: Downsample, args: tuple[Tensor]) -> tuple[Tensor]:
    """Zeros to the right and below, so that the stride divides the map's sides: a pre-hook of FocalNet's embeddings.

    FocalNet was published so, and its global context is a mean over the padded map; timm drops the rest instead.
    """
    stride = module.stride
    height, width = args[0].shape[-2:]
    # Not by remainders, `-side % stride`: four of them in a row keep torch.export busy for minutes.
    down, right = ((side + stride - 1) // stride * stride - side for side in (height, width))
    return (F.pad(args[0], (0, right, 0, down)),)


def normalize_channels(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply ``norm`` to ``x``, (bs, channels, height, width); torch's LayerNorm wants the channels last."""
    if isinstance(norm, nn.LayerNorm):
        # Not by `movedim`: ONNX files would have a negative axis, which onnxruntime refuses.
        return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
    return norm(x)


def freeze_stages(model: nn.Module, last: int) -> list[nn.Module]:
    """Freeze timm's coarse parameter groups 0 to ``last``, and say which modules are without a trainable parameter."""
    if last < 0:
        return []
    group_matcher: Any = model.group_matcher
    groups = group_parameters(model, group_matcher(coarse=True))
    if last >= len(groups):
        raise ValueError(f'frozen_stages={last}, but the groups that can be frozen are 0 (stem) to {len(groups) - 1}.')
    for group in range(last + 1):
        for name in groups[group]:
            model.get_parameter(name).requires_grad_(False)
    with_parameters = [m for m in model.modules() if any(True for _ in m.parameters())]
    frozen = [m for m in with_parameters if not any(p.requires_grad for p in m.parameters())]
    for module in frozen:
        module.eval()
    return frozen


def _check_arguments(model_name: str, out_indices: Sequence[int], pretrained: bool, init_cfg: OptMultiConfig) -> None:
    if ':' not in model_name and not timm.is_model(model_name):  # a colon: from a hub or a folder, timm looks there
        close = ', '.join(get_close_matches(model_name, timm.list_models())) or 'see timm.list_models()'
        raise ValueError(f'model_name={model_name!r} is not in timm {timm.__version__}; did you mean: {close}?')
    if list(out_indices) != sorted(set(out_indices)):
        raise ValueError(f'out_indices={tuple(out_indices)} must be ascending: outputs come from the shallowest on.')
    if pretrained and init_cfg:
        raise ValueError('Both pretrained=True and init_cfg are given, one would undo the other: drop one of them.')
