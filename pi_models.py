"""pi0 and pi0.5 as in their public checkpoints: SigLIP + Gemma (the VLM), and a smaller Gemma, the expert.

    policy = load_policy(path_or_name, device)             # a folder with safetensors, or "tiny"
    inputs = policy.preprocess(obs)                        # simulator observation -> tensors
    prefix = policy.encode(inputs)                         # vision + language, once per observation: K, V
    velocity, features = policy.velocity(prefix, x, tau)   # one denoise step of the expert over the cache
    actions = policy.postprocess(x, obs)                   # model actions -> simulator actions

The prefix (pictures, prompt) never attends to the suffix (state, noisy actions). So one pass over the prefix,
whose keys and values are kept, then a pass over the suffix alone, is the joint forward exactly.

In pi0 the suffix begins with a state token and each action token is mixed with the time. In pi0.5 there is no
state token, and the time steers the expert's norms (AdaRMS).

The clock. Checkpoints run t = 1 (noise) -> 0 (action) and predict noise - action. This project's clock is the
paper's: tau = 0 (noise) -> 1 (action), velocity = action - noise. `Policy.velocity` turns one into the other,
and nothing else does.
"""

import dataclasses
import json
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import layouts
from flags import fail, tell
from layouts import CHECKPOINTS, STATISTICS, TOKENIZERS, save_policy  # noqa: F401  # goes with load_policy


@dataclass
class PiConfig:
    """Sizes; the defaults are those of the public pi0 checkpoints."""

    variant: str = "pi0"  # or "pi05"
    image_size: int = 224
    patch_size: int = 14
    vision_width: int = 1152
    vision_mlp: int = 4304
    vision_depth: int = 27
    vision_heads: int = 16
    width: int = 2048
    mlp: int = 16384
    depth: int = 18  # of VLM and expert: layer l of the expert attends to the keys of layer l of the VLM
    heads: int = 8
    head_dim: int = 256
    vocab_size: int = 257152
    expert_width: int = 1024
    expert_mlp: int = 4096
    action_dim: int = 32  # actions and state are padded to these
    state_dim: int = 32
    horizon: int = 50
    max_token_len: int = 48
    tokenizer: str = "paligemma"  # or "words": the small one of checkpoints/tiny
    state_in_prompt: bool = False  # lerobot's pi0.5 reads the state as words
    delta_actions: int = 0  # so many of the first dimensions are relative to the state; 6 in pi0_libero
    critic: str = ""  # "expert", "vlm", or none yet
    critic_layers: int = 4
    noise_std_min: float = 0.0  # bounds of the noise head; 0: none yet
    noise_std_max: float = 0.0
    lora_rank: int = 0  # of the adapters in the VLM; 0: none yet
    lora_alpha: int = 0


# The laptop's pi0: the same classes, small numbers. A picture is 16 patches and a word is a token.
TINY = PiConfig(
    image_size=32, patch_size=8, vision_width=96, vision_mlp=192, vision_depth=4, vision_heads=4,
    width=64, mlp=128, depth=4, heads=4, head_dim=32, vocab_size=229, expert_width=64, expert_mlp=128,
    action_dim=4, state_dim=4, horizon=5, tokenizer="words",
)  # fmt: skip  # sizes in rows

TINY_POLICIES = "tiny", "tiny-gr00t"  # pre-trained for the tabletop, in checkpoints/


class Prefix(NamedTuple):
    """What the expert and the critics need of an observation, computed once; rows can be indexed."""

    kv: torch.Tensor  # (B, layers, 2, S, head_dim): keys (rotated) and values of every layer
    mask: torch.Tensor  # (B, S): True where the token is real
    pooled: torch.Tensor  # (B, width): masked mean of the VLM's output for V_vlm; (B, 0) without
    state: torch.Tensor  # (B, state_dim): normalised proprioception, which pi0 gives to the expert

    def __getitem__(self, rows):
        return Prefix(*(field[rows] for field in tuple(self)))

    @property
    def read(self):
        """Masked means of what the expert sees, the values of layers 1, 2, ..., (B, head_dim) each."""
        weight = self.mask[:, None, :, None] / self.mask.sum(1)[:, None, None, None]
        return (self.kv[:, 1:, 1] * weight).sum(2).unbind(1)


