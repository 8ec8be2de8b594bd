_base_ = [
    '../_base_/models/dino_swin_large_384.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/schedule_12ep.py',
    '../_base_/default_runtime.py',
]
model = dict(
    num_feature_levels=5,
    backbone=dict(out_indices=(0, 1, 2, 3)),
    neck=dict(in_channels=[192, 384, 768, 1536], num_outs=5),
)
