_base_ = __import__('dino_mm').cfg('dino-resnet/dino_r50_4scale_12ep.py')
data_root, metainfo = 'data', dict(classes=('0', '1', '2'))
dataset = dict(data_root=data_root, metainfo=metainfo)
train_dataloader = dict(dataset=dict(**dataset, ann_file='annotations/train.json', data_prefix=dict(img='train/')))
val_dataloader = dict(dataset=dict(**dataset, ann_file='annotations/val.json', data_prefix=dict(img='val/')))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=f'{data_root}/annotations/val.json')
test_evaluator = val_evaluator
model = dict(bbox_head=dict(num_classes=3))
work_dir = 'runs/detector'
