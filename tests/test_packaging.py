"""The wheel carries configs and tools, and another project needs nothing but it and MMDetection."""

import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from commands import MMDET_TOOLS, ROOT, TINY, options, python, run, scalars
from packaging.requirements import Requirement

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
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, to be put on PYTHONPATH; the one that this Python has, if it has one."""
    here = Path(dino_mm.__file__).parents[1]
    if here != ROOT:
        return here
    target = tmp_path_factory.mktemp('site')
    wheel = request.getfixturevalue('wheel')
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
    assert f'mmdet_dino-{dino_mm.__version__}.data/purelib/mmdet_dino.pth' in names  # pip puts it into site-packages


def test_extras_ask_for_one_kind_of_mmdetection(wheel: Path) -> None:
    metadata = zipfile.ZipFile(wheel).read(f'mmdet_dino-{dino_mm.__version__}.dist-info/METADATA').decode()
    required = [
        Requirement(line.split(': ', 1)[1]) for line in metadata.splitlines() if line.startswith('Requires-Dist')
    ]

    def names(extra: str) -> set[str]:
        environment = {'extra': extra, 'python_version': '3.13'}
        return {r.name for r in required if r.marker and r.marker.evaluate(environment)}

    mmdetection = {'mmcv-lite', 'mmdet', 'mmengine'}
    extras = ('cpu', 'gpu', 'demo', 'fast-eval', 'own-data', 'tiles', 'export', 'all')
    assert {r.name for r in required if not r.marker} == {'torch', 'packaging', 'pycocotools', 'scipy', 'timm'}
    assert names('cpu') == mmdetection
    assert names('gpu') == mmdetection | {'deformops'}
    assert names('all') == set.union(*map(names, extras[:-1]))
    assert not [r for r in required if r.name in ('numpy', 'opencv-python', 'mmcv')]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site directory as pip leaves it: our .pth file, a package whose stand-in says that it is installed."""
    shutil.copy(ROOT / 'mmdet_dino.pth', tmp_path)
    (tmp_path / 'dino_mm').mkdir()
    (tmp_path / 'dino_mm' / '__init__.py').write_text('raise RuntimeError("imported")')
    (tmp_path / 'dino_mm' / 'standin.py').write_text('def install():\n    print("installed")')
    return tmp_path


@pytest.mark.parametrize(
    ('removed', 'said'),
    [([], 'installed\n'), (['standin.py'], ''), (['__init__.py'], ''), (['standin.py', '__init__.py'], '')],
)
def test_start_of_python_installs_the_standin_if_it_is_there(site: Path, removed: list[str], said: str) -> None:
    for name in removed:
        (site / 'dino_mm' / name).unlink()
    # -S: without this environment's own packages, of which dino_mm is one
    done = python('-S', '-c', f'import site; site.addsitedir({str(site)!r})', cwd=site.parent, PYTHONPATH='')
    assert (done.stdout, done.stderr) == (said, '')


def test_standin_is_there_before_mmdet_is_imported(tmp_path: Path) -> None:
    code = "import sys, mmdet.evaluation; print('dino_mm' in sys.modules)"
    assert python('-c', code, cwd=tmp_path).stdout.splitlines()[-1] == 'False'
    code = 'import sys; print(*(getattr(f, "marker", "") for f in sys.meta_path))'
    assert python('-c', code, cwd=tmp_path).stdout.split() == ['dino_mm.names', 'dino_mm.standin']


def test_tools_run_from_the_installed_package(installed: Path, tmp_path: Path) -> None:
    tools = installed / 'dino_mm' / '.mim' / 'tools'
    done = python(tools / 'train.py', '--help', cwd=tmp_path, PYTHONPATH=str(installed))
    assert '--auto-scale-lr' in done.stdout
    code = "import dino_mm; print(dino_mm.cfg('dino-resnet/dino_r50_4scale_12ep.py'))"
    found = python('-c', code, cwd=tmp_path, PYTHONPATH=str(installed)).stdout.strip()
    assert found == str(installed / 'dino_mm/.mim/configs/dino-resnet/dino_r50_4scale_12ep.py')


