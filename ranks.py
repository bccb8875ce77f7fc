"""Several processes that train one policy, and what they say to each other.

    torchrun --standalone --nproc_per_node=2 flow_sde_ppo.py    # two ranks; without torchrun there is one

Every rank has its share of the environments, the same weights and the same optimiser. It learns from its
own chunks; before each step the ranks add up their gradients, so all of them take the same one. What else
they tell each other goes through `gather`. One rank sends nothing.
"""

import atexit
import ctypes
import os
import signal
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flags import fail


def join(device: str) -> tuple[int, int, str]:
    """This process's rank, how many there are (torchrun says it), and its device: GPUs are dealt in turn."""
    device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends when torchrun is gone
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "gloo")
            atexit.register(dist.destroy_process_group)
    return rank, ranks, device


def _say(collective, *args):
    try:
        collective(*args)
    except RuntimeError as error:  # its reason is on the other's screen
        fail(f"another rank is gone ({str(error).strip().splitlines()[0]})")


def gather(value) -> list:
    """The value of every rank, in their order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    _say(dist.all_gather_object, values, value.cpu() if isinstance(value, Tensor) else value)
    return values


def add_gradients(parameters: list[nn.Parameter]):
    """Gives every rank the sum of all ranks' gradients, in one message. A rank may have none."""
    if not dist.is_initialized():
        return
    used = [any(some) for some in zip(*gather([p.grad is not None for p in parameters]))]
    parameters = [p for p, anyone in zip(parameters, used) if anyone]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = torch.cat([gradient.flatten() for gradient in gradients])
    _say(dist.all_reduce, total)
    for p, part in zip(parameters, total.split([p.numel() for p in parameters])):
        p.grad = part.view_as(p)
