_base_ = 'dino_r50.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='dino_mm.TIMMBackbone',
        model_name='convnext_tiny',
        ls_init_value=1.0,
        drop_path_rate=0.0,
        out_indices=(1, 2, 3),
        output_norm=dict(type='LN', eps=1e-6),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_tiny_22k_1k_384.pth',
        ),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)
