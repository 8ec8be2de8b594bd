"""Opening checkpoint files: safely, in one line if something is wrong, and whole downloads only."""

import argparse
import hashlib
import http.server
import os
import pickle
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from torch import nn

from dino_mm.checkpoints import files
from dino_mm.checkpoints.errors import CheckpointError
from dino_mm.checkpoints.files import fetch, open_checkpoint, register_safe_loaders

TENSORS = {'a.weight': torch.arange(6.0).view(2, 3), 'b': torch.tensor(5)}


class Marker:
    """What a checkpoint may not create by itself: an object of a class of its own."""

    created = 0

    def __setstate__(self, state: dict) -> None:
        Marker.created += 1


def save(path: Path, content: object) -> str:
    torch.save(content, path)
    return str(path)


def test_tensors_and_plain_values(tmp_path: Path) -> None:
    args = argparse.Namespace(lr=1e-4, names=['a'])
    content = open_checkpoint(save(tmp_path / 'official.pth', dict(model=TENSORS, epoch=11, args=args)))
    assert content['epoch'] == 11
    assert content['args'] == args
    assert all(torch.equal(content['model'][name], tensor) for name, tensor in TENSORS.items())


def test_namespace_is_allowed_only_while_a_checkpoint_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / 'official.pth', dict(model=TENSORS, args=argparse.Namespace()))
    open_checkpoint(path)
    with pytest.raises(pickle.UnpicklingError, match='Namespace'):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize('old_format', [False, True])
def test_restricted_unpickler_of_older_torch(tmp_path: Path, old_format: bool) -> None:
    """Reads what `weights_only` reads here, and refuses the rest, without creating any of it."""

    def read(content: object) -> dict:
        torch.save(content, tmp_path / 'x.pth', _use_new_zipfile_serialization=not old_format)
        return torch.load(tmp_path / 'x.pth', weights_only=False, pickle_module=files.RESTRICTED_PICKLE)

    history = HistoryBuffer([1.0, 2.0], [1, 1])
    weights = OrderedDict(TENSORS, p=nn.Parameter(torch.ones(2)), h=torch.ones(2).half(), e=torch.zeros(0).bool())
    content = read(dict(model=weights, args=argparse.Namespace(lr=1), log=dict(loss=history), size=torch.Size([1])))
    assert content['model'].keys() == weights.keys()
    assert all(torch.equal(content['model'][name], tensor) for name, tensor in weights.items())
    assert content['args'].lr == 1
    assert content['log']['loss'].mean() == 1.5
    plain = dict(milestones=Counter([3, 3, 5]), kept={1, 2}, phase=1j)
    assert read(plain) == plain
    Marker.created = 0
    marker = Marker()
    marker.value = 1
    for refused in (marker, os.system, eval, Path('x')):
        with pytest.raises(pickle.UnpicklingError, match='it needs '):
            read(dict(extra=refused))
    assert Marker.created == 0


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip('safetensors.torch')
    safetensors.save_file(TENSORS, tmp_path / 'model.safetensors')
    content = open_checkpoint(str(tmp_path / 'model.safetensors'))
    assert content.keys() == TENSORS.keys()
    assert torch.equal(content['a.weight'], TENSORS['a.weight'])


def test_code_is_refused_unless_trusted(tmp_path: Path) -> None:
    marker = Marker()
    marker.value = 1
    path = save(tmp_path / 'extra.pth', dict(model=TENSORS, extra=marker))
    Marker.created = 0
    with pytest.raises(
        CheckpointError, match=r'extra.pth: refused, it wants to create \S*Marker .* add --trust'
    ) as error:
        open_checkpoint(path)
    assert '\n' not in str(error.value)
    assert Marker.created == 0
    assert isinstance(open_checkpoint(path, trust=True)['extra'], Marker)
    assert Marker.created == 1


@pytest.mark.parametrize('suffix', ['pth', 'pkl', 'safetensors'])
@pytest.mark.parametrize(
    'content',
    [b'', b'<html>404</html>', b'\x80\x04', b'\x9a\xedw\x19' * 16, b'PK\x03\x04' + bytes(50)],
    ids=['empty', 'page', 'pickle', 'noise', 'zip'],
)
def test_no_checkpoint(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f'x.{suffix}'
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(str(path))
    assert re.fullmatch(rf'{path}: not a checkpoint, or a truncated one \({len(content)} bytes\); .*', str(error.value))


@pytest.mark.parametrize('kept', [10, 200, 0.5, 0.99])
def test_truncated(tmp_path: Path, kept: float) -> None:
    path = Path(save(tmp_path / 'x.pth', dict(model={'w': torch.randn(64, 64)})))
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if kept > 1 else int(len(whole) * kept)])
    with pytest.raises(CheckpointError, match='truncated') as error:
        open_checkpoint(str(path))
    assert '\n' not in str(error.value)


