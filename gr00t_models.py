"""GR00T N1.5 as in its public checkpoints: SigLIP + Qwen3 (the VLM), and a diffusion transformer, the DiT.

The interface is that of pi_models.py, and `load_policy` there finds this family by itself:

    inputs = policy.preprocess(obs)                        # simulator observation -> tensors
    prefix = policy.encode(inputs)                         # vision + language, once per observation: features
    velocity, features = policy.velocity(prefix, x, tau)   # one denoise step of the DiT
    actions = policy.postprocess(x, obs)                   # model actions -> simulator actions

The VLM's output, after a few blocks of self-attention that are trained, is the context of the DiT. The DiT
reads a suffix: the state, some learned tokens and the noisy actions. Its blocks look at the context and the
suffix in turn (cross- and self-attention), and the time steers the scale and shift of their norms.

The layers that read a state, read actions or write them are there 32 times in a file, once for each robot. A
policy is of one robot: it has these layers once (9.9 of 315 million numbers) and puts them back when saved.

The clock of the checkpoints is the paper's: tau = 0 (noise) -> 1 (action), velocity = action - noise.
Dropout, which SFT had, is left out: the network that rates an action must be the one that took it.
"""

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import layouts
import pi_models


@dataclass
class GrootConfig:
    """Sizes; the defaults are those of the public GR00T N1.5."""

    variant: str = "gr00t"
    image_size: int = 224
    patch_size: int = 14
    vision_width: int = 1152
    vision_mlp: int = 4304
    vision_depth: int = 27
    vision_heads: int = 16
    width: int = 2048
    mlp: int = 6144
    depth: int = 12
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151680
    context_depth: int = 4  # blocks between the VLM and the DiT
    context_heads: int = 32
    dit_width: int = 1536
    dit_depth: int = 16
    dit_heads: int = 32
    expert_width: int = 1024  # of the DiT's output, which the critic and the noise head read
    future_tokens: int = 32
    positions: int = 1024  # of which the horizon uses the first
    robots: int = 32  # in the file
    robot: int = 31  # "new_embodiment", as LIBERO's are; a GR1 is 24, RLinf's WidowX is 30
    action_dim: int = 32  # actions and state are padded to these
    state_dim: int = 64
    horizon: int = 16
    crop: float = 0.95  # of a picture's sides; the middle is what the network sees
    mean_std_actions: int = 0  # so many are scaled by mean, std and not min, max: 6 in NVIDIA's LIBERO-Goal
    unmasked_padding: int = 0  # RLinf pads to 570 tokens and lets the head see them; 0: nobody sees padding
    tokenizer: str = "qwen3"  # or "words": the small one of checkpoints/tiny-gr00t
    image_token: int = 151669  # where a patch goes; the next two begin and end a picture
    critic: str = ""  # "expert", "vlm", or none yet
    critic_layers: int = 4
    noise_std_min: float = 0.0  # bounds of the noise head; 0: none yet
    noise_std_max: float = 0.0
    lora_rank: int = 0  # of the adapters in the VLM; 0: none yet
    lora_alpha: int = 0


# The laptop's GR00T: the same classes, small numbers. A picture is 16 patches and a word is a token.
TINY = GrootConfig(
    image_size=32, patch_size=8, vision_width=96, vision_mlp=192, vision_depth=4, vision_heads=4,
    width=64, mlp=128, depth=4, heads=4, kv_heads=2, head_dim=32, vocab_size=232, context_depth=1,
    context_heads=4, dit_width=64, dit_depth=4, dit_heads=4, expert_width=64, future_tokens=4, positions=8,
    robots=1, robot=0, action_dim=4, state_dim=4, horizon=5, crop=1.0, mean_std_actions=2, tokenizer="words",
    image_token=229,
)  # fmt: skip  # sizes in rows


class Prefix(NamedTuple):
    """What the action head and the critics need of an observation, computed once; rows can be indexed."""

    features: torch.Tensor  # (B, S, width): the VLM's output
    mask: torch.Tensor  # (B, S): True where the token is real
    state: torch.Tensor  # (B, state_dim): normalised proprioception

    def __getitem__(self, rows):
        return Prefix(*(field[rows] for field in tuple(self)))

    @property
    def pooled(self):
        """(B, width): masked mean of the features, for V_vlm."""
        weight = self.mask[..., None] / self.mask.sum(1)[:, None, None]
        return (self.features * weight).sum(1)

    read = property(lambda self: [self.pooled])  # the same of what the DiT sees


