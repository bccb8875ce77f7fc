"""pi0 and pi0.5 against openpi's reference tensors, the cached pass against a joint one, checkpoint files.

As in test_math.py, a `check_*` is also run on broken models, which it must reject: each of `MUTANTS` patches
one decision of pi_models.py, and `CAUGHT` says which check sees which.
"""

import copy
import dataclasses
import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import STATS, encode, make_policy, observe, wrapped
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.gemma.modeling_gemma import (
    GemmaTextScaledWordEmbedding,
    apply_rotary_pos_emb,
)

import layouts
import pi_models
from pi_models import TINY, AdaRMSNorm, PiConfig, Policy, load_policy, save_policy

GOLDEN = Path(__file__).parent / "golden"


@functools.cache
def reference(variant):
    """openpi's weights in our Policy, its inputs, its outputs and its gradients."""
    files = (GOLDEN / f"openpi_{variant}.{name}.safetensors" for name in ("io", "weights", "grads"))
    io, weights, grads = map(load_file, files)
    sizes = json.loads((GOLDEN / f"openpi_{variant}.json").read_text())
    vision, text, expert = (sizes[key] for key in ("vision", "text", "expert"))
    policy = Policy(
        PiConfig(
            variant=variant,
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            vision_width=vision["hidden_size"],
            vision_mlp=vision["intermediate_size"],
            vision_depth=vision["num_hidden_layers"],
            vision_heads=vision["num_attention_heads"],
            width=text["width"],
            mlp=text["mlp_dim"],
            depth=text["depth"],
            heads=text["num_heads"],
            head_dim=text["head_dim"],
            vocab_size=sizes["vocab_size"],
            expert_width=expert["width"],
            expert_mlp=expert["mlp_dim"],
            horizon=sizes["action_horizon"],
            max_token_len=sizes["max_token_len"],
        ),
        STATS,
    ).eval()
    keys = {key: layouts.their_key(key) for key in policy.state_dict()}
    policy.load_state_dict({key: weights[theirs] for key, theirs in keys.items()})
    policy.requires_grad_(True)
    inputs = {
        "images": io["images"].transpose(0, 1),  # (B, cams, 3, H, W)
        "image_mask": io["image_masks"].T,
        "tokens": io["tokens"],
        "token_mask": io["token_masks"],
        "state": io["state"],
    }
    return SimpleNamespace(policy=policy, inputs=inputs, io=io, grads=grads, keys=keys, weights=weights)


def close(a, b, atol, rtol=0.0):
    assert torch.allclose(a, b, atol=atol, rtol=rtol), f"off by {(a - b).abs().max().item():.1e}"


# --- against openpi: t = 1 - tau, and the velocity has the other sign ---


@torch.no_grad()
def check_velocity(openpi):
    prefix = openpi.policy.encode(openpi.inputs)
    for i, t in enumerate(openpi.io["timesteps"].double()):
        velocity, features = openpi.policy.velocity(prefix, openpi.io["noise"], (1 - t).expand(3))
        close(velocity, -openpi.io["velocity"][i], 2e-5)
        close(features, openpi.io["expert_hidden"][i], 2e-5)


@torch.no_grad()
def check_chain(openpi):
    """Four steps; ten are compared more loosely, since openpi adds up its clock in fp32."""
    prefix, x = openpi.policy.encode(openpi.inputs), openpi.io["noise"]
    for k in range(10):
        x = x + openpi.policy.velocity(prefix, x, torch.full((3,), k / 10))[0] / 10
    close(x, openpi.io["sample_10step"], 5e-4)
    x = openpi.io["noise"]
    for k in range(4):
        close(x, openpi.io["chain"][:, k], 1e-5)
        velocity = openpi.policy.velocity(prefix, x, torch.full((3,), k / 4))[0]
        close(velocity, -openpi.io["chain_velocity"][:, k], 2e-5)
        x = x + velocity / 4
    close(x, openpi.io["sample_4step"], 1e-5)


