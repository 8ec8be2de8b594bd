"""Open checkpoint files: safely, from disk or from the network, and in one line if something is wrong."""

import argparse
import hashlib
import pickle
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import get_torchvision_models
from packaging.version import Version
from tqdm import tqdm

from dino_mm.compat import found_set

from .errors import CheckpointError
from .runner_types import RUNNER_TYPES

#: Where detectron2 keeps its model zoo.
DETECTRON2_ZOO = 'https://dl.fbaipublicfiles.com/detectron2/'
#: Schemes of torchvision's weights; the second is mmengine's older name of it.
TORCHVISION = ('torchvision', 'modelzoo')
#: Plain containers, besides tensors and what every checkpoint has, that published checkpoints hold.
PLAIN_CLASSES: list = [argparse.Namespace]
#: Of the pickles that detectron2 publishes: numpy arrays and their types.
ARRAY_CLASSES = {
    ('numpy.core.multiarray', '_reconstruct'),
    ('numpy._core.multiarray', '_reconstruct'),
    ('numpy', 'ndarray'),
    ('numpy', 'dtype'),
    ('_codecs', 'encode'),
}
#: What tensors, state dicts and numpy's bytes are made of.
TENSOR_TYPES = {
    '_codecs.encode',
    'builtins.complex',
    'builtins.set',
    'collections.Counter',  # the milestones of a MultiStepLR
    'collections.OrderedDict',
    'torch._utils._rebuild_tensor_v2',
    'torch._utils._rebuild_parameter',
    'torch.Size',
    'torch.device',
    *(f'torch.{kind}' for kind in ('float64', 'float32', 'float16', 'bfloat16', 'int64', 'int32', 'uint8', 'bool')),
}
#: Files that people give in place of a checkpoint.
OTHER_FILES = {'.onnx': 'an exported model', '.pt2': 'an exported model', '.py': 'a config', '.json': 'annotations'}
#: First digits of a file's SHA-256 at the end of its name, as in ``resnet50-0676ba61.pth``.
HASH_IN_NAME = re.compile(r'-([0-9a-f]{8,64})\.\w+$')
CHUNK = 1 << 20


