_base_ = 'dino_r50.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='dino_mm.TIMMBackbone',
        model_name='focalnet_tiny_lrf',
        drop_path_rate=0.1,
        out_indices=(1, 2, 3),
        output_norm=dict(type='LN', eps=1e-5),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/microsoft/FocalNet/releases/download/v1.0.0/focalnet_tiny_lrf.pth',
        ),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)
