"""Run command-line tools as users do, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mmdet

ROOT = Path(__file__).resolve().parents[1]
MMDET_TOOLS = Path(mmdet.__file__).parent / '.mim' / 'tools'

#: Overrides that shrink the digits config until it trains an iteration in a fraction of a second.
TINY = {
    'model.num_queries': 12,
    'model.embed_dims': 16,
    'model.backbone.base_channels': 4,
    'model.neck.in_channels': '[8,16,32]',
    'model.neck.out_channels': 16,
    'model.neck.norm_cfg.num_groups': 4,
    'model.encoder.num_heads': 2,
    'model.decoder.num_heads': 2,
    'model.encoder.feedforward_channels': 32,
    'model.decoder.feedforward_channels': 32,
    'train_dataloader.batch_size': 2,
    'train_cfg.max_iters': 4,
    'train_cfg.val_interval': 4,
    'default_hooks.checkpoint.interval': 2,
    'default_hooks.checkpoint.max_keep_ckpts': 5,
    'default_hooks.logger.interval': 1,
}


def options(settings: dict) -> list[str]:
    """``--cfg-options`` and its values."""
    return ['--cfg-options', *(f'{key}={value}' for key, value in settings.items())]


def data_options(root: Path) -> dict:
    """Settings that point a digits config to ``root``."""
    annotations = root / 'annotations' / 'val.json'
    loaders = {f'{split}_dataloader.dataset.data_root': f'{root}/' for split in ('train', 'val', 'test')}
    return loaders | {'val_evaluator.ann_file': annotations, 'test_evaluator.ann_file': annotations}


def run(*command: str | Path, cwd: Path = ROOT, status: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command and check its exit status; the output is part of the message."""
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, 'OMP_NUM_THREADS': '2', 'PYTHON': sys.executable, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, f'{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}'
    return done


def python(*command: str | Path, **more) -> subprocess.CompletedProcess[str]:
    """Run a Python script."""
    return run(sys.executable, *command, **more)


def scalars(work_dir: Path) -> list[dict]:
    """What the newest run in ``work_dir`` logged, line by line."""
    path = max(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in path.read_text().splitlines()]
