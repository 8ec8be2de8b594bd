"""The wheel carries configs and tools, and another project needs nothing but it and MMDetection."""

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import yaml
from commands import MMDET_TOOLS, ROOT, options, python, scalars

import dino_mm
from dino_mm.datasets.digits import make_digits
from dino_mm.shipped import config_root

PROJECT = Path(__file__).parent / 'downstream_project'


@pytest.fixture(scope='module')
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as built from a copy of the checkout."""
    source = tmp_path_factory.mktemp('source')
    listed = subprocess.run(
        ['git', 'ls-files', '--cached', '--others', '--exclude-standard'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(lambda n: (ROOT / n).is_file(), listed.stdout.splitlines()):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp('wheel')
    python('-m', 'build', '--wheel', '--no-isolation', '--outdir', out, source)
    return next(out.glob('*.whl'))


@pytest.fixture(scope='module')
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, to be put on PYTHONPATH."""
    target = tmp_path_factory.mktemp('site')
    python('-m', 'pip', 'install', '--no-deps', '--quiet', '--target', target, wheel)
    return target


def test_wheel_carries_configs_tools_and_index(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    mim = {n.removeprefix('dino_mm/.mim/') for n in names if n.startswith('dino_mm/.mim/')}
    configs = {str(p.relative_to(ROOT)) for p in (ROOT / 'configs').rglob('*.*') if '__pycache__' not in str(p)}
    tools = {str(p.relative_to(ROOT)) for p in (ROOT / 'tools').glob('*.*')}
    assert mim == configs | tools | {'model-index.yml'}
    assert wheel.name.startswith(f'mmdet_dino-{dino_mm.__version__}-')
    assert 'dino_mm/py.typed' in names


def test_tools_run_from_the_installed_package(installed: Path, tmp_path: Path) -> None:
    tools = installed / 'dino_mm' / '.mim' / 'tools'
    done = python(tools / 'train.py', '--help', cwd=tmp_path, PYTHONPATH=str(installed))
    assert '--auto-scale-lr' in done.stdout
    code = "import dino_mm; print(dino_mm.cfg('dino-resnet/dino_r50_4scale_12ep.py'))"
    found = python('-c', code, cwd=tmp_path, PYTHONPATH=str(installed)).stdout.strip()
    assert found == str(installed / 'dino_mm/.mim/configs/dino-resnet/dino_r50_4scale_12ep.py')


@pytest.mark.slow
def test_another_project_trains_and_tests_with_mmdets_own_tools(installed: Path, tmp_path: Path) -> None:
    project = tmp_path / 'project'
    shutil.copytree(PROJECT, project)
    make_digits(project / 'data', num_train=12, num_val=5)  # 0 and 2 in the last two
    assert len((project / 'detector.py').read_text().splitlines()) <= 11
    env = dict(cwd=project, PYTHONPATH=str(installed))
    quick = options(
        {
            'model.backbone.init_cfg': None,
            'model.encoder.num_layers': 1,
            'model.decoder.num_layers': 2,
            'train_cfg.max_iters': 2,
            'train_cfg.val_interval': 2,
            'default_hooks.checkpoint.interval': 2,
            'default_hooks.logger.interval': 1,
            'train_dataloader.num_workers': 0,
            'train_dataloader.persistent_workers': False,
        }
    )
    python(MMDET_TOOLS / 'train.py', 'detector.py', *quick, **env)
    logged = scalars(project / 'runs/detector')
    assert [line['step'] for line in logged if 'loss' in line] == [1, 2]
    assert 'd0.dn_loss_iou' in logged[0]
    checkpoint = project / 'runs/detector/iter_2.pth'
    done = python(MMDET_TOOLS / 'test.py', 'detector.py', checkpoint, '--tta', *quick, **env)
    assert 'coco/bbox_mAP:' in done.stdout
    done = python(MMDET_TOOLS / 'test.py', 'detector.py', checkpoint, '--work-dir', 'runs/test', *quick, **env)
    metrics = json.loads(max((project / 'runs/test').glob('*/*.json')).read_text())
    assert 0 <= metrics['coco/bbox_mAP'] <= 1
    used = python('-c', 'import dino_mm; print(dino_mm.__file__)', **env).stdout
    assert used.startswith(str(installed))


def test_editable_install_links_to_the_checkout() -> None:
    mim = ROOT / 'dino_mm' / '.mim'
    assert config_root() == ROOT / 'configs'
    assert {p.name: p.resolve() for p in mim.iterdir()} == {
        name: ROOT / name for name in ('configs', 'tools', 'model-index.yml')
    }


def test_unknown_shipped_config_names_close_ones() -> None:
    with pytest.raises(FileNotFoundError, match=r'dino-resnet/dino_r50_4scale_12ep\.py'):
        dino_mm.cfg('dino-resnet/dino_r50_4scale_12e.py')


def test_index_lists_existing_metafiles_and_configs() -> None:
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    metafiles = [ROOT / name for name in index['Import']]
    assert metafiles == sorted(ROOT.glob('configs/*/metafile.yml'))
    configs = [m['Config'] for path in metafiles for m in yaml.safe_load(path.read_text())['Models']]
    shipped = {str(path.relative_to(ROOT)) for path in ROOT.glob('configs/dino-*/*.py')}
    assert len(configs) == len(set(configs))
    assert set(configs) == shipped - {'configs/dino-demo/dino_digits.py'}


def test_versions_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    info = tmp_path / 'mmcv-2.2.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: mmcv\nVersion: 2.2.0\n')
    done = python('-c', 'import dino_mm', cwd=tmp_path, status=1, PYTHONPATH=f'{tmp_path}:{ROOT}')
    assert 'dino_mm needs mmcv >=2.0.0, <2.2.0, but mmcv 2.2.0 is installed' in done.stderr.splitlines()[-1]
