_base_ = [
    '../_base_/models/dino_internimage_large.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/schedule_12ep.py',
    '../_base_/default_runtime.py',
]
