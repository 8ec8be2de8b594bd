"""Train a detector: ``dino-mm train CONFIG``."""

import argparse
from pathlib import Path

import dino_mm  # noqa: F401  (first, for it says what does not fit)

# isort: split
from mmengine.config import Config, ConfigDict

from dino_mm.engine.launch import (
    add_common_arguments,
    add_compile_hook,
    build_runner,
    ends_cleanly,
    load_config,
    only_run,
)
from dino_mm.engine.resume import AUTO


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser)
    parser.add_argument('--amp', action='store_true', help='train with automatic mixed precision')
    parser.add_argument('--compile', action='store_true', help='compile backbone, encoder and decoder part by part')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate with the batch size')
    parser.add_argument(
        '--resume',
        nargs='?',
        const=AUTO,
        help='resume from a checkpoint, or from the newest whole one in the work directory',
    )
    parser.add_argument('--force', action='store_true', help='train even if another run seems to use the directory')
    parser.add_argument(
        '--max-hours', type=float, help='save a checkpoint and end with status 75 after so many hours; see --resume'
    )
    args = parser.parse_args()
    if args.max_hours is not None and not args.max_hours > 0:
        parser.error(f'--max-hours {args.max_hours:g}: it must be above 0')
    if args.resume not in (None, AUTO) and Path(args.resume).is_dir():
        parser.error(
            f'--resume {args.resume}: a folder. Name a checkpoint in it; without a name, it is the newest of --work-dir'
        )
    return args


def apply_training_arguments(config: Config, args: argparse.Namespace) -> None:
    """Write the arguments of training into the config."""
    if args.amp:
        config.optim_wrapper.type = 'AmpOptimWrapper'
        config.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.compile:
        add_compile_hook(config)
    if args.max_hours is not None:
        hooks = config.setdefault('default_hooks', ConfigDict())
        hooks.preemption = dict(type='dino_mm.PreemptionHook', max_hours=args.max_hours)
    if args.auto_scale_lr:
        if 'base_batch_size' not in config.get('auto_scale_lr', {}):
            raise SystemExit(f'--auto-scale-lr: {config.filename} has no `auto_scale_lr.base_batch_size`.')
        config.auto_scale_lr.enable = True
    if args.resume == AUTO:
        config.resume = AUTO
    elif args.resume is not None:
        config.resume, config.load_from = True, args.resume


def main() -> None:
    """Train."""
    args = parse_args()
    config = load_config(args)
    apply_training_arguments(config, args)
    with ends_cleanly(), only_run(config, args.force):
        build_runner(config).train()


if __name__ == '__main__':
    main()