class Prefixes:
    """The observations of a rollout (T, N), encoded once for all epochs of the update.

    Counted through T * N, the first are kept on the policy's device, as many as fit into `device_gb`, the
    next in host memory, up to `host_gb`. Of the rest, and of all when the VLM learns, only the inputs are
    kept, and encoded again when they are asked for. None is room for everything.
    """

    def __init__(self, policy, T, N, prefix, inputs, device_gb=None, host_gb=None):
        self.N, self.parts, first = N, [], 0  # parts: first row, last row + 1, fields
        each, device, host = sum(field[0].nbytes for field in prefix), policy.device, torch.device("cpu")
        room = [T * N if gb is None else int(gb * 2**30 / each) for gb in (device_gb, host_gb)]
        room = [0, 0] if policy.vlm_trained else room
        kept = prefix._asdict()
        for place, rows, fields in ((device, room[0], kept), (host, room[1], kept), (device, T * N, inputs)):
            last = min(first + rows, T * N)
            make = partial(torch.zeros, device=place, pin_memory=place != device)
            stored = {name: make((last - first, *x.shape[1:]), dtype=x.dtype) for name, x in fields.items()}
            self.parts.append((first, last, stored))
            first = last
        (_, a, _), (_, b, _), (_, c, _) = self.parts
        if a < c and not policy.vlm_trained:
            elsewhere = f"{b - a} in host memory, {c - b} are encoded again for the update"
            tell(f"of {c} observations {a} are kept on the device, {elsewhere}")
        self.fetcher = ThreadPoolExecutor(1) if a < b else None  # from host memory
        self.copies = torch.cuda.Stream() if self.fetcher and device.type == "cuda" else None

    def put(self, t, prefix, inputs):
        """What the N environments show in turn t."""
        begin, given = t * self.N, inputs | prefix._asdict()
        for first, last, fields in self.parts:
            low, high = max(first, begin), max(min(last, begin + self.N), first, begin)
            for name, field in fields.items():
                field[low - first : high - first] = given[name][low - begin : high - begin]

    def encoded(self, policy, batches):
        """(rows, their prefix) in turn. What is in host memory comes while the one before it is in use."""
        if not self.fetcher:
            yield from ((rows, self._join(policy, self._fetch(rows))) for rows in batches)
            return
        coming = [self._ahead(rows) for rows in batches[:1]]
        for rows, *after in (batches[i : i + 2] for i in range(len(batches))):
            found = coming.pop().result()
            coming += [self._ahead(following) for following in after]
            yield rows, self._join(policy, found)

    def _ahead(self, rows):
        """`_fetch` in another thread and, on a GPU, a stream that first waits for what is queued now."""
        if self.copies:
            self.copies.wait_stream(torch.cuda.current_stream())

        def fetch():
            with torch.cuda.stream(self.copies):
                return self._fetch(rows)

        return self.fetcher.submit(fetch)

    @torch.no_grad()
    def _fetch(self, rows):
        """[(where in rows, their fields on the device)] for each part that has some of them."""
        found = []
        for first, last, fields in self.parts:
            where = torch.where((first <= rows) & (rows < last))[0]
            if len(where):
                picked = {name: pick(field, rows[where] - first) for name, field in fields.items()}
                found.append((where, picked))
        return found

    def _join(self, policy, found):
        if self.copies:
            torch.cuda.current_stream().wait_stream(self.copies)
        prefixes = [policy.encode(fields) for _, fields in found]
        if len(prefixes) == 1:
            return prefixes[0]
        order = torch.cat([where for where, _ in found]).argsort()
        return type(prefixes[0])(*(torch.cat(fields)[order] for fields in zip(*prefixes)))


def pick(field, rows):
    """Rows of a field, on the device that the rows are on."""
    if field.device == rows.device:
        return field[rows]
    picked = torch.empty((len(rows), *field.shape[1:]), dtype=field.dtype, pin_memory=True)
    torch.index_select(field, 0, rows.cpu(), out=picked)
    return picked.to(rows.device, non_blocking=True)


# --------------------------------------------------------------------------------------------------- networks


