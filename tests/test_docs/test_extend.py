"""The examples of ``docs/extend.md``: each trains one step and detects, from the text of the page."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT
from conftest import make_samples
from mmdet.registry import DATASETS, HOOKS, TASK_UTILS
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image
from torch import Tensor

import dino_mm
from dino_mm.models import DINO
from dino_mm.models.structures import collate_targets
from dino_mm.registry import MODELS
from dino_mm.settings import apply_settings

#: Shrinks R50's recipe without touching what the examples exchange.
TINY = {
    'model.num_queries': 20,
    'model.backbone.init_cfg': None,
    'model.encoder.num_layers': 1,
    'model.decoder.num_layers': 1,
    'model.encoder.feedforward_channels': 32,
    'model.decoder.feedforward_channels': 32,
}
TINY_BACKBONE = {'model.backbone.depth': 18, 'model.backbone.base_channels': 8, 'model.neck.in_channels': [16, 32, 64]}
REGISTRIES = (MMDET_MODELS, TASK_UTILS, DATASETS, HOOKS)
FILE = re.compile(r'```python\n# (\w+\.py)\n(.*?)```', re.DOTALL)


def sections() -> dict[str, dict[str, str]]:
    """Heading of each section with examples -> their file names and texts."""
    parts = re.split(r'^## (.+)$', (ROOT / 'docs/extend.md').read_text(), flags=re.MULTILINE)
    found = {heading: dict(FILE.findall(text)) for heading, text in zip(parts[1::2], parts[2::2], strict=True)}
    return {heading: files for heading, files in found.items() if files}


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Config]]:
    """Writes the files of a section into a folder, and loads its config made small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def load(heading: str) -> Config:
        for name, text in sections()[heading].items():
            (tmp_path / name).write_text(text)
        config = Config.fromfile(tmp_path / 'own.py')
        config.merge_from_dict(TINY if heading == 'Backbone' else TINY | TINY_BACKBONE)
        return config

    yield load
    files = {name: getattr(sys.modules[name], '__file__', None) or '' for name in set(sys.modules) - before}
    written = {name for name, file in files.items() if file.startswith(str(tmp_path))}
    for registry in REGISTRIES:
        for key in [key for key, cls in registry._module_dict.items() if cls.__module__ in written]:
            del registry._module_dict[key]
    for name in written:
        del sys.modules[name]


def train_and_detect(config: Config, num_classes: int) -> tuple[DINO, dict[str, Tensor]]:
    """One training step of the model, every trainable parameter of which learns, and a detection."""
    model = MODELS.build(config.model)
    model.init_weights()
    for branch in model.bbox_head.reg_branches:  # their last layer starts at 0, which stops gradients
        torch.nn.init.normal_(branch[-1].weight, std=0.1)
    inputs, samples = make_samples([3, 2], sizes=[(96, 96)] * 2)
    for sample in samples:
        sample.gt_instances.labels %= num_classes
    losses = model.train()(inputs, samples, 'loss')
    total, _ = model.parse_losses(losses)
    assert torch.isfinite(total)
    total.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()] == []
    torch.optim.AdamW(trained.values(), lr=1e-4).step()
    with torch.no_grad():
        detections = model.eval()(inputs, samples, 'predict')[0].pred_instances
    assert len(detections.scores) > 0
    assert detections.bboxes.isfinite().all()
    return model, losses


def test_the_page_has_an_example_for_each_seam() -> None:
    assert list(sections()) == [
        *('Backbone', 'Neck', 'Query selector', 'Denoising generator', 'Loss', 'Matcher', 'Data set format', 'Hook')
    ]
    for heading, files in sections().items():
        assert len(files) == 2, heading
        assert max(len(text.splitlines()) for text in files.values()) <= 40, heading


def test_backbone(load: Callable[[str], Config]) -> None:
    model, _ = train_and_detect(load('Backbone'), 80)
    maps = model.backbone(torch.zeros(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 8, 12), (64, 4, 6), (128, 2, 3)]
    config = dino_mm.get_config('dino_r50_4scale_12ep')
    assert config.optim_wrapper.paramwise_cfg.custom_keys.backbone.lr_mult == 0.1


def test_neck(load: Callable[[str], Config]) -> None:
    model, _ = train_and_detect(load('Neck'), 80)
    assert type(model.neck).__name__ == 'TopDownNeck'
    maps = tuple(torch.randn(1, c, s, s) for c, s in ((16, 8), (32, 4), (64, 2)))
    plain, added = super(type(model.neck), model.neck).forward(maps), model.neck(maps)
    assert torch.equal(added[3], plain[3])
    torch.testing.assert_close(added[2], plain[2] + plain[3])
    torch.testing.assert_close(added[1][..., 2:, 2:], plain[1][..., 2:, 2:] + added[2][..., -1:, -1:])


def test_query_selector(load: Callable[[str], Config]) -> None:
    model, _ = train_and_detect(load('Query selector'), 80)
    selector, boxes = model.query_selector, torch.rand(2, 20, 4)
    added = selector.content(boxes) - selector.query_embedding.weight
    torch.testing.assert_close(added, selector.size_fc(boxes[..., 2:]))


