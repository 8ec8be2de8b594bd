"""Faults that strike a training at an iteration: a config names them, so that they strike tools as well."""

import os
import signal
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS
from mmengine.runner import Runner

import dino_mm
from dino_mm.engine.skip_not_finite_hook import SKIPPED
from dino_mm.models import DINO

#: On top of ``TINY``: tests of faults need layers of each kind, not many.
SMALLER = {'model.encoder.num_layers': 1, 'model.decoder.num_layers': 2, 'model.denoising.num_dn_queries': 6}
SMALLER['default_hooks.checkpoint.max_keep_ckpts'] = -1


@HOOKS.register_module()
class FaultHook(Hook):
    """Does ``kind`` in the process ``rank`` in the iterations ``at``, counted from 1.

    Kinds are the names of a signal, which the process sends itself, and those of the methods below.
    """

    priority = 'VERY_HIGH'

    def __init__(self, kind: str, at: list[int], rank: int = 0, in_validation: bool = False) -> None:
        self.kind, self.at, self.rank, self.in_validation = kind, at, rank, in_validation

    def strikes(self, runner: Runner, iteration: int) -> bool:
        return runner.rank == self.rank and iteration in self.at

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        if self.strikes(runner, runner.iter + 1) and not self.in_validation:
            model = next(module for module in runner.model.modules() if isinstance(module, DINO))
            self.strike(model, data_batch)

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        if self.strikes(runner, runner.iter) and self.in_validation:
            os.kill(os.getpid(), signal.Signals[self.kind])

    def strike(self, model: DINO, batch: dict) -> None:
        if self.kind.startswith('SIG'):
            os.kill(os.getpid(), signal.Signals[self.kind])
        else:
            getattr(self, self.kind)(model, batch)

    def exception(self, model: DINO, batch: dict) -> None:
        raise RuntimeError('this process has met its fault')

    def nan_gradient(self, model: DINO, batch: dict) -> None:
        once(model.level_embed.register_hook, lambda gradient: gradient * torch.nan)

    def infinite_gradient(self, model: DINO, batch: dict) -> None:
        """In one entry of one parameter."""
        gradient = torch.zeros_like(model.level_embed)
        gradient[0, 0] = torch.inf
        once(model.level_embed.register_hook, lambda _: gradient)

    def nan_picture(self, model: DINO, batch: dict) -> None:
        batch['inputs'] = [batch['inputs'][0].float() * torch.nan, *batch['inputs'][1:]]

    def infinite_logits(self, model: DINO, batch: dict) -> None:
        """Of a class that no object has, at one query of the last layer."""
        labels = torch.cat([sample.gt_instances.labels for sample in batch['data_samples']])
        absent = min(set(range(10)) - set(labels.tolist()))

        def change(module, args, output):
            output = output.clone()
            output[0, -1, absent] = -torch.inf
            return output

        once(model.bbox_head.cls_branches[1].register_forward_hook, change)

    def infinite_loss(self, model: DINO, batch: dict) -> None:
        """Whose gradients are finite."""
        once(model.bbox_head.criterion.loss_iou.register_forward_hook, lambda module, args, loss: loss + torch.inf)


@HOOKS.register_module()
class WriteDownHook(Hook):
    """Writes what each process has come to into ``folder``: checkpoints are those of the first one alone."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def after_train(self, runner: Runner) -> None:
        model = {name: tensor.clone() for name, tensor in runner.model.named_parameters()}
        optimizer = runner.optim_wrapper.optimizer
        content = dict(
            model=model,
            steps={int(state['step']) for state in optimizer.state.values()},
            scale=runner.optim_wrapper.loss_scaler.get_scale(),
            skipped=runner.message_hub.get_info(SKIPPED),
            unreadable=runner.train_dataloader.dataset.skipped.skipped,
        )
        torch.save(content, self.folder / f'{runner.rank}.pth')


@OPTIM_WRAPPERS.register_module()
class ScaledOptimWrapper(AmpOptimWrapper):
    """Scales losses as fp16 needs it, on a CPU, which computes in float32 all the same."""

    def __init__(self, **kwargs: object) -> None:
        OptimWrapper.__init__(self, **kwargs)
        self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=2.0**12)
        self._scale_update_param = None

    def optim_context(self, model: torch.nn.Module):
        return OptimWrapper.optim_context(self, model)


def once(register, function) -> None:
    """Register a hook of torch that goes after its first call."""

    def call(*args):
        handle.remove()
        return function(*args)

    handle = register(call)


def write_config(path: Path, data: Path, hooks: list[dict], **settings: object) -> Path:
    """The digits config with faults and a few settings, as a file; ``settings`` are assigned at its top level."""
    lines = [f'_base_ = {dino_mm.cfg("dino-demo/dino_digits.py")!r}', f'custom_hooks = {hooks!r}']
    lines += ["custom_imports = dict(imports=['dino_mm', 'faults'], allow_failed_imports=False)"]
    lines += [
        f'{split}_dataloader = dict(dataset=dict(data_root={f"{data}/"!r}))' for split in ('train', 'val', 'test')
    ]
    annotations = str(data / 'annotations' / 'val.json')
    lines += [f'{split}_evaluator = dict(ann_file={annotations!r})' for split in ('val', 'test')]
    lines += [f'{name} = {value!r}' for name, value in settings.items()]
    path.write_text('\n'.join(lines))
    return path


def tiny(config: Path, work_dir: Path, settings: dict) -> Config:
    """A config in memory, with the overrides that make it tiny."""
    from commands import TINY

    cfg = Config.fromfile(config)
    changes = TINY | SMALLER | {'model.neck.in_channels': [8, 16, 32]}
    if 'train_cfg.max_epochs' in settings:
        del changes['train_cfg.max_iters']
    cfg.merge_from_dict(changes | settings)
    cfg.work_dir, cfg.experiment_name, cfg.launcher = str(work_dir), str(work_dir), 'none'
    return cfg