@torch.no_grad()
def check_prefix(openpi):
    """Embeddings, mask, and the output of the VLM, of which the Prefix keeps the mean over real tokens."""
    policy = copy.copy(openpi.policy)
    policy.config = dataclasses.replace(policy.config, critic="vlm")  # else the output is not computed
    prefix, embeds = policy.encode(openpi.inputs), openpi.io["prefix_embeds"]
    patches = openpi.policy.embed_images(openpi.inputs["images"])
    close(patches, embeds[:, : patches.shape[1]], 1e-5)
    mask, hidden = openpi.io["prefix_pad_mask"].bool(), openpi.io["prefix_hidden"]
    assert torch.equal(prefix.mask, mask)
    close(prefix.pooled, torch.stack([hidden[n, mask[n]].mean(dim=0) for n in range(3)]), 1e-5)


def check_gradients(openpi):
    """The training loss of openpi's joint forward, from the action head down to SigLIP's first layer."""
    io, policy = openpi.io, openpi.policy
    t = io["train_time"][:, None, None]
    x = t * io["noise"] + (1 - t) * io["actions"]
    velocity = policy.velocity(policy.encode(openpi.inputs), x, 1 - io["train_time"].double())[0]
    error = (velocity - (io["actions"] - io["noise"])) ** 2
    close(error, io["train_mse"], 1e-4)
    policy.zero_grad()
    error.mean().backward()
    for key, parameter in policy.named_parameters():
        theirs = openpi.grads.get(openpi.keys[key])
        if theirs is not None:
            assert parameter.grad is not None, key
            assert (parameter.grad - theirs).norm() <= 1e-5 * theirs.norm(), key


# --- against a joint forward: both streams attend together in every layer, nothing is cached ---


