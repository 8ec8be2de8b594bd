# Each of these is stated here, or in bbox_head.num_classes, and handed down to every part that needs it.
model = dict(
    type='dino_mm.DINO',
    num_queries=900,
    num_feature_levels=4,
    embed_dims=256,
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=1,
        non_blocking=True,
    ),
    backbone=dict(
        type='ResNet',
        depth=50,
        num_stages=4,
        out_indices=(1, 2, 3),
        frozen_stages=0,  # the stem only: detectron2's freeze_at=1
        norm_cfg=dict(type='BN', requires_grad=False),
        norm_eval=True,
        style='pytorch',
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'),
    ),
    neck=dict(
        type='ChannelMapper',
        in_channels=[512, 1024, 2048],
        kernel_size=1,
        out_channels=256,
        bias=True,
        act_cfg=None,
        norm_cfg=dict(type='GN', num_groups=32),
        num_outs=4,
    ),
    positional_encoding=dict(type='SinePositionalEncoding', temperature=10000, normalize=True, offset=-0.5),
    encoder=dict(
        type='dino_mm.DINOEncoder', num_layers=6, num_heads=8, num_points=4, feedforward_channels=2048, dropout=0.0
    ),
    query_selector=dict(type='dino_mm.MixedQuerySelector'),
    denoising=dict(type='dino_mm.CDNGenerator', num_dn_queries=100, label_noise_ratio=0.5, box_noise_scale=1.0),
    decoder=dict(
        type='dino_mm.DINODecoder', num_layers=6, num_heads=8, num_points=4, feedforward_channels=2048, dropout=0.0
    ),
    bbox_head=dict(
        type='dino_mm.DINOHead',
        num_classes=80,
        loss_cls=dict(type='dino_mm.FocalLoss', gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=5.0),
        loss_iou=dict(type='dino_mm.NormalizedGIoULoss', loss_weight=2.0),
    ),
    train_cfg=dict(
        assigner=dict(
            type='dino_mm.HungarianMatcher', cost_class=2.0, cost_bbox=5.0, cost_giou=2.0, alpha=0.25, gamma=2.0
        )
    ),
    test_cfg=dict(max_per_img=300),
)
