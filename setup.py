"""Package definition of mmdet-dino (import name: dino_mm).

The repository keeps ``configs/``, ``tools/`` and ``model-index.yml`` at its top level. MIM, and other projects that
inherit our configs, look for them in ``dino_mm/.mim/``: a wheel carries copies there, an editable install links.

``mmdet_dino.pth`` makes each start of Python stand in for the operators that mmcv-lite lacks, and teaches mmengine our
names, so that MMDetection's own tools run.
"""

import os
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIM_PATHS = ('configs', 'tools', 'model-index.yml')
# MMDetection stands in extras, and dino_mm checks it when imported: pip cannot express "these, or mmcv with compiled
# operators, or the forks, which have the same import names under other names of distributions".
MMDETECTION = ['mmcv-lite>=2.0,<2.2', 'mmdet>=3.3,<4', 'mmengine>=0.10.4,<1']
EXTRAS = {
    'cpu': MMDETECTION,
    'gpu': [*MMDETECTION, 'deformops>=3; python_version >= "3.12" and python_version < "3.14"'],
    'demo': ['matplotlib', 'scikit-learn'],
    'fast-eval': ['faster-coco-eval'],
    'own-data': ['supervision>=0.31'],
    'tiles': ['sahi>=0.12.8'],
    'export': ['onnx', 'onnxruntime', 'onnxscript'],
}


class BuildWithMim(build_py):
    """``build_py`` that adds ``dino_mm/.mim``."""

    def run(self) -> None:
        """Build as ever, then link or copy."""
        super().run()
        if self.editable_mode:
            link_mim(ROOT / 'dino_mm' / '.mim')
            self.run_command('install_data')  # setuptools leaves it out of editable wheels
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
    entry_points={'console_scripts': ['dino-mm=dino_mm.cli:main']},
    # Beside a wheel's data lies its `purelib`, which goes into site-packages, where alone Python reads such files.
    data_files=[('../purelib', ['mmdet_dino.pth'])],
    install_requires=['torch>=2.1', 'packaging', 'pycocotools', 'scipy', 'timm>=1.0.16'],
    extras_require=EXTRAS | {'all': sorted({name for names in EXTRAS.values() for name in names})},
    cmdclass={'build_py': BuildWithMim},
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
    ],
)
