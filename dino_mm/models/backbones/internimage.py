"""InternImage: a convolutional backbone whose core is the deformable convolution v3."""

from collections.abc import Sequence

import torch
from mmengine.model import BaseModule, trunc_normal_init
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dino_mm.registry import MODELS

from ...checkpoints.loading import convert_backbones_on_load
from ..layers.dcnv3 import ConvNorm, DCNv3, SamplingGrid, sampling_grid


class Block(nn.Module):
    """DCNv3, then a two-layer perceptron, each normalised, scaled per channel and added to its input.

    Args:
        channels: Width ``dim``.
        groups: Groups of DCNv3.
        mlp_ratio: Hidden width of the perceptron over ``channels``.
        drop_path: Chance that a branch is left out for an image in training.
        layer_scale: Start value of the scales.
        post_norm: Normalise a branch's output rather than its input.

    Source: InternImage, section 3.2.
    """

    def __init__(
        self, channels: int, groups: int, mlp_ratio: float, drop_path: float, layer_scale: float, post_norm: bool
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.dcn = DCNv3(channels, groups)
        self.gamma1 = nn.Parameter(torch.full((channels,), float(layer_scale)))
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = Mlp(channels, int(channels * mlp_ratio))
        self.gamma2 = nn.Parameter(torch.full((channels,), float(layer_scale)))
        self.drop_path = DropPath(drop_path)
        for linear in (self.mlp.fc1, self.mlp.fc2):
            trunc_normal_init(linear, std=0.02)

    def forward(self, x: Tensor, grid: SamplingGrid) -> Tensor:
        """(bs, height, width, dim) to the same."""
        if self.post_norm:
            x = x + self.drop_path(self.gamma1 * self.norm1(self.dcn(x, grid)))
            return x + self.drop_path(self.gamma2 * self.norm2(self.mlp(x)))
        x = x + self.drop_path(self.gamma1 * self.dcn(self.norm1(x), grid))
        return x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Blocks at one resolution, after a convolution that halves that of the stage before.

    Args:
        downsample: What brings the input to this stage's resolution and width; none in the first stage.
        blocks: The blocks.
        norm: Norm of the output.
        offset_scale: Stretches kernels and offsets of all DCNv3.
        with_cp: Whether training keeps only the blocks' inputs and computes the rest again.
    """

    def __init__(
        self, downsample: nn.Module, blocks: Sequence[Block], norm: nn.Module, offset_scale: float, with_cp: bool
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.offset_scale = offset_scale
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """(bs, height, width, dim) of the stage before to that of this one."""
        x = self.downsample(x)
        grid = sampling_grid(x, offset_scale=self.offset_scale)
        for block in self.blocks:
            x = checkpoint(block, x, grid, use_reentrant=False) if self.with_cp and self.training else block(x, grid)
        return self.norm(x)


@MODELS.register_module()
class InternImage(BaseModule):
    """InternImage T, S, B and L, on mmcv's deformable attention, for images of any size.

    The models differ in ``channels``, ``depths``, ``groups``, ``offset_scale`` and ``post_norm``.

    Args:
        channels: Width of the first stage, doubled by each further one.
        depths: Blocks of each stage.
        groups: Groups of DCNv3 in each stage.
        mlp_ratio: Hidden width of the perceptrons over the stage's width.
        drop_path_rate: Chance of leaving out the last block's branches; it rises linearly from 0 at the first block.
        layer_scale: Start value of the scales of the branches.
        offset_scale: Stretches kernels and offsets of all DCNv3.
        post_norm: Normalise the branches' outputs, not their inputs and the stages' outputs.
        out_indices: Stages whose outputs are returned, ``channels * 2**i`` wide, of stride ``4 * 2**i``.
        frozen_stages: -1: all is trained; 0: the stem is frozen; k: also the first k stages.
        with_cp: Activation checkpointing: less memory for more time in training.
        init_cfg: Initialisation, mmengine's ``Pretrained`` as a rule.

    Raises:
        ValueError: ``depths``, ``groups``, ``out_indices`` or ``frozen_stages`` contradict each other.

    Source: InternImage (CVPR 2023), section 3.
    """

    def __init__(
        self,
        channels: int = 64,
        depths: Sequence[int] = (4, 4, 18, 4),
        groups: Sequence[int] = (4, 8, 16, 32),
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        layer_scale: float = 1.0,
        offset_scale: float = 1.0,
        post_norm: bool = False,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        _check_stages(len(depths), groups, out_indices, frozen_stages)
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.patch_embed = nn.Sequential(
            ConvNorm(3, channels // 2, stride=2), nn.GELU(), ConvNorm(channels // 2, channels, stride=2)
        )
        rates = _linear_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList()
        for i, stage_groups in enumerate(groups):
            width = channels * 2**i
            self.stages.append(
                Stage(
                    ConvNorm(width // 2, width, stride=2, bias=False) if i else nn.Identity(),
                    [Block(width, stage_groups, mlp_ratio, rate, layer_scale, post_norm) for rate in rates[i]],
                    nn.Identity() if post_norm else nn.LayerNorm(width, eps=1e-6),
                    offset_scale,
                    with_cp,
                )
            )
        for module in self._frozen_modules():
            module.requires_grad_(False)
        convert_backbones_on_load(self)

    def forward(self, img: Tensor) -> tuple[Tensor, ...]:
        """Image batch (bs, 3, height, width) to the maps of ``out_indices``, each (bs, dim, height, width).

        Every stride of 2 rounds up.
        """
        x = self.patch_embed(img.permute(0, 2, 3, 1))
        outputs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                outputs.append(x.permute(0, 3, 1, 2).contiguous())
        return tuple(outputs)

    def train(self, mode: bool = True) -> 'InternImage':
        """Switch between training and evaluation; frozen stages stay in evaluation."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        return [self.patch_embed, *self.stages][: self.frozen_stages + 1]


def _linear_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Per stage, each block's rate; linear in the number of the block, from 0 to ``last``."""
    blocks = iter(range(sum(depths)))
    return [[last * next(blocks) / max(sum(depths) - 1, 1) for _ in range(depth)] for depth in depths]


def _check_stages(num_stages: int, groups: Sequence[int], out_indices: Sequence[int], frozen_stages: int) -> None:
    if len(groups) != num_stages:
        raise ValueError(f'`groups` has {len(groups)} entries, `depths` {num_stages}: give one of each per stage.')
    if not set(out_indices) <= set(range(num_stages)):
        raise ValueError(f'`out_indices` {tuple(out_indices)} must lie between 0 and {num_stages - 1}.')
    if not -1 <= frozen_stages <= num_stages:
        raise ValueError(f'`frozen_stages` is {frozen_stages}: choose -1 (none), 0 (stem) to {num_stages} (all).')