def test_the_best_checkpoint_of_a_folder(tmp_path: Path) -> None:
    """Without a best one the last; of several the newest; what is being written is none."""
    with pytest.raises(CheckpointError, match=f'^{tmp_path}: there is no checkpoint'):
        open_checkpoint(str(tmp_path))
    for seconds, name in enumerate(('iter_9.pth', 'iter_20.pth', 'best_ap_9.pth', 'best_ap_5.pth', '.iter_30.pth')):
        os.utime(save(tmp_path / name, dict(state_dict=TENSORS, name=name)), (seconds, seconds))
        expected = 'best_ap_5.pth' if name == '.iter_30.pth' else name
        assert open_checkpoint(str(tmp_path))['name'] == expected
    os.utime(tmp_path / 'iter_9.pth', (99, 99))
    assert open_checkpoint(str(tmp_path))['name'] == 'best_ap_5.pth'
    register_safe_loaders()
    assert CheckpointLoader.load_checkpoint(str(tmp_path))['name'] == 'best_ap_5.pth'


def test_other_content(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='holds a list, not a state dict'):
        open_checkpoint(save(tmp_path / 'x.pth', [torch.zeros(1)]))
    with pytest.raises(CheckpointError, match='there is no such file'):
        open_checkpoint(str(tmp_path / 'none.pth'))


def write_arrays(path: Path, **extra: object) -> str:
    arrays = {'stem.conv1.weight': np.arange(4, dtype=np.float32), 'stem.fc.bias': np.float64([1, 2])}
    path.write_bytes(pickle.dumps(dict(model=arrays, __author__='torchvision', matching_heuristics=True, **extra)))
    return str(path)


def test_arrays_of_detectron2(tmp_path: Path) -> None:
    content = open_checkpoint(write_arrays(tmp_path / 'R-50.pkl'))
    assert content['__author__'] == 'torchvision'
    assert content['model']['stem.conv1.weight'].tolist() == [0, 1, 2, 3]
    assert content['model']['stem.fc.bias'].dtype == torch.float64
    with pytest.raises(CheckpointError, match=r'wants to create .*Marker'):
        open_checkpoint(write_arrays(tmp_path / 'bad.pkl', extra=Marker))


def test_mmengine_reads_arrays(tmp_path: Path) -> None:
    path = write_arrays(tmp_path / 'R-50.pkl')
    assert CheckpointLoader.load_checkpoint(path)['model']['stem.fc.bias'].tolist() == [1, 2]


def test_safe_loaders_are_mmengines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    path = tmp_path / 'x.pth'
    path.write_bytes(b'nothing')
    files.register_safe_loaders()
    with pytest.raises(CheckpointError, match='not a checkpoint'):
        CheckpointLoader.load_checkpoint(str(path))
    marked = save(tmp_path / 'y.pth', dict(model=TENSORS, extra=Marker()))
    with pytest.raises(CheckpointError, match='--trust'):
        CheckpointLoader.load_checkpoint(marked)
    files.register_safe_loaders(trust=True)
    assert isinstance(CheckpointLoader.load_checkpoint(marked)['extra'], Marker)