def joint_velocity(policy, inputs, x, tau):
    """openpi's way, out of stock modules and a softmax that is written out."""
    c, (B, H, _) = policy.config, x.shape
    patches = policy.vision_tower(inputs["images"].flatten(0, 1)).last_hidden_state
    patches = policy.multi_modal_projector(patches).reshape(B, -1, c.width)
    words = policy.language_model.embed_tokens(inputs["tokens"])
    period = 4e-3 * 1000 ** torch.linspace(0, 1, c.expert_width // 2, dtype=torch.float64)
    angle = 2 * math.pi * (1 - tau.double())[:, None] / period
    time = torch.cat([angle.sin(), angle.cos()], dim=1).float()[:, None].expand(B, H, -1)
    hidden = F.silu(policy.action_time_mlp_in(torch.cat([policy.action_in_proj(x), time], dim=2)))
    suffix = [policy.state_proj(inputs["state"])[:, None], policy.action_time_mlp_out(hidden)]
    streams = [torch.cat([patches, words], dim=1), torch.cat(suffix, dim=1)]
    S = streams[0].shape[1]

    cameras = inputs["image_mask"].shape[1]
    real = [inputs["image_mask"].repeat_interleave((S - words.shape[1]) // cameras, dim=1)]
    real = torch.cat([*real, inputs["token_mask"], torch.ones(B, 1 + H, dtype=torch.bool)], dim=1)
    block = torch.tensor([0] * S + [1] + [2] * H)  # prefix, state, actions: none sees a later one
    may_look = (block[None, :] <= block[:, None]) & real[:, None]  # (B, S + 1 + H, S + 1 + H)
    cos, sin = policy.language_model.rotary_emb(streams[0], real.cumsum(1) - 1)
    for layers in zip(policy.language_model.layers, policy.expert.layers):
        q, k, v = [], [], []
        for layer, stream in zip(layers, streams):
            attn, h = layer.self_attn, layer.input_layernorm(stream)
            q.append(attn.q_proj(h).view(B, -1, c.heads, c.head_dim).transpose(1, 2))
            k.append(attn.k_proj(h)[:, None])
            v.append(attn.v_proj(h)[:, None])
        q, k, v = (torch.cat(parts, dim=2) for parts in (q, k, v))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        scores = (q @ k.mT / math.sqrt(c.head_dim)).masked_fill(~may_look[:, None], -math.inf)
        out = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, -1, c.heads * c.head_dim)
        for i, layer in enumerate(layers):
            y = streams[i] + layer.self_attn.o_proj(out[:, :S] if i == 0 else out[:, S:])
            streams[i] = y + layer.mlp(layer.post_attention_layernorm(y))
    return -policy.action_out_proj(policy.expert.norm(streams[1][:, 1:]))


def two_cameras(policy, n=4):
    """Observations with a second camera that half of them lack, prompts of different length; x and tau."""
    inputs = policy.preprocess(observe(n))
    generator = torch.Generator().manual_seed(1)
    inputs["images"] = torch.cat([inputs["images"], inputs["images"].flip(0)], dim=1)
    inputs["image_mask"] = torch.tensor([[True, i % 2 == 0] for i in range(n)])
    return inputs, torch.randn(n, 5, 4, generator=generator), torch.rand(n, generator=generator)


def check_joint(_):
    """Velocity, and gradients of everything: through the expert, and through the cache into the VLM."""
    policy = make_policy(depth=3).requires_grad_(True)
    inputs, x, tau = two_cameras(policy)
    assert len(set(inputs["token_mask"].sum(dim=1).tolist())) > 1
    results = []
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    for velocity in (
        policy.velocity(policy.encode(inputs), x, tau)[0],
        joint_velocity(policy, inputs, x, tau),
    ):
        policy.zero_grad()
        (velocity * weight).sum().backward()
        grads = {key: p.grad for key, p in policy.named_parameters() if p.grad is not None}
        results.append((velocity.detach(), grads))
    (ours, our_grads), (truth, true_grads) = results
    close(ours, truth, 1e-5)
    assert any(key.startswith("vision_tower") for key in true_grads)
    for key, truth in true_grads.items():  # the queries of the VLM's last layer reach nobody: none, or zero
        close(
            our_grads.get(key, torch.zeros(())).expand_as(truth), truth, 1e-5 * (1 + truth.abs().max().item())
        )


# --- which check catches what ---


def passes(prefix=None, suffix=None):
    """A mutant with other arguments to the pass over the prefix (no cache yet) or over the suffix."""

    def mutate(patch):
        real = pi_models.gemma

        def gemma(model, x, positions, mask, cache=None, **rest):
            change = (prefix if cache is None else suffix) or (lambda x, positions, mask, cache: {})
            given = dict(x=x, positions=positions, mask=mask, cache=cache)
            return real(model, **given | change(**given), **rest)

        patch.setattr(pi_models, "gemma", gemma)

    return mutate


def padded_length(x, positions, mask, cache):
    S = cache.shape[3]
    return {"positions": positions + S - mask[:, 0, :S].sum(dim=1, keepdim=True)}


def causal(x, positions, mask, cache):
    S, T = x.shape[1], mask.shape[2]
    return {"mask": mask & torch.ones(S, T, dtype=torch.bool).tril(T - S)}


def interleaved(x, cos, sin):
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + turned * sin


def time_in_fp32(t, dim):
    angle = t.float()[:, None] * 2 * math.pi / (4e-3 * 1000 ** torch.linspace(0, 1, dim // 2))
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def without_gradient(velocity):
    return lambda self, prefix, x, tau: velocity(self, prefix._replace(kv=prefix.kv.detach()), x, tau)


def norms(change):
    """A mutant of pi0.5's norms with other scale, shift and gate."""

    def chunk(real):
        def changed(self, chunks, dim=0):
            parts = real(self, chunks, dim=dim)
            return change(*parts) if chunks == 3 else parts

        return changed

    return wrapped(torch.Tensor, "chunk", chunk)


def embedding(change):
    return wrapped(pi_models, "time_embedding", lambda f: lambda t, dim: change(f, t, dim))


CLOCK = {
    "clock turned round": wrapped(
        Policy, "velocity", lambda f: lambda self, p, x, tau: f(self, p, x, 1 - tau)
    ),
    "wrong sign": wrapped(Policy, "velocity", lambda f: lambda *a: (-f(*a)[0], f(*a)[1])),
    "time in fp32": embedding(lambda f, t, dim: time_in_fp32(t, dim)),
    "cosines first": embedding(lambda f, t, dim: f(t, dim).roll(dim // 2, dims=1)),
    "periods of another range": embedding(lambda f, t, dim: f(t, dim, 4e-3, 1.0)),
}
PREFIX = {
    "words not scaled": wrapped(
        GemmaTextScaledWordEmbedding, "forward", lambda _: torch.nn.Embedding.forward
    ),
    "positions count the padding": passes(
        lambda positions, **_: {"positions": torch.arange(positions.shape[1]).expand_as(positions)}
    ),
    "padding is seen": passes(lambda mask, **_: {"mask": torch.ones_like(mask)}),
    "prefix is causal": passes(causal),
    "rotation of neighbouring pairs": wrapped(pi_models, "rope", lambda _: interleaved),
}
PATCHES = {"patches scaled like words": wrapped(Policy, "embed_images", lambda f: lambda *a: f(*a) * 48**0.5)}
STATE = {
    "state sees the actions": passes(suffix=lambda mask, **_: {"mask": mask[:, 1:2].expand_as(mask)}),
    "actions do not see the state": passes(
        suffix=lambda mask, **_: {
            "mask": mask & (torch.arange(mask.shape[2]) != mask.shape[2] - mask.shape[1])
        }
    ),
}
SUFFIX = {
    "suffix begins at 0": passes(suffix=lambda positions, **_: {"positions": positions - positions[:, :1]}),
    "suffix begins after the padding": passes(suffix=padded_length),
    "actions are causal": passes(suffix=causal),
    "expert sees the padding": passes(suffix=lambda mask, **_: {"mask": mask | mask[:, 1:2].logical_not()}),
    "keys of the layer before": passes(suffix=lambda cache, **_: {"cache": cache.roll(1, dims=1)}),
}
GRADIENT = {"no gradient through the cache": wrapped(Policy, "velocity", without_gradient)}
ADARMS = {
    "scale without 1": norms(lambda scale, shift, gate: (scale - 1, shift, gate)),
    "scale and shift swapped": norms(lambda scale, shift, gate: (shift, scale, gate)),
    "always open": norms(lambda scale, shift, gate: (scale, shift, torch.ones_like(gate))),
    "another condition": wrapped(AdaRMSNorm, "forward", lambda f: lambda self, x, c: f(self, x, c - 0.1)),
}
BOTH = CLOCK | PREFIX | PATCHES | SUFFIX
MUTANTS = BOTH | STATE | ADARMS | GRADIENT
CAUGHT = {}
for variant, own in (("pi0", STATE), ("pi05", ADARMS)):
    CAUGHT[variant, check_velocity] = CAUGHT[variant, check_chain] = BOTH | own
    CAUGHT[variant, check_prefix] = PREFIX | PATCHES
    CAUGHT[variant, check_gradients] = BOTH | own | GRADIENT
CAUGHT["pi0", check_joint] = BOTH | STATE | GRADIENT
del CAUGHT["pi0", check_joint]["words not scaled"]  # both would be


@pytest.mark.parametrize("variant, check", CAUGHT)
def test_real(variant, check):
    check(reference(variant))


@pytest.mark.parametrize(
    "variant, check, broken",
    [pytest.param(v, c, b, id=f"{v}-{c.__name__}-{b}") for v, c in CAUGHT for b in CAUGHT[v, c]],
)
def test_broken_is_caught(variant, check, broken, monkeypatch):
    MUTANTS[broken](monkeypatch)
    with pytest.raises(AssertionError):
        check(reference(variant))


# --- what must not matter ---


@torch.no_grad()
def test_padding_and_absent_cameras_do_not_matter():
    policy = make_policy()
    inputs, x, tau = two_cameras(policy)
    before = policy.velocity(policy.encode(inputs), x, tau)[0]

    def changed(**other):
        prefix = policy.encode(inputs | other)
        return (policy.velocity(prefix, x, tau)[0] - before).abs().amax(dim=(1, 2)) > 1e-6

    noise = inputs["images"] + torch.randn(inputs["images"].shape)
    absent = ~inputs["image_mask"][..., None, None, None]
    assert not changed(images=torch.where(absent, noise, inputs["images"])).any()
    assert not changed(tokens=torch.where(inputs["token_mask"], inputs["tokens"], 77)).any()
    assert changed(images=torch.where(absent, inputs["images"], noise)).all()
    assert changed(tokens=torch.where(inputs["token_mask"], 77, inputs["tokens"])).all()
    one = inputs | {"images": inputs["images"][:, :1], "image_mask": inputs["image_mask"][:, :1]}
    assert changed(**one).tolist() == [True, False, True, False]  # those that have a second camera


@torch.no_grad()
def test_fit_prompts():
    """Shorter padding, the same velocity; and no prompt is cut."""
    policy, obs = make_policy("vlm"), observe(20)
    x, tau = torch.randn(20, 5, 4), torch.rand(20)
    long = policy.encode(policy.preprocess(obs))
    before = policy.velocity(long, x, tau)[0]
    policy.fit_prompts(sorted(set(obs["prompt"])))
    short = policy.encode(policy.preprocess(obs))
    assert short.mask.shape[1] < long.mask.shape[1] and short.mask[:, -1].any()
    assert torch.equal(short.mask.sum(dim=1), long.mask.sum(dim=1))
    close(policy.velocity(short, x, tau)[0], before, 3e-6)
    close(short.pooled, long.pooled, 3e-6)


@torch.no_grad()
def test_output_only_for_who_reads_it():
    """Without V_vlm the last layer stops at its keys and values, which are the same."""
    policy, obs = make_policy("vlm"), observe(4)
    whole = policy.encode(policy.preprocess(obs))
    for critic in ("expert", ""):
        policy.config = dataclasses.replace(policy.config, critic=critic)
        short = policy.encode(policy.preprocess(obs))
        assert torch.equal(short.kv, whole.kv) and short.pooled.shape == (4, 0)


def test_prefix_rows():
    policy = make_policy()
    prefix = encode(policy, 6)
    rows = torch.tensor([4, 0, 4])
    for field, part in zip(prefix, prefix[rows]):
        assert torch.equal(part, torch.stack([field[4], field[0], field[4]]))


# --- observations and actions ---

SHAPES = [(48, 64), (64, 48), (128, 128), (360, 640), (49, 49), (206, 103), (20, 24), (16, 16), (7, 90)]


def picture(h, w):
    """Something smooth, an edge and a line, in colours that are not symmetric."""
    y, x = np.mgrid[:h, :w] / max(h, w)
    channels = [np.sin(9 * x + y), np.cos(7 * y) * x, (x > 0.4) * 1.0 - (np.abs(y - 0.3) < 0.03)]
    return ((np.stack(channels, axis=-1) * 0.5 + 0.5) * 255).astype(np.uint8)


def check_resize(size=32):
    """openpi's resize_with_pad is PIL's bilinear resize, in the middle of black."""
    policy = make_policy(image_size=size)
    for h, w in SHAPES:
        image = picture(h, w)
        ours = policy.preprocess({"images": image[None, None], "state": np.zeros((1, 4)), "prompt": ["go"]})
        ours = (ours["images"][0, 0].permute(1, 2, 0).numpy() + 1) * 127.5
        height, width = max(1, h * size // max(h, w)), max(1, w * size // max(h, w))
        truth = np.zeros((size, size, 3))
        top, left = (size - height) // 2, (size - width) // 2
        small = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        truth[top : top + height, left : left + width] = small
        assert np.abs(ours - truth).max() <= 2, (h, w)


def test_resize():
    check_resize()


def resize(pad=lambda p, value: (p, value), **options):
    """A mutant with other options of the resize, or other arguments to the padding of the pictures."""

    def mutate(patch):
        real_interpolate, real_pad = F.interpolate, F.pad

        def interpolate(x, size, **given):
            return real_interpolate(x, **{"size": size} | given | options)

        def padded(x, p, mode="constant", value=0.0):
            p, value = pad(p, value) if len(p) == 4 else (p, value)  # not the state
            return real_pad(x, p, mode, value)

        patch.setattr(F, "interpolate", interpolate)
        patch.setattr(F, "pad", padded)

    return mutate


RESIZE = {
    "no antialias": resize(antialias=False),
    "bicubic": resize(mode="bicubic"),
    "stretched": resize(lambda p, value: ((0, 0, 0, 0), value), size=(32, 32)),
    "grey": resize(lambda p, value: (p, 0.0)),
    "on one side": resize(lambda p, value: ((0, p[0] + p[1], 0, p[2] + p[3]), value)),
}


@pytest.mark.parametrize("broken", RESIZE)
def test_broken_resize_is_caught(broken, monkeypatch):
    RESIZE[broken](monkeypatch)
    with pytest.raises(AssertionError):
        check_resize()


def test_images_of_the_right_size_are_only_rescaled():
    images = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(1, 2, 32, 32, 3)
    ours = make_policy().preprocess({"images": images, "state": np.zeros((1, 4)), "prompt": ["go"]})
    truth = images.transpose(0, 1, 4, 2, 3) / 255.0 * 2 - 1
    assert ours["images"].shape == (1, 2, 3, 32, 32) and np.abs(ours["images"].numpy() - truth).max() < 1e-6
    assert ours["image_mask"].all() and ours["image_mask"].shape == (1, 2)


def test_state_and_tokens():
    policy = make_policy(state_dim=6, max_token_len=8)
    number = json.loads(policy.tokenizer_json)["model"]["vocab"]
    state = np.array([[0.6, 0.4, 0.7, -1.0]], np.float32)
    inputs = policy.preprocess(
        {"images": np.zeros((1, 1, 32, 32, 3), np.uint8), "state": state, "prompt": ["Put  us!"]}
    )
    close(inputs["state"], torch.tensor([[1.0, 1.0, 1.0, -1.0, 0.0, 0.0]]), 1e-5)  # (x - mean) / std, padded
    assert inputs["token_mask"].tolist() == [[True] * 6 + [False] * 2]
    words = "<bos>", "put", "u", "##s", "!", "\n"  # it has not met "us"
    assert inputs["tokens"][0, :6].tolist() == [number[word] for word in words]


def test_actions_there_and_back():
    policy = make_policy()
    assert policy.env_action_dim == 3
    actions = np.random.default_rng(0).uniform(-1, 1, (7, 5, 3)).astype(np.float32)
    x = policy.normalize_actions(actions)
    assert x.shape == (7, 5, 4) and (x[..., 3] == 0).all()
    back = policy.postprocess(x, None)
    assert back.dtype == np.float32 and np.abs(back - actions).max() < 1e-6
    one = policy.postprocess(torch.ones(1, 1, 4), None)  # mean + std
    assert one == pytest.approx(np.array([[[0.65, 0.4, 1.0]]]), abs=1e-5)


def test_delta_actions():
    """As pi0_libero: the state that was observed is added to the first dimensions, and to these only."""
    x, state = torch.randn(2, 5, 4), np.float32([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    plain, delta = (make_policy(delta_actions=n).postprocess(x, {"state": state}) for n in (0, 2))
    assert np.abs(delta - plain - np.float32([[[1, 2, 0]], [[5, 6, 0]]])).max() < 1e-5


# --- files ---


@torch.no_grad()
@pytest.mark.parametrize(
    "critic, layers", [("", 4), *((c, n) for c in ("expert", "vlm") for n in (1, 2, 3, 4))]
)
def test_save_and_load(tmp_path, critic, layers):
    policy = make_policy(critic, layers)
    save_policy(policy, tmp_path / "a" / "b", "# a card")
    again = load_policy(str(tmp_path / "a" / "b"))
    assert again.config == policy.config and again.stats == policy.stats and not again.training
    assert (tmp_path / "a" / "b" / "README.md").read_text() == "# a card"
    mine, theirs = policy.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert bool(critic) == any(key.startswith("value_head") for key in mine)
    if critic:
        assert sum(isinstance(m, torch.nn.Linear) for m in again.value_head.modules()) == layers
    trained = {key for key, p in policy.named_parameters() if p.requires_grad}
    assert trained == {key for key, p in again.named_parameters() if p.requires_grad}
    a, b = (
        p.velocity(p.encode(p.preprocess(observe(3))), torch.ones(3, 5, 4), torch.tensor([0, 0.3, 0.9]))
        for p in (policy, again)
    )
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    names = {"README.md", "config.json", "model.safetensors", "norm_stats.json", "tokenizer.json"}
    assert {f.name for f in (tmp_path / "a" / "b").iterdir()} == names  # and nothing temporary


@pytest.mark.parametrize("variant", ["pi0", "pi05"])
def test_files_have_the_keys_of_openpi(tmp_path, variant):
    openpi = reference(variant)
    save_policy(openpi.policy, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    unused = "paligemma_with_expert.gemma_expert.lm_head.weight"
    assert saved.keys() == openpi.weights.keys() - {unused}
    assert all(torch.equal(saved[key], openpi.weights[key]) for key in saved)
    save_file(openpi.weights, tmp_path / "model.safetensors")  # with the unused one
    assert load_policy(tmp_path).config == openpi.policy.config


def test_new_critic_is_zero_everywhere():
    policy = make_policy()
    for critic, width in (("expert", TINY.expert_width), ("vlm", TINY.width + TINY.state_dim)):
        policy.need_value_head(critic, 3)
        assert (policy.value_head(torch.randn(9, width)) == 0).all()


def test_what_is_trained():
    """The action expert and its projections; not the VLM, not the value head."""
    policy = make_policy("vlm")
    actor = {id(p) for p in policy.actor_parameters()}
    names = {key.split(".")[0] for key, p in policy.named_parameters() if id(p) in actor}
    projections = {
        "state_proj",
        "action_in_proj",
        "action_time_mlp_in",
        "action_time_mlp_out",
        "action_out_proj",
    }
    assert names == {"expert"} | projections


def edit(name, change):
    def damage(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(change(content)))

    return damage


def rename_a_key(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["a_stranger"] = tensors.pop("state_proj.bias")
    save_file(tensors, folder / "model.safetensors")


def truncate(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


DAMAGE = {  # what is wrong: (how, what the message has to say)
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["has no model.safetensors"]),
    "no sizes": (lambda folder: (folder / "config.json").unlink(), ["has no config.json", "vision_heads"]),
    "no statistics": (lambda folder: (folder / "norm_stats.json").unlink(), ["has no mean of state"]),
    "truncated weights": (truncate, ["cannot be read"]),
    "empty weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), ["cannot be read"]),
    "deeper": (edit("config.json", lambda c: c | {"depth": 3}), ["depth is 2 and not 3"]),
    "shallower": (edit("config.json", lambda c: c | {"depth": 1}), ["depth is 2 and not 1"]),
    "wider": (edit("config.json", lambda c: c | {"action_dim": 7}), ["action_dim is 4 and not 7"]),
    "another key": (rename_a_key, ["missing state_proj.bias", "unexpected a_stranger"]),
    "another critic": (edit("config.json", lambda c: c | {"critic": "vlm"}), ["missing value_head"]),
    "not JSON": (lambda folder: (folder / "config.json").write_text("width: 64\n"), ["cannot be read"]),
    "not text": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), ["cannot be read"]),
    "not sizes": (edit("config.json", lambda c: [1, 2]), ["cannot be read"]),
    "unknown size": (edit("config.json", lambda c: c | {"breadth": 1}), ["cannot be read", "breadth"]),
    "a size in words": (edit("config.json", lambda c: c | {"depth": "four"}), ["depth"]),
    "other statistics": (edit("norm_stats.json", lambda s: s["norm_stats"]), ["norm_stats"]),
    "half the statistics": (
        edit("norm_stats.json", lambda s: {"norm_stats": {"state": s["norm_stats"]["state"]}}), ["actions"],
    ),
}  # fmt: skip  # a table


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(tmp_path, damage, one_line_error):
    save_policy(make_policy(), tmp_path)
    how, says = DAMAGE[damage]
    how(tmp_path)
    message = one_line_error(load_policy, str(tmp_path))
    assert str(tmp_path) in message and all(part in message for part in says), message


def test_no_checkpoint(tmp_path, one_line_error):
    message = one_line_error(load_policy, str(tmp_path / "nothing"))
    assert "nothing" in message and "does not exist" in message
    (tmp_path / "file").write_text("")
    assert "file" in one_line_error(load_policy, str(tmp_path / "file"))
