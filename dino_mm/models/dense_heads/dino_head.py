"""The head of DINO: class and box branches, losses, detections."""

import copy
from collections.abc import Sequence
from types import EllipsisType

import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.registry import TASK_UTILS as MMDET_TASK_UTILS
from mmdet.structures import SampleList
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmdet.utils import InstanceList, OptConfigType
from mmengine.model import BaseModule, bias_init_with_prob, constant_init
from mmengine.structures import InstanceData
from torch import Tensor, nn

from dino_mm.registry import MODELS

from ...ops.branches import run_branches
from ...ops.step_weights import as_autocast
from ...ops.tracing import is_looked_into
from ...ops.transfer import to_device
from ..box_ops import refine_boxes
from ..builder import refuse_unknown_keys
from ..losses.set_criterion import LOSSES, SetCriterion
from ..structures import Predictions, QuerySelection, Targets


@MODELS.register_module()
class DINOHead(BaseModule):
    """Predicts classes and boxes from every decoder layer, and from the encoder for the query selection.

    Each layer has branches of its own. A layer's box branch serves twice: in the decoder, on the raw output, it
    refines the reference; here, on the normalised output, it predicts.

    Args:
        num_classes: Number of classes; stated here, handed down to the other parts.
        embed_dims: Width ``dim``; handed down by the detector.
        num_pred_layers: Number of branches, decoder layers and encoder; handed down by the detector.
        loss_cls, loss_bbox, loss_iou: Configs of the losses, see :class:`SetCriterion`.
        loss_dn_cls: Config of the denoising queries' classification loss; None is ``loss_cls``.
        train_cfg: ``assigner``, config of the matcher; handed down by the detector.
        test_cfg: ``max_per_img``, detections kept of each image; handed down by the detector.

    Raises:
        TypeError: ``train_cfg`` or ``test_cfg`` has another key.
    """

    def __init__(
        self,
        num_classes: int,
        embed_dims: int,
        num_pred_layers: int,
        loss_cls: dict,
        loss_bbox: dict,
        loss_iou: dict,
        loss_dn_cls: OptConfigType = None,
        train_cfg: OptConfigType = None,
        test_cfg: OptConfigType = None,
    ) -> None:
        super().__init__()
        refuse_unknown_keys('train_cfg', train_cfg or {}, ['assigner'], type(self).__name__)
        refuse_unknown_keys('test_cfg', test_cfg or {}, ['max_per_img'], type(self).__name__)
        self.num_classes = num_classes
        self.max_per_img = (test_cfg or {}).get('max_per_img', 300)
        cls_branch = nn.Linear(embed_dims, num_classes)
        reg_branch = nn.Sequential(
            nn.Linear(embed_dims, embed_dims),
            nn.ReLU(),
            nn.Linear(embed_dims, embed_dims),
            nn.ReLU(),
            nn.Linear(embed_dims, 4),
        )
        self.cls_branches = _copies(cls_branch, num_pred_layers)
        self.reg_branches = _copies(reg_branch, num_pred_layers)
        self.criterion = SetCriterion(
            num_classes,
            MMDET_MODELS.build(loss_cls),
            MMDET_MODELS.build(loss_bbox),
            MMDET_MODELS.build(loss_iou),
            MMDET_TASK_UTILS.build((train_cfg or {}).get('assigner', dict(type='dino_mm.HungarianMatcher'))),
            loss_dn_cls=loss_dn_cls and MMDET_MODELS.build(loss_dn_cls),
        )

    def init_weights(self) -> None:
        """Start with a class probability of 0.01 everywhere and with boxes that stay where the references are."""
        super().init_weights()
        for cls_branch, reg_branch in zip(self.cls_branches, self.reg_branches, strict=True):
            nn.init.constant_(cls_branch.get_parameter('bias'), bias_init_with_prob(0.01))
            constant_init(reg_branch.get_submodule('4'), 0.0, bias=0.0)

    def forward(
        self, hidden_states: Tensor, references: list[Tensor], layers: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predict, in float32 or wider also under autocast, so that losses and costs are.

        Args:
            hidden_states: (num_layers, bs, num_queries, dim).
            references: At least num_layers boxes (bs, num_queries, 4), cxcywh in [0, 1]; each layer refines its own.
            layers: Indices of those that predict; None: all.

        Returns:
            Logits (num_layers, bs, num_queries, num_classes) and boxes (num_layers, bs, num_queries, 4), cxcywh in
            [0, 1] of the image without padding.
        """
        states = as_autocast(hidden_states)
        if layers is None:
            layers = range(len(states))
        else:
            states = torch.stack([states[i] for i in layers])
        scores = run_branches([self.cls_branches[i] for i in layers], states)
        deltas = run_branches([self.reg_branches[i] for i in layers], states)
        boxes = refine_boxes(deltas, torch.stack([references[i] for i in layers]))
        return scores.to(boxes.dtype), boxes

    def loss(
        self,
        hidden_states: Tensor,
        references: list[Tensor],
        selection: QuerySelection,
        num_dn_groups: int | None,
        targets: Targets,
        dn_targets: Targets | None = None,
    ) -> dict[str, Tensor]:
        """All losses, named as mmdet names DINO's.

        Args:
            hidden_states: (num_layers, bs, num_dn + num_queries, dim), denoising queries first.
            references: Boxes that the layers refine.
            selection: The encoder's predictions, if it selects queries.
            num_dn_groups: Denoising groups, 0 in a batch without objects; None without denoising.
            targets: Ground truth of the batch.
            dn_targets: The objects that each denoising group holds; None: all.
        """
        decoder = Predictions(*self(hidden_states, references))
        return self.loss_by_feat(decoder, selection, num_dn_groups, targets, dn_targets)

    def loss_by_feat(
        self,
        decoder: Predictions,
        selection: QuerySelection,
        num_dn_groups: int | None,
        targets: Targets,
        dn_targets: Targets | None = None,
    ) -> dict[str, Tensor]:
        """All losses of the decoder's and the encoder's predictions; arguments as of :meth:`loss`."""
        encoder = None
        if selection.scores is not None and selection.boxes is not None:
            encoder = Predictions(selection.scores.to(decoder.scores.dtype)[None], selection.boxes[None])
        losses, dn_losses = self.criterion(decoder, encoder, targets, num_dn_groups or 0, dn_targets)
        names = layer_names(len(decoder.scores))
        named = name_losses(losses, names if encoder is None else [*names, 'enc_'])
        if num_dn_groups is not None:
            named |= name_losses(dn_losses, [f'{name}dn_' for name in names])
        return named

    def predict(
        self,
        hidden_states: Tensor,
        references: list[Tensor],
        batch_data_samples: SampleList,
        rescale: bool = True,
    ) -> InstanceList:
        """Detections of each image, from the last decoder layer. See :meth:`predict_by_feat`."""
        scores, boxes = self(hidden_states, references, [len(hidden_states) - 1])
        img_metas = [sample.metainfo for sample in batch_data_samples]
        return self.predict_by_feat(scores, boxes, img_metas, rescale)

    def predict_by_feat(
        self,
        all_layers_cls_scores: Tensor,
        all_layers_bbox_preds: Tensor,
        batch_img_metas: list[dict],
        rescale: bool = False,
    ) -> InstanceList:
        """Turn the last layer's predictions into detections: no threshold, no NMS.

        Args:
            all_layers_cls_scores: (num_layers, bs, num_queries, num_classes) logits.
            all_layers_bbox_preds: (num_layers, bs, num_queries, 4) cxcywh in [0, 1].
            batch_img_metas: ``img_shape``, and for ``rescale`` ``ori_shape`` and ``scale_factor`` (w, h).
            rescale: Give boxes in pixels of the original image, not of the network's input.

        Returns:
            For each image the ``max_per_img`` best pairs of query and class: ``bboxes`` (n, 4) xyxy in pixels, clipped
            to the image, those without area removed, ``scores`` (n,) descending, ``labels`` (n,).
        """
        best, labels, boxes = self.best_pairs(all_layers_cls_scores[-1], all_layers_bbox_preds[-1])
        boxes = _to_pixels(bbox_cxcywh_to_xyxy(boxes), batch_img_metas, rescale)
        kept = _indices((boxes[..., 2:] > boxes[..., :2]).all(-1))
        return [
            InstanceData(bboxes=b[i], scores=s[i], labels=c[i])
            for i, b, s, c in zip(kept, boxes, best, labels, strict=True)
        ]

    def best_pairs(self, scores: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The ``max_per_img`` best pairs of query and class of each image.

        Args:
            scores: (bs, num_queries, num_classes) logits.
            boxes: (bs, num_queries, 4).

        Returns:
            Scores (bs, n) in [0, 1], descending; labels (bs, n); boxes (bs, n, 4).
        """
        pairs = scores.sigmoid().flatten(1)
        best, index = pairs.topk(min(self.max_per_img, pairs.shape[1]))
        return best, index % self.num_classes, boxes.gather(1, (index // self.num_classes)[..., None].expand(-1, -1, 4))


def _to_pixels(boxes: Tensor, img_metas: list[dict], rescale: bool) -> Tensor:
    """Boxes (bs, num_detections, 4), xyxy, in [0, 1] to pixels; see :meth:`DINOHead.predict_by_feat`."""
    shape_names = ['img_shape', 'ori_shape'] if rescale else ['img_shape']
    tables = [[_width_first(meta[name][:2]) for meta in img_metas] for name in shape_names]
    if rescale:
        tables.append([(*meta['scale_factor'], *meta['scale_factor']) for meta in img_metas])
    limits, *original = (table[:, None] for table in to_device(tables, boxes.device, boxes.dtype))
    boxes = boxes * limits
    if rescale:
        limits, scales = original
        boxes = boxes / scales
    return boxes.clamp(min=0).minimum(limits)


def _width_first(shape: tuple[int, int]) -> tuple[int, int, int, int]:
    height, width = shape
    return width, height, width, height


def _indices(masks: Tensor) -> Sequence[Tensor | EllipsisType]:
    """What picks out each image's detections where ``masks`` (bs, num_detections) is True: `...` if it is everywhere.

    Reading the masks is the one point of a detection at which the host waits for the device.
    """
    if is_looked_into():  # a trace's detections may be others than those of the images it is made with
        return list(masks)
    rows = masks.cpu().numpy()
    return [...] * len(rows) if rows.all() else to_device([row.nonzero()[0] for row in rows], masks.device)


def layer_names(num_layers: int) -> list[str]:
    """Prefixes of the decoder layers' losses: ``d0.``, ``d1.``, ..., nothing for the last."""
    return [f'd{i}.' for i in range(num_layers - 1)] + ['']


def name_losses(losses: Tensor, prefixes: list[str]) -> dict[str, Tensor]:
    """Name the ``LOSSES`` (3, num_layers) with each layer's prefix; the log shows them as separate values."""
    names = [f'{prefix}{name}' for name in LOSSES for prefix in prefixes]
    return dict(zip(names, losses.flatten().unbind(), strict=True))


def _copies(branch: nn.Module, count: int) -> nn.ModuleList:
    """Branches with weights of their own that start alike."""
    return nn.ModuleList(copy.deepcopy(branch) for _ in range(count))
