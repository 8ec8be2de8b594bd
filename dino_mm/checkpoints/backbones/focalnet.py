"""FocalNet: Microsoft's names, which detrex has too, and timm's."""

from torch import Tensor

from ..names import NameMap


def _as_convolution(name: str, tensor: Tensor, own: Tensor) -> Tensor:
    """Linear layers over channels are 1x1 convolutions in timm."""
    return tensor[..., None, None] if (tensor.dim(), own.dim()) == (2, 4) else tensor


_HEAD = ((r'^norm\.', 'norm before the classification head'), (r'^head\.', 'classification head'))
_OUTPUT_NORMS = ((r'^output_norms\.', 'a classifier has no output norms: as initialised'),)
_MICROSOFT = (r'^patch_embed\.proj\.weight$', r'^layers\.0\.blocks\.0\.modulation\.f\.weight$')
_RENAMES = (
    (r'^norm(\d)\.', r'output_norms.\1.'),
    (r'^patch_embed\.', 'body.model.stem.'),
    # A stage ends by leading to the next one; in timm the next one begins with it.
    *((rf'^layers\.{stage}\.downsample\.', f'body.model.layers.{stage + 1}.downsample.') for stage in range(3)),
    (r'^layers\.', 'body.model.layers.'),
    (r'\.gamma_(\d)$', r'.ls\1.gamma'),
)

#: Models that normalise before modulation and MLP: tiny, small and base.
FOCALNET = NameMap(
    title='FocalNet (Microsoft names)',
    signature=_MICROSOFT,
    renames=_RENAMES,
    dropped=_HEAD,
    initialised=_OUTPUT_NORMS,
    adapt=_as_convolution,
)

#: Models that normalise after them: large and larger. Their names are FOCALNET's and some more: the model decides.
FOCALNET_POST_NORM = NameMap(
    title='FocalNet with norms after the layers (Microsoft names)',
    signature=(*_MICROSOFT, r'^layers\.0\.blocks\.0\.gamma_1$'),
    renames=(
        *_RENAMES,
        (r'(\.blocks\.\d+\.norm\d)\.', r'\1_post.'),
        (r'\.modulation\.ln\.', '.modulation.norm.'),
    ),
    dropped=_HEAD,
    initialised=_OUTPUT_NORMS,
    adapt=_as_convolution,
)

TIMM_FOCALNET = NameMap(
    title='FocalNet (timm names)',
    signature=(r'^stem\.proj\.weight$', r'^layers\.0\.blocks\.0\.modulation\.f\.weight$'),
    renames=((r'^', 'body.model.'),),
    dropped=_HEAD,
    initialised=_OUTPUT_NORMS,
)
