_base_ = 'dino_swin_large_224.py'

model = dict(
    backbone=dict(
        window_size=12,
        init_cfg=dict(
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_large_patch4_window12_384_22kto1k.pth'
        ),
    ),
)