# --------------------------------------------------------------------------------------------------- networks


def attention(q, k, v, heads, mask):
    """q (N, T, W), k and v (B, S, W), mask (B, S) or None: N / B neighbours look at the same keys."""
    (B, _, W), shape = k.shape, q.shape
    q, k, v = (x.reshape(B, -1, heads, W // heads).transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(shape)


def mlp(in_dim, hidden, out_dim, activation):
    return nn.Sequential(nn.Linear(in_dim, hidden), activation, nn.Linear(hidden, out_dim))


class Block(nn.Module):
    """Attention and MLP, normed before; in the DiT scale and shift of the first norm depend on the time."""

    def __init__(self, width, heads, context_width=None, timed=False):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=not timed)
        self.modulation = nn.Linear(width, 2 * width) if timed else None
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(context_width or width, width)
        self.to_v = nn.Linear(context_width or width, width)
        self.to_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=not timed)
        self.mlp = mlp(width, 4 * width, width, nn.GELU(approximate="tanh"))

    def forward(self, x, mask=None, kv=None, time=None):
        """x (N, T, W) looks at keys and values kv, or at itself; mask of real keys; time (N, W)."""
        h = self.norm1(x)
        if time is not None:
            scale, shift = self.modulation(F.silu(time))[:, None].chunk(2, dim=-1)
            h = h * (1 + scale) + shift
        k, v = kv or (self.to_k(h), self.to_v(h))
        x = x + self.to_out(attention(self.to_q(h), k, v, self.heads, mask))
        return x + self.mlp(self.norm2(x))


def waves(bucket, count, last):
    """Angles bucket * 10000^(-i / last), i < count, (B, count). In fp64: up to 999 rad."""
    i = torch.arange(count, dtype=torch.float64, device=bucket.device)
    return bucket.double()[:, None] * 10000 ** (-i / last)


class Uncopied(dict):
    """What the copies of a policy share with it: nobody changes it, and it takes 1.3 GB."""

    def __deepcopy__(self, memo):
        return self


