_base_ = 'dino_r50.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='dino_mm.SimpleFeaturePyramid',
        backbone=dict(
            type='dino_mm.ViTDet',
            embed_dims=768,
            depth=12,
            num_heads=12,
            img_size=1024,
            window_size=14,
            global_attn_indexes=(2, 5, 8, 11),
            drop_path_rate=0.1,
            init_cfg=dict(
                type='Pretrained', checkpoint='https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth'
            ),
        ),
        in_channels=768,
        scale_factors=(2.0, 1.0, 0.5),
        num_outs=4,
    ),
    neck=dict(in_channels=[256, 256, 256, 256]),
)
