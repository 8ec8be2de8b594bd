_base_ = [
    '../_base_/models/dino_r50.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/schedule_12ep.py',
    '../_base_/default_runtime.py',
]
custom_hooks = [dict(type='NumClassCheckHook'), dict(type='EMAHook', momentum=0.001)]  # detrex's decay of 0.999
