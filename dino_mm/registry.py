"""Registries of scope ``dino_mm``, children of mmengine's root registries.

``type='dino_mm.DINO'`` in any config makes mmengine import this file and the modules in ``locations``, so no
``custom_imports`` is needed. Types without a scope keep the meaning that the config's ``default_scope`` gives them.
"""

from mmdet import registry as mmdet
from mmengine.registry import Registry

SCOPE = 'dino_mm'


class _Registry(Registry):
    """One of this scope; a type without a scope that it lacks is MMDetection's.

    For mmengine makes this scope the default one to read a name from our metafiles, as in
    ``DetInferencer(NAME, scope='dino_mm')``. MMDetection's registry cannot be the parent: mmengine looks for scopes
    among the children of its own registries alone.
    """

    def __init__(self, base: Registry, location: str) -> None:
        super().__init__(base.name, parent=base.parent, scope=SCOPE, locations=[location])
        self.base = base

    def get(self, key: str) -> type | None:
        """The class of ``key``; None if there is none."""
        self.import_from_location()
        return super().get(key) if '.' in key or key in self._module_dict else self.base.get(key)


MODELS = _Registry(mmdet.MODELS, 'dino_mm.models')
TASK_UTILS = _Registry(mmdet.TASK_UTILS, 'dino_mm.models')
DATASETS = _Registry(mmdet.DATASETS, 'dino_mm.datasets')
TRANSFORMS = _Registry(mmdet.TRANSFORMS, 'dino_mm.datasets')
METRICS = _Registry(mmdet.METRICS, 'dino_mm.evaluation')
OPTIM_WRAPPER_CONSTRUCTORS = _Registry(mmdet.OPTIM_WRAPPER_CONSTRUCTORS, 'dino_mm.engine')
HOOKS = _Registry(mmdet.HOOKS, 'dino_mm.engine')
LOOPS = _Registry(mmdet.LOOPS, 'dino_mm.engine')
VISUALIZERS = _Registry(mmdet.VISUALIZERS, 'dino_mm.visualization')
VISBACKENDS = _Registry(mmdet.VISBACKENDS, 'dino_mm.visualization')
