_base_ = [
    '../_base_/models/dino_swin_tiny_224.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/schedule_12ep.py',
    '../_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        init_cfg=dict(
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.8/swin_tiny_patch4_window7_224_22kto1k_finetune.pth'
        )
    )
)
