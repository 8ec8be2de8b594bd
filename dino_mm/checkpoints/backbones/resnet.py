"""ResNet: torchvision's names are mmdet's; detectron2 has its own."""

from ..names import NameMap

_HEAD = ((r'^fc\.', 'classification head'), (r'^stem\.fc\.', 'classification head'))

TORCHVISION = NameMap(
    title='ResNet (torchvision names)',
    signature=(r'^conv1\.weight$', r'^layer1\.0\.conv1\.weight$'),
    dropped=_HEAD,
)

#: Of `R-50.pkl`, `R-101.pkl` and of detrex's ResNet detectors.
DETECTRON2 = NameMap(
    title='ResNet (detectron2 names)',
    signature=(r'^stem\.conv1\.weight$', r'^res2\.0\.conv1\.weight$'),
    renames=(
        (r'^stem\.conv1\.norm\.', 'bn1.'),
        (r'^stem\.conv1\.', 'conv1.'),
        *((rf'^res{stage + 1}\.', f'layer{stage}.') for stage in (1, 2, 3, 4)),
        (r'\.shortcut\.norm\.', '.downsample.1.'),
        (r'\.shortcut\.', '.downsample.0.'),
        (r'\.conv(\d)\.norm\.', r'.bn\1.'),
    ),
    dropped=_HEAD,
)
