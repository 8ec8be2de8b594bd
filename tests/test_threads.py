"""OpenMP's threads wait busily for a bounded time, unless the user has a say in it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dino_mm.threads import SPINS

TOOLS = Path(__file__).parents[1] / 'tools'
#: Whatever imports torch.
LIBRARIES = {'torch', 'torchvision', 'mmcv', 'mmdet', 'mmengine', 'timm', 'dino_mm'}


def spin_count(code: str, **environment: str) -> str:
    """What the variable says after ``code`` in a new process."""
    env = {name: value for name, value in os.environ.items() if name not in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')}
    code += "; import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    run = subprocess.run(
        [sys.executable, '-c', code], env=env | environment, capture_output=True, text=True, check=True
    )
    return run.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ('code', 'environment', 'expected'),
    [
        ('import dino_mm, torch', {}, SPINS),
        ('import dino_mm, torch', {'GOMP_SPINCOUNT': '7'}, '7'),
        ('import dino_mm, torch', {'OMP_WAIT_POLICY': 'active'}, 'None'),
        ('import torch, dino_mm', {}, 'None'),
    ],
)
def test_spinning_is_bounded_unless_the_user_chose_or_torch_has_read_it(code, environment, expected):
    assert spin_count(code, **environment) == expected


@pytest.mark.parametrize('tool', sorted(TOOLS.glob('*.py')), ids=lambda path: path.name)
def test_tools_import_dino_mm_before_what_imports_torch(tool):
    imports = []
    for node in ast.parse(tool.read_text()).body:
        if isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports.append(node.module)
    packages = [name.split('.')[0] for name in imports]
    first = next((name for name in packages if name in LIBRARIES), 'dino_mm')
    assert first == ('torch' if tool.name == 'mmcv_wheel.py' else 'dino_mm')  # for that one dino_mm is not there yet