def test_wheel_brings_the_command(installed: Path, tmp_path: Path) -> None:
    command = shutil.which('dino-mm', path=f'{installed / "bin"}:{Path(sys.executable).parent}')
    assert command is not None
    done = run(command, 'models', 'eva*', cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.stdout.splitlines()[1].split() == ['dino_eva_01_4scale_12ep', '-', 'no']


@pytest.fixture(scope='module')
def mim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The console script, of an environment in front of this one that the command of the API page has made."""
    (command,) = re.findall(r'^pip (install openmim .*)$', (ROOT / 'docs/api.md').read_text(), re.MULTILINE)
    folder = tmp_path_factory.mktemp('mim')
    python('-m', 'venv', folder)
    own = folder / 'bin' / 'python'
    done = subprocess.run([own, '-m', 'pip', '--quiet', *shlex.split(command)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f'openmim cannot be installed here: {done.stderr[-300:]}')
    site = run(own, '-c', "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    (Path(site) / 'behind.pth').write_text(f'import site; site.addsitedir({sysconfig.get_path("purelib")!r})\n')
    return folder / 'bin' / 'mim'


@pytest.mark.slow
def test_mim_finds_trains_and_tests_our_models(wheel: Path, mim: Path, tmp_path: Path) -> None:
    """By the name of the distribution, however it is written; it does not look for the module's."""
    site = tmp_path / 'site'
    python('-m', 'pip', 'install', '--no-deps', '--quiet', '--target', site, wheel)
    served = tmp_path / 'served'
    served.mkdir()
    (served / 'dino_r50_4scale_12ep_49_2AP.pth').write_text('weights')
    env = dict(cwd=tmp_path, PYTHONPATH=str(site), HOME=str(tmp_path), NO_PROXY='*')
    done = run(mim, 'search', 'mmdet-dino', '--config', 'dino_r50_4scale_12ep', **env)
    assert ['coco/box_ap', '49.2'] in [line.split() for line in done.stdout.splitlines()]
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(served))
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        metafile = site / 'dino_mm/.mim/configs/dino-resnet/metafile.yml'
        address = f'http://127.0.0.1:{server.server_port}/'
        metafile.write_text(re.sub(r'https://github\S+/(?=dino_r50_4scale_12ep_49)', address, metafile.read_text()))
        run(mim, 'download', 'mmdet_dino', '--config', 'dino_r50_4scale_12ep', '--dest', 'loaded', **env)
        server.shutdown()
    assert (tmp_path / 'loaded/dino_r50_4scale_12ep_49_2AP.pth').read_text() == 'weights'
    assert (tmp_path / 'loaded/dino_r50_4scale_12ep.py').is_file()
    make_digits(tmp_path / 'data/digits', num_train=4, num_val=2)
    quick = ('--gpus', '0', *options(TINY | {'train_cfg.max_iters': 2, 'train_cfg.val_interval': 2}))
    run(mim, 'train', 'mmdet-dino', 'dino_digits.py', '--work-dir', 'runs', *quick, **env)
    done = run(mim, 'test', 'mmdet_dino', 'dino_digits.py', '--checkpoint', 'runs/iter_2.pth', *quick, **env)
    assert 'coco/bbox_mAP:' in done.stdout + done.stderr
    done = run(mim, 'train', 'dino_mm', 'dino_digits.py', *quick, status=1, **env)
    assert "Can't determine a unique package given abbreviation dino_mm" in done.stderr
    done = run(mim, 'search', 'dino_mm', '--config', 'dino_r50_4scale_12ep', status=1, **env)
    assert 'dino_mm is not installed' in done.stderr


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
    """Before anything else; see test_compat.py for all that does not fit."""
    info = tmp_path / 'mmcv-1.7.2.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: mmcv\nVersion: 1.7.2\n')
    done = python('-c', 'import dino_mm', cwd=tmp_path, status=1, PYTHONPATH=f'{tmp_path}:{ROOT}')
    last = done.stderr.splitlines()[-1]
    assert 'dino_mm needs mmcv >=2.0.0, <3.0.0, but mmcv 1.7.2 is installed, which is too old: `pip uninstall' in last
