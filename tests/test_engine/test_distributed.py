"""Two processes over gloo train as one process with the same batch."""

import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import make_samples, tiny_model_cfg
from torch.nn.parallel import DistributedDataParallel

from dino_mm.registry import MODELS


def build_model():
    cfg = tiny_model_cfg()
    cfg.denoising = None  # its groups depend on the boxes of the local batch
    cfg.backbone.norm_eval = True  # batch statistics too
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    model.init_weights()
    for branch in model.bbox_head.reg_branches:
        torch.nn.init.normal_(branch[-1].weight, std=0.1)  # zero at first: it would hide gradients
    return model.double().train()


def make_batch():
    torch.manual_seed(1)
    inputs, samples = make_samples((3, 1, 0, 2))
    return inputs.double(), samples


def run_rank(rank: int, port: int, out: Path) -> None:
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE='2')
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    model = build_model()
    inputs, samples = make_batch()
    half = slice(2 * rank, 2 * rank + 2)
    model.forward = model.loss
    parallel = DistributedDataParallel(model)  # must live until the gradients are reduced
    losses = parallel(inputs[half], samples[half])
    sum(losses.values()).backward()
    gradients = {k: p.grad for k, p in model.named_parameters()}
    torch.save(({k: v.detach() for k, v in losses.items()}, gradients), out / f'{rank}.pth')
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        port = sock.getsockname()[1]
    mp.spawn(run_rank, (port, tmp_path), nprocs=2)
    (losses0, gradients0), (losses1, gradients1) = (torch.load(tmp_path / f'{r}.pth') for r in range(2))

    model = build_model()
    losses = model.loss(*make_batch())
    sum(losses.values()).backward()
    for name, value in losses.items():
        torch.testing.assert_close((losses0[name] + losses1[name]) / 2, value.detach(), rtol=1e-10, atol=0)
    norms = []
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients0[name], gradients1[name], rtol=0, atol=0)
        torch.testing.assert_close(gradients0[name], parameter.grad, rtol=1e-8, atol=1e-12, msg=name)
        norms.append(parameter.grad.norm().item())
    # A new ResNet's residual branches end in zeros, so that their convolutions have no gradient yet.
    assert sum(n > 0 for n in norms) > 0.5 * len(norms)
