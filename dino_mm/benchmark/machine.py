"""What measurements depend on besides the code."""

import platform
from pathlib import Path

import mmcv
import mmdet
import mmengine
import torch

import dino_mm


def environment() -> dict[str, str]:
    """Processor, system and versions, by name; the GPU's name where torch sees one."""
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    modules = (dino_mm, torch, mmcv, mmdet, mmengine)
    return dict(
        machine=next((line.partition(': ')[2] for line in lines if line.startswith('model name')), platform.machine()),
        system=platform.platform(),
        python=platform.python_version(),
        **{module.__name__: str(module.__version__) for module in modules},
        **(dict(gpu=torch.cuda.get_device_name()) if torch.cuda.is_available() else {}),
    )
