"""``dino-mm new``, and the page on own data: its commands run here, from pictures to a deployed model.

Where ``dino_mm`` is installed from a wheel, they are those of the wheel.
"""

import csv
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from commands import ROOT, python, run, scalars
from mmengine.config import Config
from PIL import Image

import dino_mm
from dino_mm import get_config
from dino_mm.registry import MODELS

sys.path.insert(0, str(ROOT / 'tests' / 'test_projects'))
from own_data import CLASSES, make_items, write_coco, write_yolo

#: The folder that this Python has ``dino_mm`` in: the checkout, or where a wheel was installed.
INSTALLED = Path(dino_mm.__file__).parents[1]
BCCD = ROOT.parent / 'shared' / 'data' / 'bccd'
#: Shrink R50 until it trains an iteration in a fraction of a second.
SMALL_BACKBONE = dict(depth=18, base_channels=4)
SMALL = dict(
    num_queries=60,
    num_feature_levels=3,
    embed_dims=16,
    neck=dict(in_channels=[8, 16, 32], out_channels=16, num_outs=3, norm_cfg=dict(num_groups=4)),
    encoder=dict(num_layers=1, num_heads=2, feedforward_channels=32),
    decoder=dict(num_layers=2, num_heads=2, feedforward_channels=32),
    denoising=dict(num_dn_queries=6),
)
NUM_ITERS = 60


def commands() -> Iterator[list[str]]:
    """The commands of the page, in order."""
    for block in re.findall(r'```bash\n(.*?)```', (ROOT / 'docs' / 'own_data.md').read_text(), re.DOTALL):
        yield from (shlex.split(line) for line in block.splitlines())


def coco_checkpoint(path: Path) -> Path:
    """A small detector of COCO's classes, in place of the zoo's."""
    config = get_config('dino_r50_4scale_12ep')
    config.merge_from_dict(dict(model=dict(**SMALL, backbone=dict(**SMALL_BACKBONE, init_cfg=None))))
    torch.save(dict(state_dict=MODELS.build(config.model).state_dict()), path)
    return path


def dino_mm_command(*arguments: str | Path, **more) -> str:
    """What ``dino-mm`` prints; it is the console script, where there is one."""
    script = Path(sys.executable).with_name('dino-mm')
    command = [script] if script.is_file() else [sys.executable, '-m', 'dino_mm']
    done = run(*command, *arguments, PYTHONPATH=str(INSTALLED), **more)
    return done.stdout + done.stderr


def test_new_tells_what_it_found_and_how_to_train(tmp_path: Path) -> None:
    write_coco(tmp_path / 'data', {'train': make_items(8), 'val': make_items(4)})
    said = dino_mm_command('new', 'project', '--data', 'data', '--gpus', '2', cwd=tmp_path)
    assert f'{tmp_path}/data/annotations/instances_train.json: 8 images' in said
    command = 'torchrun --nproc_per_node=2 -m dino_mm train project/config.py --launcher pytorch'
    assert said.endswith(f'written: project/config.py\ntrain it: {command}\n')
    for arguments, line in (
        (['project'], 'error: project: it exists and is not an empty folder. Name another one, or remove it.'),
        (
            ['x', '--model', 'dino_r50_4scale_21ep'],
            "error: dino_mm ships no config 'dino_r50_4scale_21ep'. Near to it: ",
        ),
    ):
        said = dino_mm_command('new', *arguments, '--data', 'data', cwd=tmp_path, status=1)
        assert said.splitlines()[-1].startswith(line)
        assert 'Traceback' not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ['data', 'project']


def drawn_pictures(root: Path) -> None:
    """In YOLO's format; of their three classes, COCO has one."""
    write_yolo(root, {'train': make_items(10), 'val': make_items(4, 20)})


def blood_cells(root: Path) -> None:
    """Real pictures, the first of BCCD, as COCO files."""
    for split, number in (('train', 10), ('val', 4)):
        content = json.loads((BCCD / 'annotations' / f'{split}.json').read_text())
        content['images'] = content['images'][:number]
        kept = {image['id'] for image in content['images']}
        content['annotations'] = [a for a in content['annotations'] if a['image_id'] in kept]
        (root / 'images' / split).mkdir(parents=True)
        (root / 'annotations').mkdir(exist_ok=True)
        (root / 'annotations' / f'{split}.json').write_text(json.dumps(content))
        for image in content['images']:
            shutil.copy(BCCD / 'images' / image['file_name'], root / 'images' / split)


