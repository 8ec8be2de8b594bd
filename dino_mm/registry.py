"""Registries of scope ``dino_mm``, children of mmengine's root registries.

``type='dino_mm.DINO'`` in any config makes mmengine import this file and the modules in ``locations``, so no
``custom_imports`` is needed. Types without a scope keep the meaning that the config's ``default_scope`` gives them.
"""

from mmengine import registry as root
from mmengine.registry import Registry

SCOPE = 'dino_mm'

MODELS = Registry('model', parent=root.MODELS, scope=SCOPE, locations=['dino_mm.models'])
TASK_UTILS = Registry('task util', parent=root.TASK_UTILS, scope=SCOPE, locations=['dino_mm.models'])
DATASETS = Registry('dataset', parent=root.DATASETS, scope=SCOPE, locations=['dino_mm.datasets'])
TRANSFORMS = Registry('transform', parent=root.TRANSFORMS, scope=SCOPE, locations=['dino_mm.datasets'])
METRICS = Registry('metric', parent=root.METRICS, scope=SCOPE, locations=['dino_mm.evaluation'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=root.OPTIM_WRAPPER_CONSTRUCTORS,
    scope=SCOPE,
    locations=['dino_mm.engine'],
)
HOOKS = Registry('hook', parent=root.HOOKS, scope=SCOPE, locations=['dino_mm.engine'])
LOOPS = Registry('loop', parent=root.LOOPS, scope=SCOPE, locations=['dino_mm.engine'])
