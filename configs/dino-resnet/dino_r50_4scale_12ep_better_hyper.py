_base_ = [
    '../_base_/models/dino_r50.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/schedule_12ep.py',
    '../_base_/default_runtime.py',
]
# Matched queries weigh class errors twice as much; denoising queries keep the weight of 1.
model = dict(
    backbone=dict(frozen_stages=-1),
    denoising=dict(num_dn_queries=300),
    bbox_head=dict(loss_cls=dict(loss_weight=2.0), loss_dn_cls={{_base_.model.bbox_head.loss_cls}}),
)