def rope(x, cos, sin):
    """Rotary position embedding, x (B, heads, S, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attention(q, k, v, mask):
    """Multi-query attention: q (B, heads, S, D), one key-value head (B, T, D), mask (B, 1 or S, T).

    The heads share keys and mask, so they are folded into the query axis: the same numbers by fast kernels.
    """
    B, heads, S, D = q.shape
    if mask.shape[1] > 1:
        mask = mask.repeat(1, heads, 1)
    out = F.scaled_dot_product_attention(q.reshape(B, 1, heads * S, D), k[:, None], v[:, None], mask[:, None])
    return out.view(B, heads, S, D).transpose(1, 2).reshape(B, S, heads * D)


class AdaRMSNorm(nn.Module):
    """RMS norm whose scale and shift, and the gate of what follows, are functions of a condition (pi0.5)."""

    def __init__(self, width):
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.dense.weight)  # a new one is a plain norm, whose gate is closed
        nn.init.zeros_(self.dense.bias)

    def forward(self, x, condition):
        """x (B, T, W); condition (B, C, W), each for T / C neighbours."""
        change = self.dense(condition).repeat_interleave(x.shape[1] // condition.shape[1], dim=1)
        scale, shift, gate = change.chunk(3, dim=-1)
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift, gate


def gemma(model, x, positions, mask, cache=None, condition=None, output=True):
    """The layers of a GemmaModel over embeddings x (B, S, W), which also look at the cache, if there is one.

    Returns the normed output, if wanted, and this pass's own (B, layers, 2, S, head_dim) keys and values.
    """

    def normed(norm, x):
        return (norm(x), None) if condition is None else norm(x, condition)

    def add(x, change, gate):
        return x + change if gate is None else x + gate * change

    cos, sin = (table[:, None] for table in model.rotary_emb(x, positions))  # (B, 1, S, head_dim)
    kv = []
    for i, layer in enumerate(model.layers):
        attn, (h, gate) = layer.self_attn, normed(layer.input_layernorm, x)
        k, v = rope(attn.k_proj(h)[:, None], cos, sin)[:, 0], attn.v_proj(h)
        kv.append(torch.stack([k, v], dim=1))
        if not output and len(kv) == len(model.layers):
            return None, torch.stack(kv, dim=1)
        q = rope(attn.q_proj(h).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2), cos, sin)
        if cache is not None:
            k, v = torch.cat([cache[:, i, 0], k], dim=1), torch.cat([cache[:, i, 1], v], dim=1)
        x = add(x, attn.o_proj(attention(q, k, v, mask)), gate)
        h, gate = normed(layer.post_attention_layernorm, x)
        x = add(x, layer.mlp(h), gate)
    return normed(model.norm, x)[0], torch.stack(kv, dim=1)


def finite_state(obs, device):
    """The state (B, S). NaN of a simulator was found before; here it is of environments of the user's."""
    state = np.asarray(obs["state"], np.float32)
    for row in np.flatnonzero(~np.isfinite(state).all(axis=1))[:1]:
        fail(f"observation {row} ({obs['prompt'][row]!r}): its state is NaN or infinite", code=1)
    return torch.as_tensor(state, device=device)


def time_embedding(t, dim, min_period=4e-3, max_period=4.0):
    """Sine-cosine embedding of t (B,). In fp64: the fastest wave turns 1571 rad per unit of t."""
    fraction = torch.linspace(0, 1, dim // 2, dtype=torch.float64, device=t.device)
    angle = t.double()[:, None] * 2 * math.pi / (min_period * (max_period / min_period) ** fraction)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)  # (B, dim)


class LoRALinear(nn.Linear):
    """W x + (alpha / rank) B A x: a frozen linear layer that learns by two thin matrices (LoRA)."""

    def __init__(self, linear, rank, alpha):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale, self.weight, self.bias = alpha / rank, linear.weight, linear.bias
        self.lora_a = nn.Parameter(torch.randn(rank, self.in_features) * self.in_features**-0.5)
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank))  # so a new one changes nothing

    def forward(self, x):
        low = F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))
        return super().forward(x) + self.scale * low


class ValueHead(nn.Module):
    """MLP from features to a value. Halving widths, ReLU; four layers are 512-256-128-1."""

    def __init__(self, in_dim, layers):
        super().__init__()
        sizes = [in_dim, *(512 >> i for i in range(layers - 1)), 1]
        linear = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]
        self.mlp = nn.Sequential(*(m for layer in linear[:-1] for m in (layer, nn.ReLU())), linear[-1])
        nn.init.zeros_(linear[-1].weight)  # a new critic starts at zero everywhere
        nn.init.zeros_(linear[-1].bias)

    def forward(self, features):
        return self.mlp(features).squeeze(-1)


class NoiseHead(nn.Module):
    """Features of the expert (B, H, W) -> a standard deviation for each number of the chunk (Flow-Noise).

    tanh interpolates geometrically between the bounds; with log-variances as ends it is the same.
    """

    def __init__(self, in_dim, action_dim, low, high):
        super().__init__()
        self.low, self.high = low, high
        sizes = [in_dim, 128, 64, action_dim]
        self.mlp = nn.Sequential(*(m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.Tanh())))

    def forward(self, features):
        return self.low * (self.high / self.low) ** ((self.mlp(features) + 1) / 2)  # (B, H, action_dim)