class Policy(pi_models.Policy):
    """GR00T N1.5. The VLM is frozen unless `train` says otherwise, the action head learns; else like pi0."""

    def __init__(self, config: GrootConfig, stats: dict | None = None):
        # here, not at the top: importing them takes seconds, which --help should not
        from transformers import Qwen3Config, Qwen3Model, SiglipVisionConfig, SiglipVisionModel

        nn.Module.__init__(self)
        c = self.config = config
        self.stats = stats  # {"state" | "actions": {"min", "max": [real dimensions]}, "metadata": their file}
        self.told, self.robots = {}, Uncopied()  # config.json, all robots' layers, as they lie in the files
        self.token_len = 0  # of words; pictures come on top
        self._tokens, self._context = {}, (None, 0, False, None)
        self.tokenizer_json = self._tokenizer = None  # Qwen3's, as text and ready for use

        self.vision_tower = SiglipVisionModel(SiglipVisionConfig(
            hidden_size=c.vision_width, intermediate_size=c.vision_mlp, num_hidden_layers=c.vision_depth,
            num_attention_heads=c.vision_heads, image_size=c.image_size, patch_size=c.patch_size,
            vision_use_head=False,
        ))  # fmt: skip  # sizes in rows
        self.multi_modal_projector = nn.Linear(c.vision_width, c.width)
        self.language_model = Qwen3Model(Qwen3Config(
            hidden_size=c.width, intermediate_size=c.mlp, num_hidden_layers=c.depth, vocab_size=c.vocab_size,
            num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim,
            rope_theta=1e6, initializer_range=c.width**-0.5, use_cache=False,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        ))  # fmt: skip  # sizes in rows
        self.context_norm = nn.LayerNorm(c.width)
        self.context_blocks = nn.ModuleList(Block(c.width, c.context_heads) for _ in range(c.context_depth))
        self.state_encoder = mlp(c.state_dim, c.expert_width, c.dit_width, nn.ReLU())
        self.future_tokens = nn.Embedding(c.future_tokens, c.dit_width)
        self.action_in_proj = nn.Linear(c.action_dim, c.dit_width)
        self.action_time_mlp_in = nn.Linear(2 * c.dit_width, c.dit_width)
        self.action_time_mlp_out = nn.Linear(c.dit_width, c.dit_width)
        self.position_embedding = nn.Embedding(c.positions, c.dit_width)
        for table in (self.future_tokens, self.position_embedding):
            nn.init.normal_(table.weight, std=0.02)
        self.time_mlp = mlp(256, c.dit_width, c.dit_width, nn.SiLU())
        looks = [c.width if i % 2 == 0 else None for i in range(c.dit_depth)]  # at the context, at themselves
        self.dit = nn.ModuleList(Block(c.dit_width, c.dit_heads, width, timed=True) for width in looks)
        self.out_modulation = nn.Linear(c.dit_width, 2 * c.dit_width)
        self.out_proj = nn.Linear(c.dit_width, c.expert_width)
        self.action_decoder = mlp(c.expert_width, c.expert_width, c.action_dim, nn.ReLU())
        self._add_heads()

    # -- observation -> tensors

    def fit_prompts(self, prompts):
        """Pad to the longest of these, not to that of a batch, so that all have one shape."""
        self.token_len = max(len(self.tokenize(prompt)) for prompt in prompts)

    def tokenize(self, prompt, cameras=0):
        """The chat of Qwen: the user sends pictures, each with a number, and the instruction as it is."""
        begin, end = self.config.image_token + 1, self.config.image_token + 2
        patches = (self.config.image_size // self.config.patch_size) ** 2
        picture = [begin, *[self.config.image_token] * patches, end]

        def words(text):
            return self.tokenizer().encode(text, add_special_tokens=False).ids

        if self.config.tokenizer == "words":  # nothing else: its words are few
            return [*picture * cameras, *words(prompt), *words("\n")]
        start, stop = 151644, 151645  # <|im_start|>, <|im_end|>
        pictures = (words(f"<image {i + 1}>") + picture for i in range(cameras))
        system = [start, *words("system\nYou are a helpful assistant."), stop, *words("\n")]
        user = [start, *words("user\n"), *sum(pictures, []), *words(prompt), stop, *words("\n")]
        return [*system, *user, start, *words("assistant\n")]

    def preprocess(self, obs: dict) -> dict[str, torch.Tensor]:
        """{"images" (B, cams, H, W, 3) uint8, "state" (B, S), "prompt" [B]} -> normalised tensors.

        "image_mask" (B, cams) bool may be there too: a missing camera is False, and not in the prompt.
        """
        images = torch.from_numpy(np.ascontiguousarray(obs["images"])).to(self.device)  # maybe of no camera
        images = images.permute(0, 1, 4, 2, 3).float()  # (B, cams, 3, H, W)
        size, crop, cameras = self.config.image_size, self.config.crop, images.shape[1]
        h, w = (int(crop * n) for n in images.shape[-2:])
        top, left = (round((n - m) / 2) for n, m in zip(images.shape[-2:], (h, w)))
        images = images[..., top : top + h, left : left + w]
        if cameras and images.shape[-2:] != (size, size):  # stretched, and to whole numbers as in SFT
            flat = F.interpolate(images.flatten(0, 1) / 255, (size, size), mode="bilinear", antialias=True)
            images = (flat * 255).trunc().unflatten(0, (-1, cameras))
        images = images / 127.5 - 1
        there = torch.as_tensor(obs.get("image_mask", np.ones(images.shape[:2], bool)), device=self.device)
        rows = [self._tokens_of(prompt, n) for prompt, n in zip(obs["prompt"], there.sum(1).tolist())]
        fitted = self.token_len + len(self._tokens_of("", cameras)) - len(self._tokens_of("", 0))
        length = self.config.unmasked_padding or max(fitted, *map(len, rows))
        tokens = [F.pad(row, (0, length - len(row)), value=-1) for row in rows]  # -1: padding, at the right
        tokens = torch.stack(tokens).to(self.device)
        state = pi_models.finite_state(obs, self.device)
        return {
            "images": images,
            "image_mask": there,
            "tokens": tokens.clamp(min=0),
            "token_mask": tokens >= 0,
            "state": F.pad(self._normalize(state, "state"), (0, self.config.state_dim - state.shape[1])),
        }

    def _tokens_of(self, prompt, cameras):
        if (prompt, cameras) not in self._tokens:
            self._tokens[prompt, cameras] = torch.tensor(self.tokenize(prompt, cameras))
        return self._tokens[prompt, cameras]

    def _scale(self, key):
        """What is -1 and what is 1 to the network, as NumPy."""
        low, high = (np.array(self.stats[key][s], np.float32) for s in ("min", "max"))
        n = self.config.mean_std_actions if key == "actions" else 0
        if n:
            mean, std = (np.array(self.stats[key][s], np.float32)[:n] for s in ("mean", "std"))
            low[:n], high[:n] = mean - std, mean + std
        metadata = [*self.stats.get("metadata", {}).values()]
        if key == "actions" and metadata and [*metadata[0]["statistics"]["action"]][-1] == "gripper":
            low[-1], high[-1] = 1 - 2 * low[-1], 1 - 2 * high[-1]  # in the data 1 is open, in simulators -1
        return low, high

    def _normalize(self, x, key):
        low, high = map(x.new_tensor, self._scale(key))
        return torch.where(high == low, 0, 2 * (x - low) / (high - low) - 1)  # not clipped

    def postprocess(self, x: torch.Tensor, obs: dict) -> np.ndarray:
        """Model actions (B, H, action_dim) -> simulator actions (B, H, env_action_dim), NumPy."""
        low, high = self._scale("actions")
        return (x[..., : len(low)].detach().cpu().numpy() + 1) / 2 * (high - low) + low

    # -- forward

    def encode(self, inputs: dict[str, torch.Tensor], pool=False) -> Prefix:
        """Vision and language, once per observation; what has been encoded is given back."""
        if "features" in inputs:
            return Prefix(**inputs)
        images = inputs["images"][inputs["image_mask"]]  # (M, 3, size, size): all there are
        tokens, mask, look = inputs["tokens"], inputs["token_mask"], None
        if self.config.unmasked_padding:  # RLinf's padding looks at nothing and is seen by the head
            look = mask[:, None, :, None] & torch.ones_like(mask[0]).expand(mask.shape[1], -1).tril()
            mask = torch.ones_like(mask)
        with torch.autocast(mask.device.type, torch.bfloat16, enabled=self.half):
            x = self.language_model.embed_tokens(tokens)  # (B, S, width)
            if len(images):
                x[tokens == self.config.image_token] = self.embed_images(images[None])[0].to(x.dtype)
            # causal, and padding is at the right, where no real token looks: there is no need of a mask
            features = self.language_model(inputs_embeds=x, attention_mask=look).last_hidden_state
        return Prefix(features.bfloat16() if self.half else features, mask, inputs["state"])

    def context(self, prefix):
        """For each block of the DiT, the keys and values of the prefix that it looks at, (B, S, W), or None.

        The denoise steps of a chunk share them, so the latest are kept: until there is another prefix, other
        weights, or a gradient to flow through them.
        """
        graph, looking = torch.is_grad_enabled(), [layer for b in self.dit[::2] for layer in (b.to_k, b.to_v)]
        layers = [self.context_norm, self.context_blocks, *looking]
        version = sum(p._version for layer in layers for p in layer.parameters())
        features, known, had_graph, kv = self._context
        if features is not prefix.features or known != version or (graph and not had_graph):
            h = self.context_norm(prefix.features)
            for block in self.context_blocks:
                h = block(h, prefix.mask)
            kv = [None if i % 2 else (b.to_k(h), b.to_v(h)) for i, b in enumerate(self.dit)]
            self._context = prefix.features, version, graph, kv
        return kv

    def velocity(self, prefix: Prefix, x: torch.Tensor, tau: torch.Tensor):
        """Velocity and the DiT's output features, (N, H, ...), at x (N, H, action_dim) and tau (N,).

        N may be a multiple of the B rows of the prefix: then N / B neighbours share a row, which is not
        copied, and do not see each other.
        """
        B, (N, H, _), W = len(prefix.mask), x.shape, self.config.dit_width
        bucket = (1000 * tau.double() + 1e-3).floor().clamp(0, 999)  # whole; tau may be rounded down
        half = prefix.features.dtype == torch.bfloat16  # then the head computes in it too, from fp32 weights
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            angle = waves(bucket, W // 2, W // 2)
            time = torch.cat([angle.sin(), angle.cos()], dim=1).to(x.dtype)  # (N, W)
            tokens = torch.cat([self.action_in_proj(x), time[:, None].expand(-1, H, -1)], dim=-1)
            tokens = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(tokens)))
            tokens = tokens + self.position_embedding.weight[:H]  # (N, H, W)
            state = self.state_encoder(prefix.state).repeat_interleave(N // B, dim=0)
            future = self.future_tokens.weight.expand(N, -1, -1)
            tokens = torch.cat([state[:, None], future, tokens], dim=1)  # (N, T, W), the suffix
            angle = waves(bucket, 128, 127)
            time = self.time_mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(x.dtype))  # (N, W)
            for block, kv in zip(self.dit, self.context(prefix)):
                tokens = block(tokens, prefix.mask if kv else None, kv, time)
            shift, scale = self.out_modulation(F.silu(time))[:, None].chunk(2, dim=-1)  # not scale, shift
            tokens = F.layer_norm(tokens[:, -H:], (W,), eps=1e-6) * (1 + scale) + shift
            features = self.out_proj(tokens).float()
        return self.action_decoder(features), features

    # -- files

    def take(self, tensors, told):
        """Of a checkpoint's tensors, under our names, those that are this policy's: one robot's of all."""
        c, self.told = self.config, told
        if not 0 <= c.robot < c.robots:
            raise ValueError(f"is of {c.robots} robots, counted from 0, and has no robot {c.robot}")
        self.robots = Uncopied((key, tensor) for key, tensor in tensors.items() if OF_ROBOTS.match(key))
        one = {key: tensor[c.robot].t() for key, tensor in self.robots.items()}  # theirs are (in, out)
        return tensors | {key: x.clone(memory_format=torch.contiguous_format) for key, x in one.items()}

    def files(self):
        """What save_policy writes, by name: one robot's layers among all, where others are known."""
        tensors, c = {key: value.cpu() for key, value in self.state_dict().items()}, self.config
        for key in filter(OF_ROBOTS.match, tensors):
            mine = tensors[key].t()
            every = self.robots.get(key, mine)
            every = every if every.shape[1:] == mine.shape else mine  # none, or of other sizes
            tensors[key] = every.to(mine.dtype).expand(c.robots, *mine.shape).clone()
            tensors[key][c.robot] = mine
        tensors = {their_key(key): tensor.contiguous() for key, tensor in tensors.items()}
        told = {"model_type": "gr00t_n1_5"} | self.told | {"config": dataclasses.asdict(c)}
        parts = {"state": {"state": self.stats["state"]}, "action": {"actions": self.stats["actions"]}}
        metadata = self.stats.get("metadata", {"new_embodiment": {"statistics": parts}})
        return {
            "config.json": json.dumps(told, indent=1).encode(),
            STATS: json.dumps(metadata, indent=1).encode(),
            "model.safetensors": tensors,
        }