class Detection(NamedTuple):
    """A detected object; the box is xyxy in pixels."""

    name: str
    score: float
    box: tuple[float, ...]


def assert_same(found: list[Detection], expected: list[Detection]) -> None:
    """Every detection has its counterpart, whatever the order of nearly equal scores."""
    assert len(found) == len(expected) > 0
    left = list(expected)
    for one in found:
        same = [
            other
            for other in left
            if other.name == one.name
            and other.score == pytest.approx(one.score, abs=2e-3)
            and other.box == pytest.approx(one.box, abs=0.5)
        ]
        assert same, (one, left)
        left.remove(min(same, key=lambda other: abs(other.score - one.score)))


class Page:
    """The commands of the page in a folder of their own, on data of one kind."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.project, self.said = folder, folder / 'my_project', list[tuple[str, str]]()

    def run(self, classes: tuple[str, ...]) -> None:
        """Every command as it stands, but for names, a small model, and thresholds, since it learns little."""
        names = dict(zip(CLASSES, classes, strict=True))
        more = {'predict': ['--score-thr', '0', '--save', 'csv'], 'python': ['--score-thr', '0']}
        for name, *arguments in commands():
            arguments = [names.get(argument, self._matching(argument)) for argument in arguments]
            if name == 'python':
                script = ROOT / arguments[0]
                done = python(script, *arguments[1:], *more[name], cwd=self.folder)
                self.said.append((script.name, done.stdout))
                continue
            assert name == 'dino-mm'
            if '--cfg-options' in arguments:
                arguments.append('image_size=64')
            said = dino_mm_command(*arguments, *more.get(arguments[0], []), cwd=self.folder)
            self.said.append((arguments[0], said))
            if arguments[:2] == ['new', 'my_project']:
                self._shrink()

    def _matching(self, argument: str) -> str:
        """The one file of a pattern, as a shell finds it."""
        return str(*self.folder.glob(argument)) if '*' in argument else argument

    def _shrink(self) -> None:
        """Change the config at its end, as one may."""
        start = coco_checkpoint(self.folder / 'coco.pth')
        config = self.project / 'config.py'
        config.write_text(f"""{config.read_text()}
