_base_ = 'dino_convnext_tiny_384.py'

model = dict(
    backbone=dict(
        model_name='convnext_base',
        init_cfg=dict(checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_base_22k_1k_384.pth'),
    ),
    neck=dict(in_channels=[256, 512, 1024]),
)
