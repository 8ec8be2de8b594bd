"""Package definition of mmdet-dino (import name: dino_mm).

The repository keeps ``configs/``, ``tools/`` and ``model-index.yml`` at its top level. MIM, and other projects that
inherit our configs, look for them in ``dino_mm/.mim/``: a wheel carries copies there, an editable install links.
"""

import os
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIM_PATHS = ('configs', 'tools', 'model-index.yml')


class BuildWithMim(build_py):
    """``build_py`` that adds ``dino_mm/.mim``."""

    def run(self) -> None:
        """Build as ever, then link or copy."""
        super().run()
        if self.editable_mode:
            link_mim(ROOT / 'dino_mm' / '.mim')
        else:
            copy_mim(Path(self.build_lib) / 'dino_mm' / '.mim')


def link_mim(target: Path) -> None:
    """Make ``target`` a directory of relative links to the repository's own files."""
    target.mkdir(exist_ok=True)
    for name in MIM_PATHS:
        link = target / name
        if link.is_symlink():
            link.unlink()
        link.symlink_to(os.path.relpath(ROOT / name, target))


def copy_mim(target: Path) -> None:
    """Make ``target`` a directory of copies, as a wheel needs it; what an earlier build left there goes."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in MIM_PATHS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns('__pycache__', '*.pyc'))
        else:
            shutil.copy2(source, target / name)


def read_version() -> str:
    """The version, stated once in ``dino_mm/version.py``."""
    scope: dict[str, str] = {}
    exec((ROOT / 'dino_mm' / 'version.py').read_text(), scope)
    return scope['__version__']


setup(
    # mmengine looks up a package's path by its distribution name and stumbles where that equals the module's name.
    name='mmdet-dino',
    version=read_version(),
    description='DINO for MMDetection 3.x as registered modules and configs, numerically equal to detrex',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=('dino_mm', 'dino_mm.*')),
    package_data={'dino_mm': ['py.typed']},
    # mmcv is checked when dino_mm is imported, not listed: pip would try to compile its source in isolation and fail.
    install_requires=[
        'torch>=2.1',
        'mmengine>=0.10.4,<1.0',
        'mmdet>=3.3,<4.0',
        'pycocotools',
        'scipy',
        'timm>=1.0.16',
    ],
    extras_require={'fast-eval': ['faster-coco-eval'], 'demo': ['scikit-learn', 'matplotlib']},
    cmdclass={'build_py': BuildWithMim},
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
    ],
)