model['backbone'].update({SMALL_BACKBONE})
model.update({SMALL})
image_size, epochs, max_iters, val_interval = 96, None, {NUM_ITERS}, {NUM_ITERS // 3}
optim_wrapper = dict(optimizer=dict(lr=0.01))
load_from = {str(start)!r}
randomness = dict(seed=0)
""")

    def check_training(self, classes: tuple[str, ...]) -> None:
        """The best checkpoint has the classes, and both trainings the length that was asked for."""
        work_dir = self.project / 'work_dir'
        assert [line['step'] for line in scalars(work_dir) if 'coco/bbox_mAP' in line] == [20, 40, 60]
        checkpoint = torch.load(next(work_dir.glob('best_*.pth')), weights_only=True)
        assert tuple(checkpoint['meta']['dataset_meta']['classes']) == classes
        assert len(checkpoint['state_dict']['bbox_head.cls_branches.0.bias']) == len(classes)
        assert checkpoint['ema_state_dict']['steps'] > 0
        attempt = Config.fromfile(self.folder / 'work_dirs/try/config.py')
        assert (attempt.max_iters, attempt.epochs, attempt.train_dataloader.batch_size) == (20, None, 4)
        tried = scalars(self.folder / 'work_dirs' / 'try')
        assert [line['step'] for line in tried if 'coco/bbox_mAP' in line] == [20]
        # The learning rate of 16 images, for 4, and a tenth of it for the backbone.
        path = self.folder / 'work_dirs/try/iter_20.pth'
        groups = torch.load(path, weights_only=True)['optimizer']['param_groups']
        assert {round(group['initial_lr'], 12) for group in groups} == {2.5e-3, 2.5e-4}

    def check_report(self, said: str) -> None:
        """It stands where it was asked for, with the figures of the test."""
        page = (self.project / 'report' / 'report.html').read_text()
        stated = {name: float(value) for name, value in re.findall(r'<small>([^<]+)</small><b>([\d.]+)</b>', page)}
        for title, name in (('AP', 'bbox_mAP'), ('AP50', 'bbox_mAP_50'), ('AP75', 'bbox_mAP_75')):
            assert stated[title] == float(re.findall(rf'coco/{name}: ([\d.]+)', said)[-1]), title
        (recall,) = re.findall(r'\(AR\) @\[ IoU=0.50:0.95 \| area= +all \| maxDets=100 \] = ([\d.]+)', said)
        assert stated['AR'] == float(recall) > 0

    def predicted(self, folder: str) -> dict[str, list[Detection]]:
        """Picture -> what the command found; every picture is drawn."""
        found: dict[str, list[Detection]] = {}
        with (self.folder / folder / 'predictions.csv').open(newline='') as file:
            for row in csv.DictReader(file):
                box = tuple(float(row[side]) for side in ('left', 'top', 'right', 'bottom'))
                found.setdefault(Path(row['file']).name, []).append(Detection(row['name'], float(row['score']), box))
        assert all((self.folder / folder / name).is_file() for name in found)
        return found

    def tested(self) -> dict[str, list[Detection]]:
        """Picture -> what the test has found."""
        config = Config.fromfile(self.project / 'config.py')
        content = json.loads(Path(config.test_evaluator.ann_file).read_text())
        pictures = {image['id']: Path(image['file_name']).name for image in content['images']}
        names = {row['id']: row['name'] for row in content['categories']}
        found: dict[str, list[Detection]] = {name: [] for name in pictures.values()}
        for row in json.loads((self.project / 'report' / 'predictions.bbox.json').read_text()):
            x, y, w, h = row['bbox']
            one = Detection(names[row['category_id']], row['score'], (x, y, x + w, y + h))
            found[pictures[row['image_id']]].append(one)
        return found


PICTURES = {
    'drawn': (drawn_pictures, CLASSES),
    'blood cells': (blood_cells, ('RBC', 'WBC', 'Platelets')),
}


@pytest.mark.slow
@pytest.mark.parametrize('kind', PICTURES)
def test_commands_of_the_page_lead_from_pictures_to_a_deployed_model(kind: str, tmp_path: Path) -> None:
    for package in ('supervision', 'onnx', 'onnxruntime'):
        pytest.importorskip(package)
    if kind == 'blood cells' and not BCCD.is_dir():
        pytest.skip('real data are not in every checkout')
    write, classes = PICTURES[kind]
    write(tmp_path / 'data')
    page = Page(tmp_path)
    shutil.copytree(tmp_path / 'data/images/val', tmp_path / 'pictures')
    first = min((tmp_path / 'pictures').iterdir())
    Image.open(first).save(tmp_path / 'picture.jpg', quality=95)
    page.run(classes)
    names = ['new', 'train', 'test', 'predict', 'predict', 'export', 'onnx_only.py', 'new', 'train']
    assert [name for name, _ in page.said] == names
    if kind == 'drawn':
        for name, source in (('crate', 'new'), ('barrel', 'new'), ('person', r'person \(row 0\)')):
            assert re.search(rf'^{name} +<- {source}$', page.said[1][1], re.MULTILINE)
        content = json.loads((tmp_path / 'two_classes/annotations/val.json').read_text())
        assert tuple(row['name'] for row in content['categories']) == classes
    assert Config.fromfile(tmp_path / 'two_classes/config.py').classes == (classes[2], classes[0])
    page.check_training(classes)
    page.check_report(page.said[2][1])
    tested, predicted = page.tested(), page.predicted('found')
    assert predicted.keys() == tested.keys()
    for name, found in predicted.items():
        assert_same(found, tested[name])
    (in_picture,) = page.predicted('work_dirs/predict').values()
    lines = [line.rsplit(maxsplit=5) for line in page.said[6][1].splitlines()]
    exported = [Detection(name, float(score), tuple(map(float, box))) for name, score, *box in lines]
    assert_same(exported, in_picture)
    assert Image.open(tmp_path / 'drawn.png').size == Image.open(tmp_path / 'picture.jpg').size
