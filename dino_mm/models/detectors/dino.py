"""DINO: the whole data path."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmdet.models.detectors.base_detr import DetectionTransformer
from mmdet.structures import OptSampleList, SampleList
from mmdet.utils import OptConfigType, OptMultiConfig
from torch import Tensor, nn

from dino_mm.registry import MODELS

from ...checkpoints.loading import convert_backbones_on_load, convert_detectors_on_load, loading
from ...ops.frozen_norms import FrozenNorm, frozen_norms
from ...ops.step_weights import step_weights
from ..builder import build_part
from ..dense_heads.dino_head import DINOHead
from ..layers.denoising import CDNGenerator
from ..layers.tokens import flatten_levels
from ..layers.transformer import DINODecoder
from ..structures import (
    DecoderStates,
    DenoisingQueries,
    QuerySelection,
    Targets,
    Tokens,
    collate_targets,
)


@MODELS.register_module()
class DINO(DetectionTransformer):
    """DETR with improved denoising anchor boxes.

    Every part is a config. The detector hands ``embed_dims``, ``num_feature_levels``, ``num_queries`` and the head's
    ``num_classes`` down, so each is stated once.

    ``dino_mm.CompileHook``, or ``--compile`` of our tools, compiles it part by part. Batches padded to one size need no
    new graphs: ``data_preprocessor.pad_size_divisor`` of at least the longest edge, or for training
    ``dino_mm.PadToBuckets`` among ``batch_augments``. More padding means slightly other predictions, as in detrex: the
    backbone sees its zeros, and the decoder's positions are relative to the padded size.

    Args:
        backbone, neck: mmdet modules; the neck gives ``num_feature_levels`` maps of ``embed_dims`` channels.
        positional_encoding: Position embedding of the feature maps, such as mmdet's ``SinePositionalEncoding``; its
            ``num_feats``, half of ``embed_dims``, is handed down.
        encoder, decoder: Transformer, see :class:`DINOEncoder` and :class:`DINODecoder`.
        query_selector: Where queries start, see :class:`MixedQuerySelector`; None learns them without the encoder.
        denoising: Denoising queries, see :class:`CDNGenerator`; None trains without.
        bbox_head: Predictions, losses, detections, see :class:`DINOHead`.
        num_queries: Number of queries.
        num_feature_levels: Number of feature maps.
        embed_dims: Width ``dim``.
        channels_last: Keep the images' and feature maps' channels last in memory, which many convolutions run faster
            on; backbone and neck only, and values stay the same.
        train_cfg: ``assigner``, the matcher.
        test_cfg: ``max_per_img``.

    Source: Zhang et al., DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection.
    """

    bbox_head: DINOHead
    level_embed: nn.Parameter
    decoder: DINODecoder
    denoising: CDNGenerator | None
    _frozen_norms: Sequence[FrozenNorm] = ()

    def __init__(
        self,
        backbone: dict,
        neck: dict,
        positional_encoding: dict,
        encoder: dict,
        decoder: dict,
        bbox_head: dict,
        query_selector: OptConfigType = None,
        denoising: OptConfigType = None,
        num_queries: int = 900,
        num_feature_levels: int = 4,
        embed_dims: int = 256,
        channels_last: bool = False,
        train_cfg: OptConfigType = None,
        test_cfg: OptConfigType = None,
        data_preprocessor: OptConfigType = None,
        init_cfg: OptMultiConfig = None,
    ) -> None:
        # Past DetectionTransformer's own constructor: it builds fixed classes and writes into the configs.
        super(DetectionTransformer, self).__init__(
            data_preprocessor=data_preprocessor and build_part('data_preprocessor', data_preprocessor),
            init_cfg=init_cfg,
        )
        self.num_queries = num_queries
        self.num_feature_levels = num_feature_levels
        self.embed_dims = embed_dims
        self._check_neck(neck.get('num_outs', num_feature_levels), neck.get('out_channels', embed_dims))

        self.backbone = build_part('backbone', backbone)
        self.neck = build_part('neck', neck)
        self._neck_inputs = neck.get('in_channels')
        self.channels_last = channels_last
        if channels_last:
            self.backbone.to(memory_format=torch.channels_last)
            self.neck.to(memory_format=torch.channels_last)
        self._init_layers(positional_encoding, encoder, decoder, query_selector)
        self.bbox_head = build_part(
            'bbox_head',
            bbox_head,
            embed_dims=embed_dims,
            num_pred_layers=self.decoder.num_layers + self.query_selector.uses_encoder,
            train_cfg=train_cfg,
            test_cfg=test_cfg,
        )
        self.denoising = None
        if denoising is not None:
            self.denoising = build_part(
                'denoising',
                denoising,
                embed_dims=embed_dims,
                num_classes=self.bbox_head.num_classes,
            )
        convert_backbones_on_load(self.backbone)
        convert_detectors_on_load(self)

    def _init_layers(
        self,
        positional_encoding: dict,
        encoder: dict,
        decoder: dict,
        query_selector: OptConfigType,
    ) -> None:
        """Build what lies between neck and head."""
        widths = dict(embed_dims=self.embed_dims, num_levels=self.num_feature_levels)
        self.positional_encoding = build_part(
            'positional_encoding', positional_encoding, num_feats=self.embed_dims // 2
        )
        self.level_embed = nn.Parameter(torch.randn(self.num_feature_levels, self.embed_dims))
        self.encoder = build_part('encoder', encoder, **widths)
        self.decoder = build_part('decoder', decoder, **widths)
        self.query_selector = build_part(
            'query_selector',
            query_selector or dict(type='dino_mm.LearnedQueries'),
            embed_dims=self.embed_dims,
            num_queries=self.num_queries,
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the checkpoint of any known library, else as torch does.

        Args:
            state_dict: Name -> tensor, ours or of another library; also a checkpoint with more around it.
            strict: Refuse what does not fit in every tensor; else load what fits.
            assign: As torch's.

        Returns:
            ``missing_keys``, names of the model, and ``unexpected_keys``, names of ``state_dict``.

        Raises:
            CheckpointError: With ``strict``, something does not fit; the message says what and the way out.
            RuntimeError: Without ``strict``, a tensor has another shape.
        """
        with loading(self, strict):
            return super().load_state_dict(state_dict, strict, assign)

    def train(self, mode: bool = True) -> 'DINO':
        """As torch's. In training, each forward pass folds frozen norms of the backbone into its convolutions."""
        super().train(mode)
        # Those that are there stay, for some call this in each step.
        self._frozen_norms = self._frozen_norms or frozen_norms(self.backbone) if mode else ()
        return self

    def forward(self, inputs: Tensor, data_samples: OptSampleList = None, mode: str = 'tensor') -> Any:
        """As mmdet's: ``loss``, ``predict`` or what the head's ``forward`` gives; what runners call."""
        with step_weights(self, self._frozen_norms):
            return super().forward(inputs, data_samples, mode)

    def loss(self, batch_inputs: Tensor, batch_data_samples: SampleList) -> dict[str, Tensor]:
        """Losses of a batch of images (bs, 3, height, width), normalised and padded at the bottom and right."""
        targets = collate_targets(batch_data_samples, self.bbox_head.num_classes)
        img_feats = self.extract_feat(batch_inputs)
        head_inputs = self.forward_transformer(img_feats, batch_data_samples, targets)
        return self.bbox_head.loss(**head_inputs, targets=targets)

    def parse_losses(self, losses: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """As mmengine's: the sum of all losses, and the values to log; in few kernels, for there are many losses."""
        if not all('loss' in name and isinstance(loss, Tensor) and loss.dim() == 0 for name, loss in losses.items()):
            return super().parse_losses(losses)
        values = torch.stack(list(losses.values()))
        total = values.sum()
        return total, dict(zip(['loss', *losses], [total, *values.detach().unbind()], strict=True))

    def predict(self, batch_inputs: Tensor, batch_data_samples: SampleList, rescale: bool = True) -> SampleList:
        """The data samples with detections as ``pred_instances``, see :meth:`DINOHead.predict_by_feat`."""
        # The feature maps have no name here, so they go as soon as they are tokens.
        head_inputs = self.forward_transformer(self.extract_feat(batch_inputs), batch_data_samples)
        results = self.bbox_head.predict(**head_inputs, batch_data_samples=batch_data_samples, rescale=rescale)
        return self.add_pred_to_datasample(batch_data_samples, results)

    def extract_feat(self, batch_inputs: Tensor) -> tuple[Tensor, ...]:
        """The neck's feature maps (bs, dim, height, width) of a batch of images (bs, 3, height, width)."""
        if self.channels_last:
            batch_inputs = batch_inputs.contiguous(memory_format=torch.channels_last)
        maps = self.backbone(batch_inputs)
        self._check_maps(maps)
        return self.neck(maps)

    def forward_transformer(
        self,
        img_feats: tuple[Tensor, ...],
        batch_data_samples: OptSampleList = None,
        targets: Targets | None = None,
    ) -> dict:
        """From feature maps to what the head takes; with ``targets``, what its ``loss`` takes besides."""
        tokens = self.pre_transformer(img_feats, batch_data_samples)
        del img_feats
        memory = self.forward_encoder(tokens)
        selection, denoising = self.pre_decoder(memory, tokens, targets)
        states = self.forward_decoder(memory, tokens, selection, denoising)
        head_inputs: dict = dict(hidden_states=states.hidden_states, references=states.references)
        if targets is not None:
            groups = (None, None) if denoising is None else (denoising.num_groups, denoising.targets)
            head_inputs.update(selection=selection, num_dn_groups=groups[0], dn_targets=groups[1])
        return head_inputs

    def pre_transformer(self, mlvl_feats: tuple[Tensor, ...], batch_data_samples: OptSampleList = None) -> Tokens:
        """Flatten the feature maps (bs, dim, height, width) into tokens with positions."""
        self._check_neck(len(mlvl_feats), mlvl_feats[0].shape[1])
        return flatten_levels(mlvl_feats, batch_data_samples or [], self.positional_encoding, self.level_embed)

    def forward_encoder(self, tokens: Tokens) -> Tensor:
        """The memory, (bs, num_tokens, dim)."""
        return self.encoder(tokens)

    def pre_decoder(
        self, memory: Tensor, tokens: Tokens, targets: Targets | None = None
    ) -> tuple[QuerySelection, DenoisingQueries | None]:
        """Choose the queries; with ``targets``, make denoising queries too."""
        encoder_branches = (self.bbox_head.cls_branches[-1], self.bbox_head.reg_branches[-1])
        selection = self.query_selector(memory, tokens, *encoder_branches)
        if self.denoising is None or targets is None:
            return selection, None
        return selection, self.denoising(targets, selection.content.shape[1])

    def forward_decoder(
        self,
        memory: Tensor,
        tokens: Tokens,
        selection: QuerySelection,
        denoising: DenoisingQueries | None = None,
    ) -> DecoderStates:
        """Decode denoising and matching queries together, denoising queries first."""
        query, reference, visible = selection.content, selection.reference, None
        if denoising is not None:
            query = torch.cat([denoising.content, query], 1)
            reference = torch.cat([denoising.reference, reference], 1)
            visible = denoising.visible if denoising.num_groups else None
        return self.decoder(query, reference, memory, tokens, self.bbox_head.reg_branches, visible)

    def _check_maps(self, maps: Sequence[Tensor]) -> None:
        channels, expected = [x.shape[1] for x in maps], self._neck_inputs
        if isinstance(expected, list | tuple) and channels != list(expected):
            raise ValueError(
                f'The backbone gives maps of {channels} channels, the neck expects {list(expected)}. Set '
                '`model.neck.in_channels`, or `model.backbone.out_indices`.'
            )

    def _check_neck(self, num_maps: int, channels: int) -> None:
        if (num_maps, channels) != (self.num_feature_levels, self.embed_dims):
            raise ValueError(
                f'The neck gives {num_maps} feature maps of {channels} channels, the detector expects '
                f'{self.num_feature_levels} of {self.embed_dims}. Set `model.num_feature_levels` and '
                '`model.neck.num_outs` to the same number, `model.embed_dims` and `model.neck.out_channels` too.'
            )