# ------------------------------------------------------------------------------------------------------ files

# ours -> NVIDIA's: how keys begin, and what they are inside of a block
PLACES = {
    "vision_tower.": "backbone.eagle_model.vision_model.vision_model.",
    "multi_modal_projector.": "backbone.eagle_model.mlp1.0.",
    "language_model.": "backbone.eagle_model.language_model.model.",
    "context_norm.": "action_head.vlln.",
    "context_blocks.": "action_head.vl_self_attention.transformer_blocks.",
    "dit.": "action_head.model.transformer_blocks.",
    "time_mlp.0.": "action_head.model.timestep_encoder.timestep_embedder.linear_1.",
    "time_mlp.2.": "action_head.model.timestep_encoder.timestep_embedder.linear_2.",
    "out_modulation.": "action_head.model.proj_out_1.",
    "out_proj.": "action_head.model.proj_out_2.",
    "state_encoder.0.": "action_head.state_encoder.layer1.",
    "state_encoder.2.": "action_head.state_encoder.layer2.",
    "action_in_proj.": "action_head.action_encoder.W1.",
    "action_time_mlp_in.": "action_head.action_encoder.W2.",
    "action_time_mlp_out.": "action_head.action_encoder.W3.",
    "action_decoder.0.": "action_head.action_decoder.layer1.",
    "action_decoder.2.": "action_head.action_decoder.layer2.",
    "": "action_head.",
}
INSIDE = {
    ".modulation.": ".norm1.linear.",
    ".norm2.": ".norm3.",
    ".to_out.": ".attn1.to_out.0.",
    ".mlp.0.": ".ff.net.0.proj.",
    ".mlp.2.": ".ff.net.2.",
    ".to_": ".attn1.to_",
}
RENAMED = [  # anyone's -> ours, after that
    (r"^backbone\.eagle_model\.language_model\.lm_head\.", "language_model.embed_tokens."),  # tied
    (r"^reinflow_explore_noise_net\.", "noise_head."),  # RLinf's
    (r"^noise_head\.mlp_logvar\.moduleList\.(\d)\.linear_1\.", lambda m: f"noise_head.mlp.{2 * int(m[1])}."),
    (r"\.W$", ".weight"),
    (r"\.b$", ".bias"),
]
OF_ROBOTS = re.compile(r"state_encoder|action_in_proj|action_time_mlp|action_decoder")
UNUSED = r"^vision_tower\.head\.|logvar_(min|max)$"  # by the networks
MINE, NEITHER, STATS = "action_head.", "no GR00T N1.5", "experiment_cfg/metadata.json"