def open_checkpoint(location: str, trust: bool = False, lazily: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        location: A path, an ``http(s)://``, ``detectron2://`` or ``torchvision://`` address; ``.pkl`` is detectron2's
            format of arrays. Of a training's folder it is the best checkpoint, see :func:`best_in`.
        trust: Run the code that the file may contain, as full unpickling does.
        lazily: Read tensors of torch's format when they are used, and not at all otherwise.

    Raises:
        CheckpointError: No such file, no checkpoint, a truncated one, or one that needs ``trust``.
    """
    path = fetch(location) if '://' in location else Path(location).expanduser()
    if path.is_dir():
        path = best_in(path)
    if not path.is_file():
        raise CheckpointError(f'{location}: there is no such file.')
    if path.suffix in OTHER_FILES:
        raise CheckpointError(
            f'{location}: {OTHER_FILES[path.suffix]}, not a checkpoint. Name the file with the weights.'
        )
    broken = f'not a checkpoint, or a truncated one ({path.stat().st_size} bytes); delete {path} and fetch it again.'
    try:
        content = _read_arrays(path, trust) if path.suffix == '.pkl' else _read_tensors(path, trust, lazily)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f'{location}: {_why_refused(str(error)) or broken}') from None
    except Exception as error:  # reading arbitrary bytes as a pickle or an archive can end in almost any
        raise CheckpointError(f'{location}: {broken}') from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f'{location}: holds a {type(content).__name__}, not a state dict.')
    return dict(content)


def best_in(folder: Path) -> Path:
    """The checkpoint to use of a training's folder: the best one by validation, else the last.

    Of several best ones, as of several trainings, it is the newest.

    Raises:
        CheckpointError: There is none.
    """
    found = [path for path in folder.glob('*.pth') if not path.name.startswith('.')]
    if not found:
        raise CheckpointError(f'{folder}: there is no checkpoint (*.pth) in this folder.')
    best = max(found, key=lambda path: (path.name.startswith('best_'), path.stat().st_mtime))
    print_log(f'Takes {best}', logger='current')
    return best


def _read_tensors(path: Path, trust: bool, lazily: bool) -> Any:
    if path.suffix == '.safetensors':
        from safetensors.torch import load_file  # comes with timm

        return load_file(path)
    if trust:
        return torch.load(path, map_location='cpu', mmap=lazily, weights_only=False)
    if Version(torch.__version__) < Version('2.6'):
        # `weights_only` cannot be told of further types there; it is the unpickler that must not go beyond them.
        return torch.load(path, map_location='cpu', mmap=lazily, pickle_module=RESTRICTED_PICKLE)
    with torch.serialization.safe_globals(PLAIN_CLASSES):
        return torch.load(path, map_location='cpu', mmap=lazily, weights_only=True)


class _RestrictedUnpickler(pickle.Unpickler):
    """Creates tensors, and the plain types that checkpoints hold; as ``weights_only`` does from torch 2.6 on."""

    def find_class(self, module: str, name: str) -> Any:
        full = f'{module}.{name}'.replace('__builtin__.', 'builtins.')  # its name in the protocol torch writes
        if full in RUNNER_TYPES:
            return RUNNER_TYPES[full]
        plain = {f'{kind.__module__}.{kind.__qualname__}' for kind in PLAIN_CLASSES}
        if full not in TENSOR_TYPES | plain and not re.fullmatch(r'torch\.\w*Storage', full):
            raise pickle.UnpicklingError(f'it needs {full}')
        return super().find_class(module, name)


def _restricted_load(file: Any, **kwargs: Any) -> Any:
    return _RestrictedUnpickler(file, **kwargs).load()


#: What ``torch.load`` expects of a ``pickle_module``.
RESTRICTED_PICKLE = SimpleNamespace(__name__='restricted', Unpickler=_RestrictedUnpickler, load=_restricted_load)


def _read_arrays(path: Path, trust: bool) -> Any:
    with path.open('rb') as file:
        content = (pickle.Unpickler if trust else _ArrayUnpickler)(file, encoding='latin1').load()
    if isinstance(content, Mapping) and isinstance(content.get('model'), Mapping):
        model = {
            name: torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
            for name, value in content['model'].items()
        }
        content = {**content, 'model': model}
    return content


class _ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays and plain containers only."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAY_CLASSES:
            raise pickle.UnpicklingError(f'it needs {module}.{name}')
        return super().find_class(module, name)


def _why_refused(message: str) -> str | None:
    """The reason in words; None if the file is broken instead."""
    needed = re.search(r'GLOBAL ([\w.]+)|it needs ([\w.]+)', message)
    if needed is None:
        return None
    return (
        f'refused, it wants to create {needed[1] or needed[2]} objects, which can run code. If you trust where it '
        'comes from, add --trust, or write a safe copy: `dino-mm convert --trust IN OUT`.'
    )


def fetch(address: str, folder: Path | None = None) -> Path:
    """Download a file once; later calls give the copy in ``folder``, torch's hub cache by default.

    The file appears under its name only when complete: of the announced length, and, where its name ends in
    ``-<first digits of its SHA-256>`` as torch's own do, of this hash. What an interrupted download left is continued.

    Raises:
        CheckpointError: The address cannot be read, or what came is not what was announced.
    """
    address = re.sub('^detectron2://', DETECTRON2_ZOO, address)
    scheme, _, name = address.partition('://')
    if scheme in TORCHVISION:
        addresses = get_torchvision_models()
        if name not in addresses:
            raise CheckpointError(f'{address}: torchvision has no weights of this name.')
        address = addresses[name]
    folder = folder or Path(torch.hub.get_dir()) / 'checkpoints'
    name = Path(urllib.parse.urlparse(address).path).name
    if not HASH_IN_NAME.search(name):  # then other addresses may end in the same name
        name = f'{hashlib.sha256(address.encode()).hexdigest()[:8]}_{name}'
    target = folder / name
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f'{target}.lock'):  # of the processes of a machine, one downloads
            if not target.exists():
                _download(address, target)
    return target


def _download(address: str, target: Path) -> None:
    partial = target.with_name(target.name + '.part')
    print_log(f'Downloads {address} to {target}', logger='current')
    try:
        expected = _receive(address, partial)
    except (urllib.error.URLError, OSError) as error:
        raise CheckpointError(
            f'{address}: download failed ({getattr(error, "reason", error)}). Run again to continue it, or download '
            'it otherwise and give the path in its place: as `load_from` of a config, or by the option for weights.'
        ) from None
    size = partial.stat().st_size
    if expected is not None and size != expected:
        raise CheckpointError(f'{address}: {size} of {expected} bytes came. Run again to continue the download.')
    digits = HASH_IN_NAME.search(target.name)
    if digits and not _sha256(partial).startswith(digits[1]):
        partial.unlink()
        raise CheckpointError(f'{address}: what came does not have the hash {digits[1]} of its name; it was deleted.')
    partial.replace(target)


def _receive(address: str, partial: Path) -> int | None:
    """Append to ``partial`` what it lacks; the full length in bytes where the server tells."""
    have = partial.stat().st_size if partial.exists() else 0
    headers = {'Range': f'bytes={have}-'} if have else {}
    try:
        response = urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing beyond what is there: complete, or another file by now
            raise
        total = re.fullmatch(r'bytes \*/(\d+)', error.headers.get('Content-Range', ''))
        if total is not None and int(total[1]) == have:
            return have
        partial.unlink()
        return _receive(address, partial)
    with response, partial.open('ab' if response.status == 206 else 'wb') as file:
        length = response.headers.get('Content-Length')
        start = have if response.status == 206 else 0
        total_bytes = None if length is None else start + int(length)
        with tqdm(total=total_bytes, initial=start, unit='B', unit_scale=True, desc=partial.stem) as bar:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    return total_bytes


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def register_formats() -> None:
    """Teach mmengine's loader detectron2's checkpoints: ``detectron2://`` addresses and ``.pkl`` files."""
    CheckpointLoader.register_scheme([r'detectron2://', r'[^:]*\.pkl$'], _loader(trust=False), force=True)


def register_safe_loaders(trust: bool = False) -> None:
    """Let mmengine open every file and address with :func:`open_checkpoint`, for the rest of this process."""
    prefixes = ['', 'http://', 'https://', r'detectron2://', *(f'{name}://' for name in TORCHVISION), r'[^:]*\.pkl$']
    CheckpointLoader.register_scheme(prefixes, _loader(trust), force=True)


def _loader(trust: bool) -> Callable:
    def load_from_file_or_address(filename: str, map_location: Any = None, **kwargs: Any) -> dict[str, Any]:
        """On the CPU whatever ``map_location`` says: models copy from there into their own tensors."""
        return open_checkpoint(filename, trust)

    return load_from_file_or_address


# The forks' mmengine opens a file that is more than data all the same, and so runs the code in it. It would in an
# inferencer, which none of our tools has prepared.
if found_set().names['mmengine'] == 'onedl-mmengine':
    register_safe_loaders()
