"""Naming schemes of whole DINO detectors: detrex, the authors' own repository, MMDetection, and ours."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .names import NameMap

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Source:
    """A library that saves DINO detectors.

    Args:
        title: Its name.
        scheme: Its names outside the backbone; names under ``backbone.`` are of one of the backbones' schemes.
        temperature, offset: The position embedding all its models have; None where models differ.
        category_ids: Its class rows are COCO's category ids 0 to 90, not the 80 classes.
        prepare: Renames what cannot be told by a name alone, before ``scheme``: (the checkpoint's tensors, the model's)
            -> the checkpoint's name -> the name that ``scheme`` takes.
    """

    title: str
    scheme: NameMap
    temperature: float | None = None
    offset: float | None = None
    category_ids: bool = False
    prepare: Callable[[Tensors, Tensors], dict[str, str]] | None = None


#: The three linear layers of a box branch: an MLP's `layers.N` is `2N` among linear layers and ReLUs.
_BOX_BRANCH = tuple((rf'^bbox_embed\.(\d+)\.layers\.{i}\.', rf'bbox_head.reg_branches.\1.{2 * i}.') for i in range(3))
_CLASS_BRANCH = ((r'^class_embed\.(\d+)\.', r'bbox_head.cls_branches.\1.'),)
#: Common to detrex and the authors' repository.
_SELECTION = (
    (r'^transformer\.(?:decoder\.)?(class_embed|bbox_embed)\.', r'\1.'),
    (r'^transformer\.level_embeds?$', 'level_embed'),
    (r'^transformer\.tgt_embed\.', 'query_selector.query_embedding.'),
    (r'^transformer\.enc_output\.', 'query_selector.memory_trans_fc.'),
    (r'^transformer\.enc_output_norm\.', 'query_selector.memory_trans_norm.'),
    (r'^transformer\.(encoder|decoder)\.', r'\1.'),
    (r'^label_enc\.', 'denoising.label_embedding.'),
    *_CLASS_BRANCH,
    *_BOX_BRANCH,
)
_PIXELS = ((r'^pixel_(mean|std)$', "the data preprocessor's constants"),)

DETREX = Source(
    title='detrex',
    scheme=NameMap(
        title='DINO (detrex)',
        signature=(
            r'^transformer\.encoder\.layers\.\d+\.attentions\.0\.',
            r'^transformer\.(?:decoder\.)?bbox_embed|^bbox_embed',
        ),
        renames=(
            (r'^neck\.(convs|extra_convs)\.(\d+)\.norm\.', r'neck.\1.\2.gn.'),
            (r'(\.layers\.\d+)\.attentions\.0\.', r'\1.self_attn.'),
            (r'(\.layers\.\d+)\.attentions\.1\.', r'\1.cross_attn.'),
            (r'(\.layers\.\d+)\.ffns\.0\.', r'\1.ffn.'),
            *_SELECTION,
        ),
        dropped=_PIXELS,
    ),
)


def _prepare_official(tensors: Tensors, own: Tensors) -> dict[str, str]:
    """Tell the projections of backbone maps from the extra ones, and number the encoder's branches after the others."""
    first = _first_extra(tensors, own)
    last = max(_count(r'transformer\.decoder\.layers\.(\d+)\.', tensors), _count(r'decoder\.layers\.(\d+)\.', own))

    def rename(name: str) -> str:
        if (match := re.match(r'input_proj\.(\d+)\.', name)) and int(match[1]) >= first:
            return re.sub(r'^input_proj\.\d+\.', f'input_extra.{int(match[1]) - first}.', name)
        return re.sub(r'^transformer\.enc_out_(class|bbox)_embed\.', rf'\1_embed.{last}.', name)

    return {name: rename(name) for name in tensors}


def _first_extra(tensors: Tensors, own: Tensors) -> int:
    """Number of the first extra projection, which have kernels of 3: the model's where these agree, else theirs."""
    maps = _count(r'neck\.convs\.(\d+)\.', own)
    extra = {
        int(match[1]): tensor.shape[-1:] == (3,)
        for name, tensor in tensors.items()
        if (match := re.match(r'input_proj\.(\d+)\.0\.weight$', name))
    }
    if all(is_extra == (index >= maps) for index, is_extra in extra.items()):
        return maps
    return min((index for index, is_extra in extra.items() if is_extra), default=max(extra) + 1)


def _count(pattern: str, tensors: Tensors) -> int:
    """One more than the largest number that ``pattern`` finds at the beginning of a name."""
    return max((int(match[1]) + 1 for name in tensors if (match := re.match(pattern, name))), default=0)


OFFICIAL = Source(
    title='IDEA-Research/DINO',
    scheme=NameMap(
        title='DINO (IDEA-Research)',
        signature=(r'^transformer\.encoder\.layers\.\d+\.linear1\.', r'^transformer\.enc_out_class_embed\.'),
        renames=(
            (r'^backbone\.0\.body\.', 'backbone.'),
            (r'^backbone\.0\.', 'backbone.'),
            (r'^input_proj\.(\d+)\.0\.', r'neck.convs.\1.conv.'),
            (r'^input_proj\.(\d+)\.1\.', r'neck.convs.\1.gn.'),
            (r'^input_extra\.(\d+)\.0\.', r'neck.extra_convs.\1.conv.'),
            (r'^input_extra\.(\d+)\.1\.', r'neck.extra_convs.\1.gn.'),
            (r'(\.layers\.\d+)\.linear1\.', r'\1.ffn.layers.0.0.'),
            (r'(\.layers\.\d+)\.linear2\.', r'\1.ffn.layers.1.'),
            # Norms are numbered in the order of definition there: after cross-attention, self-attention, FFN.
            (r'(encoder\.layers\.\d+)\.norm1\.', r'\1.norms.0.'),
            (r'(encoder\.layers\.\d+)\.norm2\.', r'\1.norms.1.'),
            (r'(decoder\.layers\.\d+)\.norm2\.', r'\1.norms.0.'),
            (r'(decoder\.layers\.\d+)\.norm1\.', r'\1.norms.1.'),
            (r'(decoder\.layers\.\d+)\.norm3\.', r'\1.norms.2.'),
            (r'(decoder\.layers\.\d+\.self_attn)\.(in_proj|out_proj)', r'\1.attn.\2'),
            *_SELECTION,
        ),
    ),
    temperature=20,
    offset=0.0,
    category_ids=True,
    prepare=_prepare_official,
)

MMDET = Source(
    title='MMDetection',
    scheme=NameMap(
        title='DINO (MMDetection)',
        signature=(r'^dn_query_generator\.label_embedding\.', r'^memory_trans_fc\.', r'^bbox_head\.cls_branches\.'),
        renames=(
            (r'^(memory_trans_fc|memory_trans_norm|query_embedding)\.', r'query_selector.\1.'),
            (r'^dn_query_generator\.', 'denoising.'),
        ),
        zeros=((r'^neck\.(extra_)?convs\.\d+\.conv\.bias$', "MMDetection's DINO has no bias there"),),
    ),
    temperature=20,
    offset=0.0,
)

OURS = Source(
    title='dino_mm',
    scheme=NameMap(
        title='DINO (dino_mm)',
        signature=(
            r'^bbox_head\.cls_branches\.',
            r'^encoder\.layers\.',
            r'^level_embed$',
            r'^(query_selector|decoder)\.',
        ),
    ),
)

#: In the order of recognition: ours last, whose names MMDetection's contain.
SOURCES = (DETREX, OFFICIAL, MMDET, OURS)
