_base_ = 'dino_swin_small_224.py'

model = dict(
    backbone=dict(
        embed_dims=128,
        num_heads=(4, 8, 16, 32),
        window_size=12,
        init_cfg=dict(
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window12_384_22kto1k.pth'
        ),
    ),
    neck=dict(in_channels=[256, 512, 1024]),
)
