_base_ = [
    '../_base_/models/dino_vitdet_large.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/schedule_12ep_vitdet_large.py',
    '../_base_/default_runtime.py',
]
# The pyramid's norms decay: detrex does not count detectron2's own LayerNorm among the norms.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'backbone.pyramid': dict(decay_mult=1.0)}))
