_base_ = [
    '../_base_/models/dino_convnext_small_384.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/schedule_12ep.py',
    '../_base_/default_runtime.py',
]
# The backbone's norms decay: detrex does not count ConvNeXt's own LayerNorm among the norms.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(decay_mult=1.0))))
