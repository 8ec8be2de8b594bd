_base_ = [
    '../_base_/models/dino_focalnet_large_lrf_384_fl4.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/schedule_36ep.py',
    '../_base_/default_runtime.py',
]
model = dict(
    num_feature_levels=5,
    backbone=dict(out_indices=(0, 1, 2, 3), drop_path_rate=0.4),
    neck=dict(in_channels=[192, 384, 768, 1536], num_outs=5),
)
