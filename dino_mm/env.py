"""``python -m dino_mm.env``: what is installed, what a training would run on and what is missing, to paste anywhere.

It runs where imports fail: ``dino_mm`` leaves its checks to this command, and whatever is imported here may fail. The
exit status is 0 if a training could start, else 1.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import distributions
from typing import Any

from dino_mm import compat

#: Import names that a training needs, and one that it does without.
NEEDED = ('torch', 'torchvision', 'numpy', 'scipy', 'cv2', 'mmcv', 'mmengine', 'mmdet', 'timm', 'pycocotools')
OPTIONAL = ('faster_coco_eval',)
#: Distributions of other names than what is imported; the first is the one to install.
DISTRIBUTIONS = {
    'dino_mm': ('mmdet-dino',),
    'cv2': ('opencv-python-headless', 'opencv-python', 'opencv-contrib-python-headless', 'opencv-contrib-python'),
    'faster_coco_eval': ('faster-coco-eval',),
    **compat.DISTRIBUTIONS,
}
#: Of the package: what configs refer to, which imports all that a training needs.
PARTS = ('datasets', 'engine', 'evaluation', 'models')


def main() -> int:
    """Print the report.

    Returns:
        The exit status.
    """
    error = _error_of_importing('dino_mm', *(f'dino_mm.{part}' for part in PARTS))
    missing: list[str] = []
    lines = [('python', f'{platform.python_version()}, {platform.platform()}')]
    lines += [*_libraries(missing), *_attention(missing), *_gpus(missing), *_compilers()]
    lines += [('missing', line) for line in missing]
    lines.append(('training', 'could start here' if error is None else f'could not start here: {error}'))
    print('\n'.join(f'{title:17} {text}' for title, text in lines))
    return 0 if error is None else 1


def _error_of_importing(*names: str) -> str | None:
    """Error of the first import that fails, in one line; None if all succeed."""
    try:
        for name in names:
            module = importlib.import_module(name)
            if name == 'dino_mm':
                importlib.reload(module)  # with the checks that it left out for this command
    except Exception as error:  # a library that does not fit may raise anything
        return _one_line(error)
    return None


def _one_line(error: Exception) -> str:
    return ' '.join(f'{type(error).__name__}: {error}'.split())


def _libraries(missing: list[str]) -> Iterator[tuple[str, str]]:
    for name in ('dino_mm', *NEEDED, *OPTIONAL):
        known = DISTRIBUTIONS.get(name, (name,))
        found = dict.fromkeys(f'{d.version} ({d.metadata["Name"]})' for one in known for d in distributions(name=one))
        error = None if name == 'dino_mm' else _error_of_importing(name)
        text = ' and '.join(found) or 'a folder without a version'
        if error == f'ModuleNotFoundError: No module named {name!r}':
            text = 'not installed' if not found else f'{text}, without its code'
            pip = compat.install_command(name) if name in compat.SUPPORTED else f'pip install {known[0]}'
            missing.append(f'{name}: {pip}')
        elif error is not None:
            text += f', cannot be imported: {error}'
        elif name == 'torch':
            text += f', built for {_built_for(importlib.import_module(name))}'
        yield name, text
    try:
        here = compat.found_set()
        yield 'set', f'{here.label}, {"tested" if here.tested else "untested"}: {here}'
    except Exception as error:
        yield 'set', _one_line(error)


def _built_for(torch: Any) -> str:
    if torch.version.cuda:
        return f'CUDA {torch.version.cuda}'
    return f'ROCm {torch.version.hip}' if torch.version.hip else 'CPUs'


def _attention(missing: list[str]) -> Iterator[tuple[str, str]]:
    """The back-ends of deformable attention, and which one a device takes."""
    try:
        ops: Any = importlib.import_module('dino_mm.ops.deformable_sampling')
        devices = ['cpu', 'cuda'] if importlib.import_module('torch').cuda.is_available() else ['cpu']
        yield 'attention has', ', '.join(name for name, backend in ops.BACKENDS.items() if backend.is_here)
        chosen = f', of {ops.VARIABLE}' if os.environ.get(ops.VARIABLE) else ''
        for device in devices:
            taken = ops.backend_for(device)
            yield f'attention, {device}', taken + chosen
            if (device, taken, chosen) == ('cuda', 'pytorch', ''):
                faster = [f'{name} {one.way_to_get}' for name, one in ops.BACKENDS.items() if not one.is_here]
                missing.append(f'faster deformable attention on the GPU: {"; or ".join(faster)}')
    except Exception as error:
        yield 'attention', _one_line(error)


def _gpus(missing: list[str]) -> Iterator[tuple[str, str]]:
    """What the driver lists, and what torch sees of it."""
    listed = _output('nvidia-smi', '--query-gpu=name,memory.total,driver_version', '--format=csv,noheader').splitlines()
    version = re.search(r'CUDA Version: *([\d.]+)', _output('nvidia-smi'))
    up_to = f' for CUDA up to {version[1]}' if version else ''
    yield from (('gpu', re.sub(r'(.*), (.*), (.*)', rf'\1, \2, driver \3{up_to}', line)) for line in listed)
    if _error_of_importing('torch') is not None:
        return
    torch: Any = importlib.import_module('torch')
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield 'gpus for torch', ', '.join(torch.cuda.get_device_name(i) for i in range(seen)) or 'none'
    if seen or not listed or os.environ.get('CUDA_VISIBLE_DEVICES') in ('', '-1'):
        return
    if _built_for(torch) == 'CPUs':
        way = 'pip install --force-reinstall torch torchvision'
    else:
        way = f'a newer driver, or a torch{up_to or " of the driver"}, see https://pytorch.org/get-started/locally'
    missing.append(f'a torch that sees the GPU, this one is built for {_built_for(torch)}: {way}')


def _compilers() -> Iterator[tuple[str, str]]:
    """Of mmengine's report, which needs more than a training does: where it fails, nothing is said."""
    try:
        found: dict[str, object] = importlib.import_module('mmengine.utils.dl_utils').collect_env()
    except Exception:
        return
    yield from ((name.lower(), str(found[name])) for name in ('NVCC', 'GCC') if name in found)


def _output(*command: str) -> str:
    """What a command prints; nothing if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ''


if __name__ == '__main__':
    raise SystemExit(main())