def test_mmengine_loads_an_address(server: 'type[Handler]', tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    server.content = Path(save(tmp_path / 'x.pth', dict(model=TENSORS))).read_bytes()
    files.register_safe_loaders()
    for _ in range(2):
        content = CheckpointLoader.load_checkpoint(f'{server.address}/released.pth')
        assert torch.equal(content['model']['a.weight'], TENSORS['a.weight'])
    assert len(server.ranges) == 1
    assert len(visible(tmp_path / 'hub' / 'checkpoints')) == 1


def test_torchvisions_weights_are_fetched_like_others(
    server: 'type[Handler]', tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    addresses = {name: f'{server.address}/{name}.pth' for name in ('resnet50', 'missing')}
    monkeypatch.setattr(files, 'get_torchvision_models', lambda: addresses)
    server.content = Path(save(tmp_path / 'x.pth', TENSORS)).read_bytes()
    files.register_safe_loaders()
    for scheme in ('torchvision', 'modelzoo'):
        content = CheckpointLoader.load_checkpoint(f'{scheme}://resnet50')
        assert torch.equal(content['a.weight'], TENSORS['a.weight'])
    assert len(server.ranges) == 1
    with pytest.raises(CheckpointError, match=r'missing\.pth: download failed'):
        CheckpointLoader.load_checkpoint('torchvision://missing')
    with pytest.raises(CheckpointError, match=r'^torchvision://resnet51: torchvision has no weights of this name'):
        CheckpointLoader.load_checkpoint('torchvision://resnet51')


@pytest.mark.parametrize(('name', 'kind'), [('m.onnx', 'an exported model'), ('c.py', 'a config')])
def test_other_files_are_named(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b'x')
    with pytest.raises(CheckpointError, match=f'{name}: {kind}, not a checkpoint'):
        open_checkpoint(str(tmp_path / name))


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves one file, with ranges, in the ways that a test asks for."""

    content = b''
    announced: int | None = None
    ranges: list[str | None]

    def do_GET(self) -> None:
        wanted = self.headers.get('Range')
        self.ranges.append(wanted)
        if 'missing' in self.path:
            self.send_error(404)
            return
        start = int(wanted.split('=')[1].rstrip('-')) if wanted else 0
        if start and start >= len(self.content):
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(self.content)}')
            self.end_headers()
            return
        self.send_response(206 if wanted else 200)
        self.send_header('Content-Length', str((self.announced or len(self.content)) - start))
        self.end_headers()
        self.wfile.write(self.content[start:])

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[type[Handler]]:
    handler = type('OwnHandler', (Handler,), dict(ranges=[], content=os.urandom(3 << 20)))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as httpd:
        handler.address = f'http://127.0.0.1:{httpd.server_port}'
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield handler
        httpd.shutdown()


def visible(folder: Path) -> list[str]:
    """Names in a cache, but for locks and parts."""
    return [path.name for path in folder.iterdir() if path.suffix not in ('.lock', '.part')]


def test_download_once(server: type[Handler], tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    path = fetch(f'{server.address}/dir/model.pth', tmp_path)
    assert path.read_bytes() == server.content
    assert re.fullmatch(r'[0-9a-f]{8}_model\.pth', path.name)
    assert '3.15M/3.15M' in capfd.readouterr().err  # the progress bar
    assert fetch(f'{server.address}/dir/model.pth', tmp_path) == path
    assert server.ranges == [None]
    assert fetch(f'{server.address}/other/model.pth', tmp_path) != path


def test_interrupted_download_continues(server: type[Handler], tmp_path: Path) -> None:
    whole, server.announced = server.content, len(server.content)
    server.content = whole[:1000]
    with pytest.raises(CheckpointError, match=r'1000 of 3145728 bytes came. Run again to continue'):
        fetch(f'{server.address}/model.pth', tmp_path)
    assert visible(tmp_path) == []
    server.content = whole
    assert fetch(f'{server.address}/model.pth', tmp_path).read_bytes() == whole
    assert server.ranges == [None, 'bytes=1000-']
    assert not list(tmp_path.glob('*.part'))


def test_a_complete_part_is_taken_and_an_overlong_one_restarted(server: type[Handler], tmp_path: Path) -> None:
    path = fetch(f'{server.address}/model.pth', tmp_path)
    part = path.with_name(path.name + '.part')
    for content in (server.content, server.content + b'more'):
        path.unlink()
        part.write_bytes(content)
        assert fetch(f'{server.address}/model.pth', tmp_path).read_bytes() == server.content


def test_hash_in_the_name(server: type[Handler], tmp_path: Path) -> None:
    digits = hashlib.sha256(server.content).hexdigest()[:8]
    assert fetch(f'{server.address}/resnet50-{digits}.pth', tmp_path).name == f'resnet50-{digits}.pth'
    with pytest.raises(CheckpointError, match='does not have the hash 01234567 of its name; it was deleted'):
        fetch(f'{server.address}/resnet50-01234567.pth', tmp_path)
    assert visible(tmp_path) == [f'resnet50-{digits}.pth']
    assert not list(tmp_path.glob('*.part'))


def test_failed_download(server: type[Handler], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r'missing.pth: download failed \(Not Found\)'):
        fetch(f'{server.address}/missing.pth', tmp_path)
    with pytest.raises(CheckpointError, match='download failed'):
        fetch('http://127.0.0.1:9/model.pth', tmp_path)
    assert visible(tmp_path) == []


def test_detectron2_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def receive(address: str, target: Path) -> None:
        asked.append(address)
        write_arrays(target)

    monkeypatch.setattr(files, '_download', receive)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    content = CheckpointLoader.load_checkpoint('detectron2://ImageNetPretrained/torchvision/R-50.pkl')
    assert content['model']['stem.fc.bias'].tolist() == [1, 2]
    assert asked == ['https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/torchvision/R-50.pkl']
