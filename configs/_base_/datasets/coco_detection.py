data_root = '{{$DATA_ROOT:data/coco/}}'.rstrip('/') + '/'  # file names are glued to it
backend_args = None
# Decodes and resizes: 'pillow' filters as it shrinks, as detrex has it; 'cv2' is faster and does not.
image_backend = '{{$IMAGE_BACKEND:pillow}}'

# detrex's augmentation: half of the images are resized, cropped and resized again.
shortest_edge = dict(resize_type='dino_mm.ResizeShortestEdge', backend=image_backend)
train_sizes = [(short, 1333) for short in range(480, 801, 32)]
resize = dict(type='RandomChoiceResize', scales=train_sizes, **shortest_edge)
resize_before_crop = dict(
    type='RandomChoiceResize',
    scales=[(400, 100000), (500, 100000), (600, 100000)],  # no limit of the longer edge
    **shortest_edge,
)
crop = dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600), allow_negative_crop=True)

# dino_mm's, for pictures of 16 bits. mmdet's DetInferencer looks for a type of just this name, without a scope.
load_image = dict(
    type='LoadImageFromFile',
    _scope_='dino_mm',
    imdecode_backend=image_backend,
    backend_args=backend_args,
)
meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
train_pipeline = [
    load_image,
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomChoice', transforms=[[resize], [resize_before_crop, crop, resize]]),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1e-5, 1e-5), keep_empty=False),
    dict(type='PackDetInputs', meta_keys=meta_keys),
]
# dino_mm.ResizeShortestEdge under the name by which sahi looks for it, without a scope.
test_resize = dict(type='Resize', _scope_='dino_mm', scale=(800, 1333), backend=image_backend)
test_pipeline = [
    load_image,
    test_resize,
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=meta_keys),
]
tta_pipeline = [
    load_image,
    dict(
        type='TestTimeAug',
        transforms=[
            [test_resize],
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
            [dict(type='LoadAnnotations', with_bbox=True)],
            [dict(type='PackDetInputs', meta_keys=meta_keys)],
        ],
    ),
]
tta_model = dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.7), max_per_img=300))

train_dataloader = dict(
    batch_size=2,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    batch_sampler=dict(type='AspectRatioBatchSampler'),
    dataset=dict(
        type='dino_mm.CheckedCocoDataset',
        data_root=data_root,
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
        backend_args=backend_args,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='dino_mm.CheckedCocoDataset',
        data_root=data_root,
        ann_file='annotations/instances_val2017.json',
        data_prefix=dict(img='val2017/'),
        test_mode=True,
        pipeline=test_pipeline,
        backend_args=backend_args,
    ),
)
test_dataloader = val_dataloader

# proposal_nums as pycocotools has them: AP at 100 detections an image, at every IoU and area.
val_evaluator = dict(
    type='dino_mm.CheckedCocoMetric',
    ann_file=data_root + 'annotations/instances_val2017.json',
    metric='bbox',
    proposal_nums=(1, 10, 100),
    format_only=False,
    backend_args=backend_args,
)
test_evaluator = val_evaluator
