default_scope = 'mmdet'
# Neither types such as dino_mm.DINO nor checkpoints of ours need this import. Inferencers do, which open a checkpoint
# before they build a model, for what mmengine cannot open: detectron2's `.pkl`, checkpoints that mmengine itself wrote.
custom_imports = dict(imports=['dino_mm'], allow_failed_imports=False)

# Settings: each reaches every place that depends on it, see docs/own_data.md. None keeps what the recipe states.
image_size = None  # shorter edge in pixels; all lengths of the augmentation follow
batch_size = None  # images of each GPU; the learning rate follows with the number of GPUs
epochs = None  # or
max_iters = None
val_interval = None  # epochs or iterations from one validation to the next; each is followed by a checkpoint

default_hooks = dict(
    # The losses of an iteration are read from the GPU at once.
    runtime_info=dict(type='dino_mm.RuntimeInfoHook'),
    timer=dict(type='IterTimerHook'),
    logger=dict(type='dino_mm.LoggerHook', interval=20, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='dino_mm.CheckpointHook', by_epoch=False, interval=5000, max_keep_ckpts=100),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='dino_mm.DetVisualizationHook'),
    # Before the first iteration: are all pictures there, do epochs end.
    checks=dict(type='dino_mm.CheckRunHook'),
    # Checkpoints of other libraries: to other classes (`class_transfer=True`), averaged weights, resuming.
    loading=dict(type='dino_mm.LoadCheckpointHook'),
    # Steps with NaN or infinite numbers are skipped, counted and logged; ten in a row end the run.
    numbers=dict(type='dino_mm.SkipNotFiniteHook'),
    # `heartbeat.json` in the work directory; a log of bounded length.
    heartbeat=dict(type='dino_mm.HeartbeatHook'),
    # SIGTERM, SIGUSR1, SIGINT, SIGHUP and `--max-hours` save a checkpoint and end the program with status 75.
    preemption=dict(type='dino_mm.PreemptionHook'),
)
custom_hooks = [dict(type='NumClassCheckHook')]

env_cfg = dict(
    cudnn_benchmark=False, mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0), dist_cfg=dict(backend='nccl')
)

vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(type='DetLocalVisualizer', vis_backends=vis_backends, name='visualizer')
log_processor = dict(type='LogProcessor', window_size=20, by_epoch=False)
log_level = 'INFO'
load_from = None
resume = False
