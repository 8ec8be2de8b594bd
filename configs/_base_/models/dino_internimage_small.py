_base_ = 'dino_internimage_tiny.py'

model = dict(
    backbone=dict(
        channels=80,
        depths=(4, 4, 21, 4),
        groups=(5, 10, 20, 40),
        post_norm=True,
        init_cfg=dict(
            checkpoint='https://huggingface.co/OpenGVLab/InternImage/resolve/main/internimage_s_1k_224.pth',
        ),
    ),
    neck=dict(in_channels=[160, 320, 640]),
)
