_base_ = 'dino_swin_tiny_224.py'

model = dict(
    backbone=dict(
        depths=(2, 2, 18, 2),
        drop_path_rate=0.2,
        init_cfg=dict(
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_small_patch4_window7_224.pth'
        ),
    ),
)
