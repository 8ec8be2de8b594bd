_base_ = 'dino_swin_small_224.py'

model = dict(
    backbone=dict(
        embed_dims=192,
        num_heads=(6, 12, 24, 48),
        init_cfg=dict(
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_large_patch4_window7_224_22kto1k.pth'
        ),
    ),
    neck=dict(in_channels=[384, 768, 1536]),
)
