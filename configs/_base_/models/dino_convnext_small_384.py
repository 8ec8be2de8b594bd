_base_ = 'dino_convnext_tiny_384.py'

model = dict(
    backbone=dict(
        model_name='convnext_small',
        init_cfg=dict(checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_small_22k_1k_384.pth'),
    ),
)
