"""Models of timm without a scheme of their own here, within ``TIMMBackbone``."""

from ..names import NameMap

#: Fits any names, so it is tried only when nothing else does.
ANY = NameMap(
    title='a model of timm (timm names)',
    signature=(),
    renames=((r'^', 'body.model.'),),
    dropped=((r'^(fc|head|classifier|conv_head|bn2|norm|fc_norm|head_norm)\.', 'behind the last feature map'),),
    initialised=((r'^output_norms\.', 'a classifier has no output norms: as initialised'),),
)
