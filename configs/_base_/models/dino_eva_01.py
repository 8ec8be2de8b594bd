_base_ = 'dino_vitdet_base.py'

model = dict(
    backbone=dict(
        backbone=dict(
            embed_dims=1408,
            depth=40,
            num_heads=16,
            mlp_ratio=6144 / 1408,
            img_size=1280,
            window_size=16,
            global_attn_indexes=(3, 7, 11, 15, 19, 23, 27, 31, 35, 39),
            drop_path_rate=0.6,
            key_bias=False,
            frozen_stages=0,  # the patch embedding
            with_cp=True,
            init_cfg=None,
        ),
        in_channels=1408,
        # Cascade Mask R-CNN on Objects365: the pyramid is pretrained too.
        init_cfg=dict(type='Pretrained', checkpoint='https://huggingface.co/BAAI/EVA/resolve/main/eva_o365.pth'),
    ),
)
