"""Where the decoder's queries start: from the encoder (mixed or pure selection) or from learnt parameters."""

from abc import abstractmethod

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from dino_mm.registry import MODELS

from ..box_ops import encode_boxes, wavelengths
from ..structures import QuerySelection, Tokens
from .transformer import init_transformer

#: Side of the box that a token of the finest level proposes, in parts of the image; doubles with each level.
FINEST_PROPOSAL_SIZE = 0.05
#: A proposal must keep this distance from the image's edge.
PROPOSAL_MARGIN = 0.01


def encoder_proposals(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """One box around each token, in logit space.

    Padding, and proposals nearer than ``PROPOSAL_MARGIN`` to the edge, are not valid: their coordinates are +inf,
    hence boxes (1, 1, 1, 1) with zero gradient, whatever a branch adds.

    Returns:
        The boxes (bs, num_tokens, 4) and where they are valid, (bs, num_tokens, 1).

    Source: Deformable DETR, appendix A.4.
    """
    sides = torch.cat(
        [
            tokens.centers.new_full((height * width,), FINEST_PROPOSAL_SIZE * 2**level)
            for level, (height, width) in enumerate(tokens.levels.shapes)
        ]
    )
    sizes = sides[None, :, None].expand_as(tokens.centers)
    boxes = torch.cat([tokens.centers, sizes], -1)
    valid = ((boxes > PROPOSAL_MARGIN) & (boxes < 1 - PROPOSAL_MARGIN)).all(-1, keepdim=True)
    if tokens.padding_mask is not None:
        valid = valid & ~tokens.padding_mask[..., None]
    return torch.log(boxes / (1 - boxes)).masked_fill(~valid, torch.inf), valid


class EncoderQuerySelector(BaseModule):
    """Selects the ``num_queries`` tokens of the encoder with the highest class score; their boxes are the references.

    Subclasses say what the queries contain (:meth:`content`). A map with fewer tokens than ``num_queries`` gives
    all its tokens.

    Args:
        embed_dims: Width ``dim``; handed down by the detector.
        num_queries: Number of queries; handed down by the detector.
    """

    uses_encoder = True
    """Whether the head needs a prediction branch for the encoder's output."""

    def __init__(self, embed_dims: int, num_queries: int) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.memory_trans_fc = nn.Linear(embed_dims, embed_dims)
        self.memory_trans_norm = nn.LayerNorm(embed_dims)

    def init_weights(self) -> None:
        """See :func:`init_transformer`."""
        super().init_weights()
        init_transformer(self)

    @abstractmethod
    def content(self, boxes: Tensor) -> Tensor:
        """Content queries (bs, num_queries, dim) for the selected ``boxes`` (bs, num_queries, 4), detached."""

    def select(self, scores: Tensor) -> Tensor:
        """Which tokens become queries, (bs, num_queries) int64, from ``scores`` (bs, num_tokens); the best comes first.

        Ranks count, as each may have a content of its own: where scores differ by less than their rounding, another
        device may give other results.
        """
        return scores.topk(min(self.num_queries, scores.shape[1]), dim=1).indices

    def forward(self, memory: Tensor, tokens: Tokens, cls_branch: nn.Module, reg_branch: nn.Module) -> QuerySelection:
        """Select queries from ``memory`` (bs, num_tokens, dim) with the head's encoder branches."""
        proposals, valid = encoder_proposals(tokens)
        features = self.memory_trans_norm(self.memory_trans_fc(memory.masked_fill(~valid, 0.0)))
        scores = cls_branch(features)
        best = self.select(scores.max(-1).values)[..., None]

        features = features.gather(1, best.expand(-1, -1, features.shape[-1]))
        boxes = (reg_branch(features) + proposals.gather(1, best.expand(-1, -1, 4))).sigmoid()
        reference = boxes.detach()
        scores = scores.gather(1, best.expand(-1, -1, scores.shape[-1]))
        return QuerySelection(self.content(reference), reference, scores, boxes)


@MODELS.register_module()
class MixedQuerySelector(EncoderQuerySelector):
    """DINO's mixed query selection: positions from the encoder, contents learnt, one for each rank.

    Args: as :class:`EncoderQuerySelector`.

    Source: DINO, section 3.4.
    """

    def __init__(self, embed_dims: int, num_queries: int) -> None:
        super().__init__(embed_dims, num_queries)
        self.query_embedding = nn.Embedding(num_queries, embed_dims)

    def content(self, boxes: Tensor) -> Tensor:
        """The learnt content of each rank, whatever the boxes are."""
        bs, count, _ = boxes.shape
        return self.query_embedding.weight[:count].expand(bs, -1, -1)


@MODELS.register_module()
class PureQuerySelector(EncoderQuerySelector):
    """Two-stage Deformable DETR's selection: contents too come from the selected boxes.

    Args: as :class:`EncoderQuerySelector`.

    Source: Deformable DETR, appendix A.4; "pure query selection" in DINO, section 3.4.
    """

    def __init__(self, embed_dims: int, num_queries: int) -> None:
        super().__init__(embed_dims, num_queries)
        self.pos_trans_fc = nn.Linear(embed_dims * 2, embed_dims)
        self.pos_trans_norm = nn.LayerNorm(embed_dims)

    def content(self, boxes: Tensor) -> Tensor:
        """A linear map of the boxes' sine encoding, normalised."""
        sine = encode_boxes(boxes, wavelengths(self.pos_trans_fc.out_features // 2, boxes.device))
        return self.pos_trans_norm(self.pos_trans_fc(sine.to(self.pos_trans_fc.weight.dtype)))


@MODELS.register_module()
class LearnedQueries(BaseModule):
    """Learnt contents and boxes that do not look at the image: DAB-DETR's queries, ``query_selector=None``.

    Args: as :class:`EncoderQuerySelector`.

    Source: DAB-DETR; "static queries" in DINO, section 3.4.
    """

    uses_encoder = False

    def __init__(self, embed_dims: int, num_queries: int) -> None:
        super().__init__()
        self.query_embedding = nn.Embedding(num_queries, embed_dims)
        self.reference_logits = nn.Embedding(num_queries, 4)

    def forward(self, memory: Tensor, tokens: Tokens, cls_branch: nn.Module, reg_branch: nn.Module) -> QuerySelection:
        """The same queries for every image of ``memory`` (bs, num_tokens, dim); the rest is not looked at."""
        bs = len(memory)
        reference = self.reference_logits.weight.sigmoid()
        return QuerySelection(self.query_embedding.weight.expand(bs, -1, -1), reference.expand(bs, -1, -1))
