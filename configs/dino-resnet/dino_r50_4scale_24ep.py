_base_ = [
    '../_base_/models/dino_r50.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/schedule_24ep.py',
    '../_base_/default_runtime.py',
]
# Position embedding of the original DINO; images without boxes take part.
model = dict(positional_encoding=dict(temperature=20, offset=0.0))
train_dataloader = dict(dataset=dict(filter_cfg=dict(filter_empty_gt=False)))
