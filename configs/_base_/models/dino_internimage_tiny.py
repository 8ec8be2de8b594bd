_base_ = 'dino_r50.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='dino_mm.InternImage',
        channels=64,
        depths=(4, 4, 18, 4),
        groups=(4, 8, 16, 32),
        mlp_ratio=4.0,
        drop_path_rate=0.1,
        layer_scale=1.0,
        offset_scale=1.0,
        post_norm=False,
        out_indices=(1, 2, 3),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/OpenGVLab/InternImage/resolve/main/internimage_t_1k_224.pth',
        ),
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
