_base_ = [
    '../_base_/models/dino_eva_01.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/schedule_12ep_eva_01.py',
    '../_base_/default_runtime.py',
]
