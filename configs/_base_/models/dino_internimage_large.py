_base_ = 'dino_internimage_small.py'

model = dict(
    backbone=dict(
        channels=160,
        depths=(5, 5, 22, 5),
        groups=(10, 20, 40, 80),
        offset_scale=2.0,
        drop_path_rate=0.0,
        init_cfg=dict(
            checkpoint='https://huggingface.co/OpenGVLab/InternImage/resolve/main/internimage_l_22kto1k_384.pth',
        ),
    ),
    neck=dict(in_channels=[320, 640, 1280]),
)