def renamed(key, places, inside):
    place = next((p for p in places if key.startswith(p)), "")
    rest = key[len(place) :]
    part = next((p for p in inside if p in rest and rest[0].isdigit()), "")  # of a block, after its number
    return places.get(place, "") + rest.replace(part, inside.get(part, ""), 1)


def their_key(key):
    theirs = renamed(key, PLACES, INSIDE)
    if OF_ROBOTS.match(key):
        theirs = theirs.replace(".weight", ".W").replace(".bias", ".b")
    return theirs


def our_key(key):
    key = re.sub(r"\b(_orig_mod|module)\.", "", key)  # torch.compile's and DDP's
    key = renamed(key, *({theirs: ours for ours, theirs in table.items()} for table in (PLACES, INSIDE)))
    for pattern, ours in RENAMED:
        key = re.sub(pattern, ours, key)
    return key


def read_stats(folder, tensors):
    """Statistics of state and actions, whose parts (x, y, .., gripper) are joined, and the file itself."""
    file = folder / STATS
    if not file.is_file():
        return {}
    metadata = layouts.read_json(file)
    if len(metadata) != 1:
        raise ValueError(f"has statistics of {len(metadata)} robots ({', '.join(metadata)}): keep one")
    (robot,) = metadata.values()
    stats = {"metadata": metadata}
    for ours, theirs in (("state", "state"), ("actions", "action")):
        parts = robot.get("statistics", {}).get(theirs, {}).values()
        names = [name for name in ("min", "max", "mean", "std") if all(name in part for part in parts)]
        stats[ours] = {name: [x for part in parts for x in part[name]] for name in names if parts}
    return stats


