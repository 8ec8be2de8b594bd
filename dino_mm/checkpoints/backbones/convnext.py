"""ConvNeXt: Facebook's names, which detrex has too, and timm's."""

from ..names import NameMap

_OUTPUT_NORMS = ((r'^output_norms\.', 'a classifier has no output norms: as initialised'),)

CONVNEXT = NameMap(
    title='ConvNeXt (Facebook names)',
    signature=(r'^downsample_layers\.0\.0\.weight$', r'^stages\.0\.0\.dwconv\.weight$'),
    renames=(
        (r'^norm(\d)\.', r'output_norms.\1.'),
        (r'^downsample_layers\.0\.', 'body.model.stem.'),
        (r'^downsample_layers\.(\d)\.', r'body.model.stages.\1.downsample.'),
        (r'^stages\.(\d)\.(\d+)\.', r'body.model.stages.\1.blocks.\2.'),
        (r'\.dwconv\.', '.conv_dw.'),
        (r'\.pwconv(\d)\.', r'.mlp.fc\1.'),
    ),
    dropped=((r'^norm\.', 'norm before the classification head'), (r'^head\.', 'classification head')),
    initialised=_OUTPUT_NORMS,
)

TIMM_CONVNEXT = NameMap(
    title='ConvNeXt (timm names)',
    signature=(r'^stem\.0\.weight$', r'^stages\.0\.blocks\.0\.conv_dw\.weight$'),
    renames=((r'^', 'body.model.'),),
    dropped=((r'^head\.', 'classification head and the norm before it'),),
    initialised=_OUTPUT_NORMS,
)