def test_denoising_generator(load: Callable[[str], Config]) -> None:
    model, losses = train_and_detect(load('Denoising generator'), 80)
    assert losses['dn_loss_bbox'] > 0
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.1]).expand(4, 500, 2, 3, 4)
    _, noised = model.denoising.add_noise(torch.zeros(4, 500, 2, 3, dtype=torch.long), boxes)
    shift = (noised - boxes)[..., :2] / boxes[..., 2:]
    torch.testing.assert_close(shift.std((0, 1, 3)), torch.tensor([[0.05] * 2, [0.2] * 2]), rtol=0.1, atol=0)


def test_loss(load: Callable[[str], Config]) -> None:
    model, _ = train_and_detect(load('Loss'), 3)
    loss, logits, labels = model.bbox_head.criterion.loss_cls, torch.randn(4, 3), torch.arange(4)
    plain = dino_mm.FocalLoss()(logits, labels, 'none')
    assert torch.equal(loss(logits, labels, 'none'), plain * torch.tensor([1.0, 1.0, 4.0, 1.0]))
    assert torch.equal(loss(logits, labels, 'sum'), loss(logits, labels, 'none').sum())


def test_matcher(load: Callable[[str], Config]) -> None:
    config = load('Matcher')
    model, _ = train_and_detect(config, 80)
    assert model.bbox_head.criterion.matcher.cost_outside == 10.0
    _, samples = make_samples([1])
    targets = collate_targets(samples, 5)
    boxes = targets.boxes.expand(1, 1, 2, 4).clone()
    boxes[..., 1, 0] += boxes[..., 1, 2] * 0.51  # to the right of the object's edge
    scores = [torch.zeros(1, 1, 2, 5)]
    costs = [TASK_UTILS.build(c).cost(scores, boxes, targets) for c in (
        config.model.train_cfg.assigner, dict(type='dino_mm.HungarianMatcher'))]  # fmt: skip
    torch.testing.assert_close(costs[0] - costs[1], torch.tensor([[[[0.0, 10.0]]]]))


def run(config: Config, work_dir: Path, **options: object) -> Runner:
    """Train a config for some iterations on a CPU, and validate it."""
    config.merge_from_dict({
        'max_iters': 2,
        'val_interval': 2,
        'batch_size': 2,
        'image_size': 64,
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'val_dataloader.num_workers': 0,
        'val_dataloader.persistent_workers': False,
        **options,
    })  # fmt: skip
    apply_settings(config)
    config.work_dir, config.env_cfg.dist_cfg.backend = str(work_dir), 'gloo'
    runner = Runner.from_cfg(config)
    runner.train()
    return runner


def write_csv(root: Path) -> None:
    """Three pictures of the two classes in each of two files."""
    (root / 'data/images').mkdir(parents=True)
    for split in ('train', 'val'):
        lines = ['file,class,left,top,right,bottom']
        for i in range(3):
            noise = np.random.default_rng(i).integers(0, 255, (60, 80, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / f'data/images/{split}{i}.png')
            lines += [f'{split}{i}.png,cat,5,5,30,40', f'{split}{i}.png,dog,40,10,70,50.5']
        (root / f'data/{split}.csv').write_text('\n'.join(lines) + '\n')


def test_data_set_format(load: Callable[[str], Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Config, 'pretty_text', '')  # takes seconds, and only the log has it
    config = load('Data set format')
    write_csv(tmp_path)
    runner = run(config, tmp_path / 'work')
    info = runner.train_dataloader.dataset.get_data_info(1)
    assert (info['height'], info['width'], info['img_path']) == (60, 80, 'data/images/train1.png')
    assert [i['bbox'] for i in info['instances']] == [[5, 5, 30, 40], [40, 10, 70, 50.5]]
    assert [i['bbox_label'] for i in info['instances']] == [0, 1]
    assert 0 <= runner.message_hub.get_scalar('val/coco/bbox_mAP').current() <= 1
    (metric,) = runner.val_evaluator.metrics
    assert metric._coco_api.dataset['annotations'][1]['bbox'] == [40, 10, 30, 40.5]


def test_hook(load: Callable[[str], Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Config, 'pretty_text', '')
    config, sample = load('Hook'), load('Data set format')
    write_csv(tmp_path)
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader', 'val_evaluator', 'test_evaluator'):
        config[key] = sample[key]
    config.model.bbox_head.num_classes = 2
    runner = run(config, tmp_path / 'work', max_iters=3, val_interval=3)
    assert runner.model.denoising.box_noise_scale == pytest.approx(2 / 1000)
    (hook,) = [hook for hook in runner.hooks if type(hook).__name__ == 'GrowingNoiseHook']
    runner.train_loop._iter = 5000
    hook.before_train_iter(runner, 0)
    assert runner.model.denoising.box_noise_scale == 1.0
