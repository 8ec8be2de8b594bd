"""The network as it is exported: from padded images to a fixed number of detections."""

from torch import Tensor, nn

from ..models.box_ops import corners
from ..models.detectors.dino import DINO
from ..models.structures import ImageSizes

INPUTS = ('images', 'sizes')
OUTPUTS = ('boxes', 'scores', 'labels')


class ExportNetwork(nn.Module):
    """A detector with its post-processing, in operators that every format has.

    Boxes without area after clipping, which the detector removes, stay: the number of detections is fixed.

    Args:
        model: The detector; it is put into evaluation mode.
    """

    def __init__(self, model: DINO) -> None:
        super().__init__()
        self.model = model
        self.eval()  # all of it: torch's exporter gives every part the mode that this one had

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            images: (bs, 3, height, width), normalised, padded with zeros at the bottom and right.
            sizes: (bs, 2) int64, (height, width) of each image without padding.

        Returns:
            Boxes (bs, n, 4), xyxy in pixels of ``images``, clipped to the image; scores (bs, n) in [0, 1], descending;
            labels (bs, n) int64.
        """
        head = self.model.bbox_head
        batch_shape = (images.shape[2], images.shape[3])
        states = self.model.forward_transformer(self.model.extract_feat(images), ImageSizes(sizes, batch_shape))
        logits, boxes = head(**states, layers=[self.model.decoder.num_layers - 1])
        scores, labels, boxes = head.best_pairs(logits[0], boxes[0])
        limits = sizes.flip(1).repeat(1, 2)[:, None].to(boxes)
        boxes = (corners(boxes) * limits).clamp(min=0).minimum(limits)
        return boxes, scores, labels
