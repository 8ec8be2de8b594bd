_base_ = 'dino_vitdet_base.py'

model = dict(
    backbone=dict(
        backbone=dict(
            embed_dims=1024,
            depth=24,
            num_heads=16,
            global_attn_indexes=(5, 11, 17, 23),
            drop_path_rate=0.4,
            init_cfg=dict(checkpoint='https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_large.pth'),
        ),
        in_channels=1024,
    ),
)
