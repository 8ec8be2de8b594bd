"""What mmengine calls by this name in each package of its hub."""


def register_all_modules(init_default_scope: bool = True) -> None:
    """Import all that configs name, of MMDetection and of dino_mm.

    Args:
        init_default_scope: Make ``mmdet`` the default scope of the process, as all our configs do.
    """
    from mmdet.utils import register_all_modules as register_modules_of_mmdet

    register_modules_of_mmdet(init_default_scope)
    from . import datasets, engine, evaluation, models  # noqa: F401