def read_config(tensors, told):
    """Sizes from the tensors; what they do not tell, and only that, from anyone's config.json."""

    def size(key, axis=0):
        return tensors[key].shape[axis]

    def depth(layers):
        return len({key.removeprefix(layers).split(".")[0] for key in tensors if key.startswith(layers)})

    patch, attention = "vision_tower.embeddings.patch_embedding.weight", "language_model.layers.0.self_attn."
    patches = size("vision_tower.embeddings.position_embedding.weight")
    head_dim = size(attention + "q_norm.weight")
    sizes = dict(
        variant="gr00t", patch_size=size(patch, -1), image_size=size(patch, -1) * math.isqrt(patches),
        vision_width=size(patch), vision_mlp=size("vision_tower.encoder.layers.0.mlp.fc1.weight"),
        vision_depth=depth("vision_tower.encoder.layers."), width=size("multi_modal_projector.weight"),
        mlp=size("language_model.layers.0.mlp.gate_proj.weight"), depth=depth("language_model.layers."),
        heads=size(attention + "q_proj.weight") // head_dim, head_dim=head_dim,
        kv_heads=size(attention + "k_proj.weight") // head_dim,
        vocab_size=size("language_model.embed_tokens.weight"), context_depth=depth("context_blocks."),
        dit_width=size("out_proj.weight", 1), dit_depth=depth("dit."), expert_width=size("out_proj.weight"),
        future_tokens=size("future_tokens.weight"), positions=size("position_embedding.weight"),
        robots=size("action_in_proj.weight"), action_dim=size("action_in_proj.weight", 1),
        state_dim=size("state_encoder.0.weight", 1),
    )  # fmt: skip  # sizes in rows
    usual, head, written = GrootConfig(), told.get("action_head_cfg", {}), told.get("config", {})
    dit, context = (head.get(part, {}) for part in ("diffusion_model_cfg", "vl_self_attention_cfg"))
    rest = {
        "horizon": head.get("action_horizon", usual.horizon),
        "dit_heads": dit.get("num_attention_heads", usual.dit_heads),
        "context_heads": context.get("num_attention_heads", usual.context_heads),
    }
    if "vision_heads" not in written and sizes["vision_width"] != usual.vision_width:
        raise ValueError("has no config.json with vision_heads, which cannot be seen in the weights")
    return layouts.make_config(GrootConfig, tensors, sizes, rest, written)
