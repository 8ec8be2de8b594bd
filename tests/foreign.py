"""Our state dicts (ResNet backbone) in the names of other libraries: the way back from what is tested."""

import re
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from dino_mm.compat import found_set

#: The forks' own DINO has other weights than MMDetection's: see `test_a_dino_with_other_weights_is_refused`.
with_mmdets_dino = pytest.mark.skipif(
    found_set().names['mmdet'] != 'mmdet', reason="the forks' DINO encodes boxes in another way"
)

#: Our names (regular expressions) -> detrex's, for everything but the backbone.
DETREX = [
    (r'^neck\.(convs|extra_convs)\.(\d)\.gn\.', r'neck.\1.\2.norm.'),
    (r'^level_embed$', 'transformer.level_embeds'),
    (r'^encoder\.layers\.(\d)\.self_attn\.', r'transformer.encoder.layers.\1.attentions.0.'),
    (r'^decoder\.layers\.(\d)\.self_attn\.', r'transformer.decoder.layers.\1.attentions.0.'),
    (r'^decoder\.layers\.(\d)\.cross_attn\.', r'transformer.decoder.layers.\1.attentions.1.'),
    (r'^(encoder|decoder)\.layers\.(\d)\.ffn\.', r'transformer.\1.layers.\2.ffns.0.'),
    (r'^(encoder|decoder)\.', r'transformer.\1.'),
    (r'^query_selector\.query_embedding\.', 'transformer.tgt_embed.'),
    (r'^query_selector\.memory_trans_fc\.', 'transformer.enc_output.'),
    (r'^query_selector\.memory_trans_norm\.', 'transformer.enc_output_norm.'),
    (r'^bbox_head\.cls_branches\.', 'class_embed.'),
    (r'^denoising\.label_embedding\.', 'label_enc.'),
]
#: The authors' names of a decoder layer's parts; norms are numbered in the order of definition.
OFFICIAL_NORMS = {'encoder': ('norm1', 'norm2'), 'decoder': ('norm2', 'norm1', 'norm3')}


def detrex_name(key: str) -> str:
    """Detrex's name of one of our tensors."""
    if key.startswith('backbone.'):
        return _detectron2_resnet_name(key)
    if match := re.match(r'^bbox_head\.reg_branches\.(\d)\.(\d)\.(\w+)$', key):
        branch, index, kind = match.groups()
        return f'bbox_embed.{branch}.layers.{int(index) // 2}.{kind}'
    for pattern, name in DETREX:
        key, count = re.subn(pattern, name, key)
        if count:
            break
    return key


def _detectron2_resnet_name(key: str) -> str:
    key = re.sub(r'^backbone\.(conv1|bn1)', r'backbone.stem.\1', key)
    key = re.sub(r'\.layer(\d)\.', lambda m: f'.res{int(m[1]) + 1}.', key)
    key = key.replace('.downsample.0.', '.shortcut.').replace('.downsample.1.', '.shortcut.norm.')
    return re.sub(r'\.bn(\d)\.', r'.conv\1.norm.', key)


def as_detrex(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What detrex would save of our model: its names, shared heads under both of theirs, no batch counts."""
    named = {detrex_name(k): v.clone() for k, v in state.items() if not k.endswith('num_batches_tracked')}
    aliases = {f'transformer.decoder.{k}': v for k, v in named.items() if k.startswith(('class_embed', 'bbox_embed'))}
    return named | aliases


def as_official(
    state: Mapping[str, Tensor], num_maps: int, category_ids: list[int] | None = None, aliases: bool = True
) -> dict[str, Tensor]:
    """What the authors' code would save.

    Args:
        state: Ours; all decoder layers have equal branches, as they are one module there.
        num_maps: Maps that the backbone gives.
        category_ids: Row of each class among 91, in a model numbered by category; None keeps the rows.
        aliases: Add the decoder's own names of the heads.
    """
    last = max(int(m[1]) for k in state if (m := re.match(r'bbox_head\.cls_branches\.(\d)', k)))
    named = {}
    for key, value in state.items():
        if key.endswith('num_batches_tracked'):
            continue
        if category_ids is not None and ('cls_branches' in key or key.startswith('denoising')):
            rows = value.new_full((91 + key.startswith('denoising'), *value.shape[1:]), 7.0)
            rows[category_ids] = value
            value = rows
        named[_official_name(key, num_maps, last)] = value.clone()
    if not aliases:
        return named
    heads = {k: v for k, v in named.items() if k.startswith(('class_embed', 'bbox_embed'))}
    return named | {f'transformer.decoder.{k}': v for k, v in heads.items()}


def _official_name(key: str, num_maps: int, last: int) -> str:
    if key.startswith('backbone.'):
        return key.replace('backbone.', 'backbone.0.body.')
    if match := re.match(r'neck\.(extra_)?convs\.(\d)\.(conv|gn)\.(\w+)', key):
        index = int(match[2]) + (num_maps if match[1] else 0)
        return f'input_proj.{index}.{0 if match[3] == "conv" else 1}.{match[4]}'
    if match := re.match(r'(encoder|decoder)\.layers\.(\d)\.(.*)', key):
        return f'transformer.{match[1]}.layers.{match[2]}.{_official_part(match[1], match[3])}'
    for ours, theirs in (('cls_branches', 'class_embed'), ('reg_branches', 'bbox_embed')):
        if match := re.match(rf'bbox_head\.{ours}\.(\d)\.(?:(\d)\.)?(\w+)', key):
            layer = '' if match[2] is None else f'layers.{int(match[2]) // 2}.'
            owner = f'transformer.enc_out_{theirs}' if int(match[1]) == last else f'{theirs}.{match[1]}'
            return f'{owner}.{layer}{match[3]}'
    return detrex_name(key).replace('transformer.level_embeds', 'transformer.level_embed')


def _official_part(side: str, part: str) -> str:
    if match := re.match(r'norms\.(\d)\.(\w+)', part):
        return f'{OFFICIAL_NORMS[side][int(match[1])]}.{match[2]}'
    part = part.replace('ffn.layers.0.0.', 'linear1.').replace('ffn.layers.1.', 'linear2.')
    return part.replace('self_attn.attn.', 'self_attn.')


def share_branches(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict with all decoder layers' branches equal to the first one's."""
    last = max(int(m[1]) for k in state if (m := re.match(r'bbox_head\.cls_branches\.(\d)', k)))
    shared = dict(state)
    for key in state:
        match = re.match(r'(bbox_head\.\w+_branches\.)(\d)(\..*)', key)
        if match and int(match[2]) < last:
            shared[key] = state[f'{match[1]}0{match[3]}']
    return shared


def randomize(state: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Random values in the shapes and types of a state dict, no two tensors alike."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(tensor.shape, generator=generator).to(tensor.dtype) + 0.1
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in state.items()
    }
