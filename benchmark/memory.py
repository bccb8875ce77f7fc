"""Memory of RL on a full-size pi0, pi0.5 or GR00T N1.5, part by part, computed: no GPU is needed.

Nothing is allocated. Parameters and the tensors that autograd keeps for the backward pass are counted on fake
tensors, which have a shape and no data. The heads (5 MiB) are left out, and what a GPU needs besides: CUDA
itself, the allocator's gaps, temporaries such as the VLM's own activations, of which inference keeps one
layer's at a time.

    python benchmark/memory.py                                   # seconds; prints a table in Markdown
    python benchmark/memory.py --chunks 1024 --micro-batch-size 64
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gr00t_models
import pi_models
from gr00t_models import GrootConfig
from pi_models import PiConfig

GIB = 2**30


@dataclass
class Args:
    chunks: int = 512
    """num_envs x num_steps, the observations that are kept for the update, encoded"""
    micro_batch_size: int = 32
    """chunks per forward and backward pass"""
    denoise_steps: int = 4
    """K; Flow-Noise passes all of them through the expert at once, Flow-SDE one"""
    cameras: int = 2
    """pictures of an observation"""
    prompt_tokens: int = 14
    """words of the longest prompt"""


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def saved_for_backward(policy, prefix, x, tau):
    """Bytes that autograd keeps of a pass of the expert, without parameters and the prefix itself."""
    known = [*policy.parameters(), *prefix]
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        velocity, _ = policy.velocity(prefix, x, tau)
        velocity.square().sum()
    for tensor in known:
        kept.pop(tensor.untyped_storage()._cdata, None)
    return sum(kept.values())


def measure(config, args):
    groot = config.variant == "gr00t"
    with FakeTensorMode(), no_init_weights():
        policy = (gr00t_models if groot else pi_models).Policy(config)
        for module in policy.vlm_modules:
            half = {key: torch.empty_like(p, dtype=torch.bfloat16) for key, p in module.state_dict().items()}
            module.load_state_dict(half, assign=True)
        tokens = args.cameras * (config.image_size // config.patch_size) ** 2 + args.prompt_tokens
        tokens += 19 + 7 * args.cameras if groot else 0  # of the chat, and around each picture

        def prefix(n):
            mask, state = torch.empty(n, tokens, dtype=torch.bool), torch.empty(n, config.state_dim)
            if groot:
                features = torch.empty(n, tokens, config.width, dtype=torch.bfloat16)
                return gr00t_models.Prefix(features, mask, state)
            kv = torch.empty(n, config.depth, 2, tokens, config.head_dim, dtype=torch.bfloat16)
            return pi_models.Prefix(kv, mask, torch.empty(n, config.width), state)

        def activations(steps):
            n = args.micro_batch_size * steps
            x = torch.empty(n, config.horizon, config.action_dim)
            return saved_for_backward(policy, prefix(args.micro_batch_size), x, torch.empty(n))

        frozen = [p for module in policy.vlm_modules for p in module.parameters()]
        trained = [p for p in policy.parameters() if p.requires_grad]
        once, often = f"{args.micro_batch_size} chunks", f"K = {args.denoise_steps} steps (Flow-Noise)"
        return {
            "VLM, frozen, bf16": size(frozen),
            "expert, fp32 masters": size(trained),
            "their gradients, fp32": size(trained),
            "their moments (AdamW), fp32": 2 * size(trained),
            f"keys and values, or features, of {args.chunks} observations, bf16": size(prefix(args.chunks)),
            f"activations, {once}, one step (Flow-SDE)": activations(1),
            f"activations, {once}, {often}": activations(args.denoise_steps),
        }, sum(p.numel() for p in policy.parameters())


def main(args):
    pi05 = PiConfig("pi05", horizon=10, max_token_len=200)
    configs = {"pi0": PiConfig(), "pi0.5": pi05, "GR00T N1.5": GrootConfig()}
    columns = {name: measure(config, args) for name, config in configs.items()}
    print(f"| GiB | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    parts = [part for part, _ in columns.values()]
    for name in parts[0]:
        print(f"| {name} | {' | '.join(f'{part[name] / GIB:.2f}' for part in parts)} |")
    for name, left_out in (("Flow-SDE", -1), ("Flow-Noise", -2)):
        sums = [sum(part.values()) - list(part.values())[left_out] for part in parts]
        print(f"| **{name}, all of it** | {' | '.join(f'**{total / GIB:.1f}**' for total in sums)} |")
    counts = ", ".join(f"{name} {count / 1e9:.2f} billion" for name, (_, count) in columns.items())
    print(f"\nParameters: {counts}. {args.cameras} cameras, prompts of {args.prompt_tokens} tokens.")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
