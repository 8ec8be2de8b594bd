"""Test a detector: ``dino-mm test CONFIG CHECKPOINT`` evaluates it as the config says, for COCO by AP."""

import argparse

import dino_mm  # noqa: F401  (first, for it says what does not fit)

# isort: split
from mmdet.engine.hooks.utils import trigger_visualization_hook
from mmdet.evaluation import DumpDetResults
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner

from dino_mm.engine import ReportHook
from dino_mm.engine.launch import add_common_arguments, add_compile_hook, build_runner, ends_cleanly, load_config
from dino_mm.engine.safe_files import writable_file, writable_folder
from dino_mm.zoo import ZOO, weights_of


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser)
    parser.add_argument(
        'checkpoint',
        help='path or address of a checkpoint: ours, of detrex, of IDEA-Research/DINO or of MMDetection; '
        "a training's folder, for its best one; or `zoo`, for the one that the zoo names",
    )
    parser.add_argument('--out', help='write the predictions to this .pkl file')
    parser.add_argument('--report', metavar='DIR', help='write the predictions and a report on them into this folder')
    parser.add_argument('--show', action='store_true', help='show the images with their detections')
    parser.add_argument('--show-dir', help='write the images with their detections into this folder')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds that --show shows an image')
    parser.add_argument('--tta', action='store_true', help="test-time augmentation with the config's `tta_pipeline`")
    parser.add_argument(
        '--compile',
        nargs='?',
        choices=['parts', 'cuda-graphs'],
        const='parts',
        help='compile the detector part by part for all sizes (the default), or for each size, to run as CUDA graphs',
    )
    args = parser.parse_args()
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out writes a .pkl file, not {args.out}')
    if args.show_dir is not None:
        args.show_dir = writable_folder(args.show_dir, '--show-dir')
    if args.out is not None:
        args.out = writable_file(args.out, '--out')
    return args


def enable_tta(config: Config) -> None:
    """Wrap model and pipeline as the config's ``tta_model`` and ``tta_pipeline`` say."""
    missing = [key for key in ('tta_model', 'tta_pipeline') if key not in config]
    if missing:
        raise SystemExit(f'--tta: {config.filename} has no `{"` and no `".join(missing)}`.')
    config.model = ConfigDict(**config.tta_model, module=config.model)
    dataset = config.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    dataset.pipeline = config.tta_pipeline


def require_results(runner: Runner, results: dict) -> None:
    """End the program with status 1 if a test that should give figures has given none."""
    metrics = [metric for metric in runner.test_evaluator.metrics if not isinstance(metric, DumpDetResults)]
    if results or all(getattr(metric, 'format_only', False) for metric in metrics):
        return
    raise SystemExit(
        f'error: {runner.cfg.load_from}: the test has no result, for there is no detection in any image. A model whose '
        'weights are NaN finds nothing: test another checkpoint of the run.'
    )


def main() -> None:
    """Test."""
    args = parse_args()
    config = load_config(args)
    config.resume = False
    if args.show or args.show_dir:
        config = trigger_visualization_hook(config, args)
    if args.tta:
        enable_tta(config)
    if args.compile:
        add_compile_hook(config, cuda_graphs=args.compile == 'cuda-graphs')
    with ends_cleanly():
        config.load_from = weights_of(args.config) if args.checkpoint == ZOO else args.checkpoint
        runner = build_runner(config)
        if args.out is not None:
            runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
        if args.report is not None:
            runner.register_hook(ReportHook(args.report))
        results = runner.test()
    require_results(runner, results)


if __name__ == '__main__':
    main()
