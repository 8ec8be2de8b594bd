_base_ = [
    '../_base_/models/dino_swin_tiny_224.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/schedule_12ep.py',
    '../_base_/default_runtime.py',
]
