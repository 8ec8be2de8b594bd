_base_ = [
    '../_base_/models/dino_r50.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/schedule_12ep_hacked_trainer.py',
    '../_base_/default_runtime.py',
]
