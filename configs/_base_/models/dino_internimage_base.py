_base_ = 'dino_internimage_small.py'

model = dict(
    backbone=dict(
        channels=112,
        groups=(7, 14, 28, 56),
        init_cfg=dict(
            checkpoint='https://huggingface.co/OpenGVLab/InternImage/resolve/main/internimage_b_1k_224.pth',
        ),
    ),
    neck=dict(in_channels=[224, 448, 896]),
)