class Policy(nn.Module):
    """pi0 or pi0.5. The VLM is frozen unless `train` says otherwise, the expert and its projections learn."""

    def __init__(self, config: PiConfig, stats: dict | None = None):
        # here, not at the top: importing them takes seconds, which --help should not
        from transformers import GemmaConfig, GemmaModel, SiglipVisionConfig, SiglipVisionModel

        super().__init__()
        c = self.config = config
        self.stats = stats  # {"state" | "actions": {"mean", "std", "q01" or "q99": [real dimensions]}}
        self.pi05 = c.variant == "pi05"
        self.token_len = c.max_token_len
        self._tokens = {}
        self.tokenizer_json = self._tokenizer = None  # PaliGemma's, as text and ready for use

        def gemma_model(width, mlp, vocab_size):
            return GemmaModel(GemmaConfig(
                hidden_size=width, intermediate_size=mlp, num_hidden_layers=c.depth, vocab_size=vocab_size,
                num_attention_heads=c.heads, num_key_value_heads=1, head_dim=c.head_dim,
                initializer_range=width**-0.5,
                bos_token_id=None, eos_token_id=None, pad_token_id=None,
            ))  # fmt: skip  # sizes in rows

        self.vision_tower = SiglipVisionModel(SiglipVisionConfig(
            hidden_size=c.vision_width, intermediate_size=c.vision_mlp, num_hidden_layers=c.vision_depth,
            num_attention_heads=c.vision_heads, image_size=c.image_size, patch_size=c.patch_size,
            vision_use_head=False,
        ))  # fmt: skip  # sizes in rows
        self.multi_modal_projector = nn.Linear(c.vision_width, c.width)
        self.language_model = gemma_model(c.width, c.mlp, c.vocab_size)
        self.expert = gemma_model(c.expert_width, c.expert_mlp, 1)
        self.expert.embed_tokens = None  # the expert reads actions, not words
        if not self.pi05:
            self.state_proj = nn.Linear(c.state_dim, c.expert_width)
        self.action_in_proj = nn.Linear(c.action_dim, c.expert_width)
        if self.pi05:
            self.expert.norm = AdaRMSNorm(c.expert_width)
            for layer in self.expert.layers:
                layer.input_layernorm = AdaRMSNorm(c.expert_width)
                layer.post_attention_layernorm = AdaRMSNorm(c.expert_width)
            self.time_mlp_in = nn.Linear(c.expert_width, c.expert_width)
            self.time_mlp_out = nn.Linear(c.expert_width, c.expert_width)
        else:
            self.action_time_mlp_in = nn.Linear(2 * c.expert_width, c.expert_width)
            self.action_time_mlp_out = nn.Linear(c.expert_width, c.expert_width)
        self.action_out_proj = nn.Linear(c.expert_width, c.action_dim)
        self._add_heads()

    def _add_heads(self):
        """Heads and adapters of the config, what learns: the end of the constructor in every family."""
        c, self.value_head, self.noise_head = self.config, None, None
        if c.critic:
            self.need_value_head(c.critic, c.critic_layers)
        if c.noise_std_min:
            self.need_noise_head(c.noise_std_min, c.noise_std_max)
        self.vlm_modules = [self.vision_tower, self.multi_modal_projector, self.language_model]
        self.half = False  # does the VLM compute in bf16, though its weights are in fp32 to be trained?
        if c.lora_rank:
            self.set_trained("expert+lora", c.lora_rank, c.lora_alpha)
        else:
            self.set_trained("expert")

    @property
    def device(self):
        return self.action_in_proj.weight.device

    @property
    def env_action_dim(self):
        return len(next(iter(self.stats["actions"].values())))

    def actor_parameters(self):
        critic = {id(p) for p in self.value_head.parameters()} if self.value_head else set()
        return [p for p in self.parameters() if p.requires_grad and id(p) not in critic]

    def need_value_head(self, critic, layers):
        """A new one, unless such a one is there. V_vlm reads the state too, which pi0's VLM is not given."""
        if self.value_head and (self.config.critic, self.config.critic_layers) == (critic, layers):
            return
        self.config = dataclasses.replace(self.config, critic=critic, critic_layers=layers)
        in_dim = self.config.expert_width if critic == "expert" else self.config.width + self.config.state_dim
        self.value_head = ValueHead(in_dim, layers).to(self.device)

    def need_noise_head(self, low, high):
        """A new one, unless one with these bounds is there. Trained with the expert, not used by the ODE."""
        if self.noise_head and (self.noise_head.low, self.noise_head.high) == (low, high):
            return
        c = self.config = dataclasses.replace(self.config, noise_std_min=low, noise_std_max=high)
        self.noise_head = NoiseHead(c.expert_width, c.action_dim, low, high).to(self.device)

    def fit_robot(self, state, action, stats=None):
        """Another robot, with these sizes. What reads a larger state or writes larger actions begins anew."""
        sizes, c = {"state": state, "actions": action}, self.config
        unit = {"mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0, "min": -1.0, "max": 1.0}
        self.stats = stats or {key: {s: [x] * n for s, x in unit.items()} for key, n in sizes.items()}
        if state > c.state_dim or action > c.action_dim:
            sizes = {"state_dim": max(state, c.state_dim), "action_dim": max(action, c.action_dim)}
            self.config = dataclasses.replace(c, **sizes)
            fresh = dict(type(self)(self.config).to(self.device).named_modules())
            for name, module in list(self.named_modules()):
                if isinstance(module, nn.Linear) and module.weight.shape != fresh[name].weight.shape:
                    self.set_submodule(name, fresh[name])

    def check_robot(self, state, action):
        """A robot whose numbers are as many as those that this policy was trained with."""
        mine = len(next(iter(self.stats["state"].values()))), self.env_action_dim
        if mine != (state, action):
            has = f"{mine[0]} numbers of state and {mine[1]} of action"
            fail(f"the checkpoint's robot has {has}, the environment's {state} and {action}")

    def set_trained(self, train, lora_rank=0, lora_alpha=0):
        """What learns: "expert", "expert+lora" (the VLM's adapters, new ones unless it has some) or "all"."""
        had, wanted = (self.config.lora_rank, self.config.lora_alpha), (lora_rank, lora_alpha)
        adapters = any(isinstance(m, LoRALinear) for part in self.vlm_modules for m in part.modules())
        if train == "expert+lora" and adapters and had != wanted:
            fail(f"the checkpoint has adapters of rank {had[0]} and alpha {had[1]}; pass these")
        if train == "expert+lora" and not adapters:
            self.config = dataclasses.replace(self.config, lora_rank=lora_rank, lora_alpha=lora_alpha)
            for module in [m for part in self.vlm_modules for m in part.modules()]:
                for name, child in list(module.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(module, name, LoRALinear(child, lora_rank, lora_alpha).to(self.device))
        self.vlm_trained = train != "expert"
        for name, parameter in (named for part in self.vlm_modules for named in part.named_parameters()):
            parameter.requires_grad_(train == "all" or train == "expert+lora" and "lora_" in name)
            if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                parameter.data, self.half = parameter.data.float(), True  # small steps are lost in bf16

    # -- observation -> tensors

    def fit_prompts(self, prompts):
        """Pad to the longest of these, not to `max_token_len`. Exact, since padding is masked."""
        longest = np.ones(len(next(iter(self.stats["state"].values()))))  # bins of three digits
        lengths = [len(self.tokenize(prompt, longest)) for prompt in prompts]
        self.token_len = min(self.config.max_token_len, max(lengths))

    def tokenizer(self):
        if self.tokenizer_json is None:
            fail(f"no tokenizer.json: copy {TOKENIZERS[self.config.tokenizer]}'s to the checkpoint's folder")
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_str(self.tokenizer_json)
        return self._tokenizer

    def tokenize(self, prompt, state=None):
        """BOS + text + newline, the pi0 style; lerobot's pi0.5 adds the state (normalised) in 256 bins."""
        text, end = prompt.strip().replace("_", " ").replace("\n", " "), "\n"
        if self.config.state_in_prompt:
            padded = [*state, *[0] * (self.config.state_dim - len(state))]
            bins = np.digitize(padded, np.linspace(-1, 1, 257)[:-1]) - 1
            text, end = f"Task: {text}, State: {' '.join(map(str, bins))};\nAction: ", ""
        words = (self.tokenizer().encode(part, add_special_tokens=False).ids for part in (text, end))
        return [2, *(token for part in words for token in part)]  # 2: BOS

    def preprocess(self, obs: dict) -> dict[str, torch.Tensor]:
        """{"images" (B, cams, H, W, 3) uint8, "state" (B, S), "prompt" [B]} -> normalised tensors.

        "image_mask" (B, cams) bool may be there too: a missing camera is False.
        """
        images = torch.from_numpy(np.ascontiguousarray(obs["images"])).to(self.device)  # maybe of no camera
        images = images.permute(0, 1, 4, 2, 3).float() / 127.5 - 1  # (B, cams, 3, H, W)
        size, longest = self.config.image_size, max(images.shape[-2:])
        if images.shape[1] and images.shape[-2:] != (size, size):
            # keep the aspect ratio and pad with black, as in openpi
            h, w = (max(1, n * size // longest) for n in images.shape[-2:])
            flat = F.interpolate(images.flatten(0, 1), (h, w), mode="bilinear", antialias=True).clamp(-1, 1)
            top, left = (size - h) // 2, (size - w) // 2
            padded = F.pad(flat, (left, size - w - left, top, size - h - top), value=-1.0)
            images = padded.unflatten(0, images.shape[:2])
        there = torch.as_tensor(obs.get("image_mask", np.ones(images.shape[:2], bool)), device=self.device)
        if not there.all():  # a missing picture is -1, a camera that nobody has is dropped
            images = images.masked_fill(~there[..., None, None, None], -1)[:, there.any(0)]
            there = there[:, there.any(0)]
        state = self._normalize(finite_state(obs, self.device), "state")
        tokens = [self._padded_tokens(*x) for x in zip(obs["prompt"], state.tolist())]
        tokens = torch.stack(tokens).to(self.device)
        return {
            "images": images,
            "image_mask": there,
            "tokens": tokens.clamp(min=0),
            "token_mask": tokens >= 0,
            "state": F.pad(state, (0, self.config.state_dim - state.shape[1])),
        }

    def _padded_tokens(self, prompt, state):
        key = prompt, self.token_len, tuple(state) if self.config.state_in_prompt else None
        if key not in self._tokens:
            tokens = self.tokenize(prompt, state)[: self.token_len]
            tokens = torch.tensor(tokens + [-1] * (self.token_len - len(tokens)))  # -1: padding
            if self.config.state_in_prompt:  # never the same again
                return tokens
            self._tokens[key] = tokens
        return self._tokens[key]

    def _scale(self, key):
        """What is 0 to the network and how far it is to 1; in pi0.5, what is -1 and how far it is to 1."""
        first, second = (np.asarray(self.stats[key][s], np.float32) for s in STATISTICS[self.config.variant])
        return first, (second - first if self.pi05 else second) + np.float32(1e-6)

    def _normalize(self, x, key):
        first, length = map(x.new_tensor, self._scale(key))
        return (x - first) / length * 2 - 1 if self.pi05 else (x - first) / length

    def normalize_actions(self, actions: np.ndarray) -> torch.Tensor:
        """Simulator actions (B, H, D) -> the expert's padded space (B, H, action_dim), the target of SFT."""
        if getattr(self.config, "delta_actions", 0):
            fail("SFT of a policy with delta_actions is not supported")
        actions = torch.as_tensor(actions, dtype=torch.float32, device=self.device)
        padding = self.config.action_dim - actions.shape[-1]
        return F.pad(self._normalize(actions, "actions"), (0, padding))

    def postprocess(self, x: torch.Tensor, obs: dict) -> np.ndarray:
        """Model actions (B, H, action_dim) -> simulator actions (B, H, env_action_dim), NumPy."""
        actions = x[..., : self.env_action_dim].detach().cpu().numpy()
        first, length = self._scale("actions")
        actions = ((actions + 1) / 2 if self.pi05 else actions) * length + first
        n = self.config.delta_actions
        if n:
            actions[..., :n] += np.asarray(obs["state"], np.float32)[:, None, :n]
        return actions

    # -- forward

    def embed_images(self, images):
        """(B, cams, 3, size, size) -> (B, cams * patches, width)."""
        images = images.to(self.multi_modal_projector.weight.dtype)
        patches = self.vision_tower(images.flatten(0, 1)).last_hidden_state  # (B * cams, ...)
        return self.multi_modal_projector(patches).unflatten(0, images.shape[:2]).flatten(1, 2)

    def encode(self, inputs: dict[str, torch.Tensor], pool=False) -> Prefix:
        """Vision and language, once per observation; what has been encoded is given back."""
        if "kv" in inputs:
            return Prefix(**inputs)
        images, mask = inputs["images"], inputs["token_mask"]
        read = pool or self.config.critic == "vlm"  # nobody else reads the output
        with torch.autocast(mask.device.type, torch.bfloat16, enabled=self.half):
            x = self.language_model.embed_tokens(inputs["tokens"])  # times sqrt(width); patches are not
            if images.shape[1]:
                patches = self.embed_images(images)
                seen = inputs["image_mask"].repeat_interleave(patches.shape[1] // images.shape[1], dim=1)
                x, mask = torch.cat([patches, x], dim=1), torch.cat([seen, mask], dim=1)  # (B, S, ...)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            hidden, kv = gemma(self.language_model, x, positions, mask[:, None], output=read)
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) if read else x[:, 0, :0]
        return Prefix(kv.bfloat16() if self.half else kv, mask, pooled.float(), inputs["state"])

    def velocity(self, prefix: Prefix, x: torch.Tensor, tau: torch.Tensor):
        """Velocity and the expert's output features, (N, H, ...), at x (N, H, action_dim) and tau (N,).

        N may be a multiple of the B rows of the prefix: then N / B neighbours share a row, which is not
        copied, and do not see each other.
        """
        B, (N, H, _) = len(prefix.mask), x.shape
        time = time_embedding(1 - tau.double(), self.config.expert_width).to(x.dtype)  # (N, W), their clock
        tokens, condition = self.action_in_proj(x), None  # (N, H, W)
        if self.pi05:
            condition = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(time)))).view(B, N // B, -1)
        else:
            tokens = torch.cat([tokens, time[:, None].expand(-1, H, -1)], dim=-1)
            tokens = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(tokens)))
            state = self.state_proj(prefix.state).repeat_interleave(N // B, dim=0)
            tokens = torch.cat([state[:, None], tokens], dim=1)  # (N, 1 + H, W)
        T = tokens.shape[1]
        block = torch.ones(T, T, device=x.device)
        block[: T - H, T - H :] = 0  # the state does not see the actions
        block = torch.block_diag(*[block] * (N // B)).bool().expand(B, -1, -1)  # (B, N / B * T, N / B * T)
        mask = torch.cat([prefix.mask[:, None].expand(-1, block.shape[1], -1), block], dim=2)
        positions = prefix.mask.sum(1, keepdim=True) + torch.arange(T, device=x.device).repeat(N // B)
        suffix = tokens.view(B, N // B * T, -1)
        half = prefix.kv.dtype == torch.bfloat16  # then the expert computes in it too, from fp32 weights
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            features, _ = gemma(self.expert, suffix, positions, mask, prefix.kv, condition=condition)
        features = features.to(x.dtype).view(N, T, -1)[:, T - H :]
        return -self.action_out_proj(features), features  # and the checkpoints' sign

    def take(self, tensors, told):
        """Of a checkpoint's tensors, under our names, those that are this policy's."""
        return tensors

    def files(self):
        """What save_policy writes, by name."""
        tensors = {
            layouts.their_key(key): value.cpu().contiguous() for key, value in self.state_dict().items()
        }
        return {
            "config.json": json.dumps(dataclasses.asdict(self.config), indent=1).encode(),
            "norm_stats.json": json.dumps({"norm_stats": self.stats}, indent=1).encode(),
            "model.safetensors": tensors,
        }


# ------------------------------------------------------------------------------------------------------ files


def read_config(tensors, told):
    """Sizes from the tensors; what they do not tell, and only that, from anyone's config.json."""

    def size(key, axis=0):
        return tensors[key].shape[axis]

    def depth(layers):
        return len({key.removeprefix(layers).split(".")[0] for key in tensors if key.startswith(layers)})

    patch, language = "vision_tower.embeddings.patch_embedding.weight", "language_model.layers.0."
    patches = size("vision_tower.embeddings.position_embedding.weight")
    head_dim = size(language + "self_attn.k_proj.weight")  # there is one key-value head
    variant = "pi05" if "time_mlp_in.weight" in tensors else "pi0"
    sizes = dict(
        variant=variant, patch_size=size(patch, -1), image_size=size(patch, -1) * math.isqrt(patches),
        vision_width=size(patch), vision_mlp=size("vision_tower.encoder.layers.0.mlp.fc1.weight"),
        vision_depth=depth("vision_tower.encoder.layers."), width=size("multi_modal_projector.weight"),
        mlp=size(language + "mlp.gate_proj.weight"), depth=depth("language_model.layers."),
        heads=size(language + "self_attn.q_proj.weight") // head_dim, head_dim=head_dim,
        vocab_size=size("language_model.embed_tokens.weight"), expert_width=size("action_in_proj.weight"),
        expert_mlp=size("expert.layers.0.mlp.gate_proj.weight"), action_dim=size("action_in_proj.weight", 1),
        state_dim=size("state_proj.weight" if variant == "pi0" else "action_in_proj.weight", 1),
    )  # fmt: skip  # sizes in rows
    usual = PiConfig() if variant == "pi0" else PiConfig(horizon=10, max_token_len=200)
    rest = {
        "horizon": told.get("chunk_size", told.get("action_horizon", usual.horizon)),
        "max_token_len": told.get("tokenizer_max_length", usual.max_token_len),
        "state_in_prompt": told.get("type") == "pi05",  # lerobot's pi0.5
    }
    if "vision_heads" not in told and sizes["vision_width"] != usual.vision_width:
        raise ValueError("has no config.json with vision_heads, which cannot be seen in the weights")
    return layouts.make_config(PiConfig, tensors, sizes, rest, told if "vision_heads" in told else {})


def word_tokenizer(sentences):
    """The tokenizer.json of a small vocabulary: a number for each of their words; other words are spelled."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    letters = [chr(i) for i in range(33, 127) if not chr(i).isupper()]
    words = {word for sentence in sentences for word in re.findall(r"\w+", sentence.lower())} - {*letters}
    pieces = ["<pad>", "<unk>", "<bos>", "\n", *letters, *(f"##{x}" for x in letters), *sorted(words)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    spaces, punctuation = pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([spaces, punctuation])
    return tokenizer.to_str()


def new_policy(name: str, **sizes) -> Policy:
    """One of TINY_POLICIES before its pre-training, with some sizes of another number."""
    import gr00t_models

    family = {"tiny": sys.modules[__name__], "tiny-gr00t": gr00t_models}[name]
    return family.Policy(dataclasses.replace(family.TINY, **sizes))


def load_policy(path_or_name: str | os.PathLike, device="cpu") -> Policy:
    """A folder of `save_policy`, openpi, lerobot, transformers or RLinf; a hub id; "tiny" or "tiny-gr00t"."""
    folder = CHECKPOINTS / path_or_name if path_or_name in TINY_POLICIES else Path(path_or_name)
    folder = folder if str(path_or_name) and os.path.isdir(folder) else layouts.download(str(path_or_name))
    import gr00t_models  # which begins with what is above

    family, names = sys.modules[__name__], layouts  # who knows the networks, and the names in the files
    try:
        theirs, file = layouts.read_tensors(folder), folder / "config.json"
        told = layouts.read_json(file) if file.is_file() else {}
        if any(gr00t_models.MINE in key for key in theirs):
            family = names = gr00t_models
        tensors = layouts.rename(theirs, names.our_key)
        config = family.read_config(tensors, told)
        stats = layouts.check_stats(names.read_stats(folder, theirs), config, names.STATS)
        with layouts.parameters_on_meta():
            policy = family.Policy(config, stats)
        tensors = policy.take(tensors, told)
        ours, used = policy.state_dict(), {key: names.our_key(key) for key in theirs}
        unused = names.UNUSED if config.critic else names.UNUSED + r"|^value_head\."
        used = {key: mine for key, mine in used.items() if not re.search(unused, mine)}
        problems = [f"missing {names.their_key(key)}" for key in ours if key not in tensors]
        problems += [f"unexpected {key}" for key, mine in used.items() if mine not in ours]
        shapes = [(k, tuple(tensors[k].shape), tuple(x.shape)) for k, x in ours.items() if k in tensors]
        problems += [
            f"{names.their_key(k)} is {has} instead of {own}" for k, has, own in shapes if has != own
        ]
        if problems:
            raise ValueError(f"is of another architecture: {layouts.some(problems, '; ')}")
        broken = [key for key in used if not layouts.is_sound(theirs[key])]
        if broken:
            raise ValueError(f"is broken: NaN, infinity or numbers beyond 1e6 in {layouts.some(broken)}")
        if (folder / "tokenizer.json").is_file():
            policy.tokenizer_json = layouts.read_tokenizer(folder / "tokenizer.json", config.vocab_size)
    except Exception as error:  # whatever there is in these files
        layouts.refuse(path_or_name, error, names)
    # what is trained in fp32; what is frozen all in the dtype of its projections, bf16 stays bf16
    theirs.clear()  # from here on a tensor goes as its copy comes
    frozen = tensors["language_model.layers.0.self_attn.q_proj.weight"].dtype
    frozen = torch.float32 if frozen == torch.float64 else frozen
    for key, parameter in list(policy.named_parameters()):
        module, _, name = key.rpartition(".")
        tensor = tensors.pop(key).to(torch.float32 if parameter.requires_grad else frozen)
        setattr(policy.get_submodule(module), name, nn.Parameter(tensor, parameter.requires_grad))
    policy.folder = folder  # with the rest of what was saved
    return policy.to(device).eval()
