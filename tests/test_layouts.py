"""Checkpoints of openpi, lerobot, transformers and RLinf, simulated with openpi's tiny weights, which have to
give openpi's velocity. What is damaged, dangerous or of something else; words; quantiles; the real sizes.
"""

import dataclasses
import json
import math
import os
import pickle
import resource
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import STATS, make_policy
from safetensors.torch import load_file, save_file
from test_models import check_velocity, close, reference
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

import layouts
from layouts import parameters_on_meta
from pi_models import PiConfig, Policy, load_policy, read_config, save_policy

VLM, EXPERT = "paligemma_with_expert.paligemma.", "paligemma_with_expert.gemma_expert."
EMBEDDING, LM_HEAD = VLM + "model.language_model.embed_tokens.weight", VLM + "lm_head.weight"
ONE, PT = "model.safetensors", "actor/model_state_dict/full_weights.pt"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM_STATS = "assets/physical-intelligence/libero/norm_stats.json"
UNSEEN = json.dumps({"vision_heads": 4, "horizon": 6, "max_token_len": 9})  # in weights of this size
LOW, HIGH = 0.08, 0.16  # bounds of RLinf's noise head
LAYOUTS = "openpi", "tied", "embedding", "lerobot hub", "lerobot trained", "lerobot old", "shards", "pt"


def renamed(tensors, rules):
    """The first rule that fits the beginning of a key renames it."""
    found = {key: next((old for old in rules if key.startswith(old)), "") for key in tensors}
    return {rules.get(old, "") + key[len(old) :]: tensors[key] for key, old in found.items()}


def lerobot_stats(state="observation.state", action="action"):
    parts = (state, STATS["state"]), (action, STATS["actions"])
    return {f"{key}.{s}": torch.tensor(value) for key, part in parts for s, value in part.items()}


def rl_heads():
    """V_expert and the noise head under RLinf's keys; 32 features, 32 actions."""
    shapes = {"value_head.mlp.0": (512, 32), "value_head.mlp.2": (256, 512)}
    shapes |= {"value_head.mlp.4": (128, 256), "value_head.mlp.6": (1, 128)}
    for i, shape in enumerate([(128, 32), (64, 128), (32, 64)]):
        shapes[f"noise_head.mlp_logvar.moduleList.{i}.linear_1"] = shape
    random = torch.Generator().manual_seed(0)
    heads = {f"{key}.weight": torch.randn(s, generator=random) / s[1] ** 0.5 for key, s in shapes.items()}
    heads |= {f"{key}.bias": torch.randn(s[0], generator=random) for key, s in shapes.items()}
    bounds = {"min": LOW, "max": HIGH}
    return heads | {f"noise_head.logvar_{b}": torch.tensor(math.log(s**2)) for b, s in bounds.items()}


def lay(folder, layout="openpi", variant="pi0", dtype=torch.float32, last=lambda key: key.startswith(VLM)):
    """A checkpoint folder of that layout; of two shards, the second has the keys that are `last`."""
    tensors = {key: tensor.to(dtype) for key, tensor in reference(variant).weights.items()}
    if layout in ("tied", "embedding"):
        tensors[EMBEDDING] = tensors[LM_HEAD].clone() if layout == "tied" else tensors.pop(LM_HEAD)
    if layout == "lerobot old":
        places = {"language_model.": "language_model.model.", "": ""}
        rules = {VLM + "model." + new: VLM + old for new, old in places.items()}
        tensors = renamed(tensors, rules | {VLM + "lm_head.": VLM + "language_model.lm_head.", "": ""})
    if layout in ("lerobot trained", "lerobot old"):
        tensors = {f"model.{key}": tensor for key, tensor in tensors.items()}
    if layout == "lerobot old":
        for key, value in lerobot_stats("buffer_observation_state", "buffer_action").items():
            sides = ("normalize_inputs",) if "state" in key else ("normalize_targets", "unnormalize_outputs")
            tensors |= {f"{side}.{key}": value.clone() for side in sides}
    elif layout.startswith("lerobot"):
        others = {"observation.images.top.mean": torch.ones(3, 1, 1), "action.max": torch.ones(3)}
        for step in ("preprocessor_step_5_normalizer", "postprocessor_step_0_unnormalizer"):
            save_file(lerobot_stats() | others, folder / f"policy_{step}_processor.safetensors")
        (folder / "policy_preprocessor.json").write_text("{}")
    else:
        (folder / NORM_STATS).parent.mkdir(parents=True)
        (folder / NORM_STATS).write_text(json.dumps({"norm_stats": STATS}))
    if layout == "pt":
        (folder / PT).parent.mkdir(parents=True)
        torch.save(tensors | rl_heads(), folder / PT)
    elif layout == "shards":
        place = {key: SHARDS[last(key)] for key in tensors}
        for name in SHARDS:
            save_file({key: tensor for key, tensor in tensors.items() if place[key] == name}, folder / name)
        (folder / f"{ONE}.index.json").write_text(json.dumps({"weight_map": place}))
    else:
        save_file(tensors, folder / ONE)
    (folder / "config.json").write_text(UNSEEN)
    return folder


def check_golden(policy, variant):
    check_velocity(SimpleNamespace(**vars(reference(variant)) | {"policy": policy}))


@pytest.mark.parametrize("variant", ["pi0", "pi05"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(tmp_path, layout, variant):
    policy = load_policy(lay(tmp_path, layout, variant))
    check_golden(policy, variant)
    truth = dataclasses.asdict(reference(variant).policy.config)
    if layout == "pt":
        bounds = {f"noise_std_{b}": pytest.approx(s, abs=1e-7) for b, s in (("min", LOW), ("max", HIGH))}
        truth |= bounds | {"critic": "expert", "critic_layers": 4}
    assert dataclasses.asdict(policy.config) == truth and policy.stats.keys() == STATS.keys()
    for key, part in STATS.items():
        assert policy.stats[key] == {s: pytest.approx(value, abs=1e-6) for s, value in part.items()}
    frozen = {id(p) for module in policy.vlm_modules for p in module.parameters()}
    assert all(p.requires_grad == (id(p) not in frozen) for p in policy.parameters()) and not policy.training


@torch.no_grad()
@pytest.mark.parametrize("variant", ["pi0", "pi05"])
@pytest.mark.parametrize("layout", ["openpi", "shards", "pt"])
def test_bf16(tmp_path, layout, variant):
    """What is frozen stays as it is stored, what is trained has masters in fp32; the velocity is close."""
    policy, openpi = load_policy(lay(tmp_path, layout, variant, dtype=torch.bfloat16)), reference(variant)
    for key, p in policy.named_parameters():
        if "head" not in key:
            assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
            assert torch.equal(p, openpi.weights[openpi.keys[key]].bfloat16().to(p.dtype)), key
    prefix = policy.encode(openpi.inputs)
    assert prefix.kv.dtype == torch.bfloat16 and prefix.pooled.dtype == torch.float32
    for i, t in enumerate(openpi.io["timesteps"].double()):
        velocity, features = policy.velocity(prefix, openpi.io["noise"], (1 - t).expand(3))
        assert velocity.dtype == features.dtype == torch.float32
        error = (velocity + openpi.io["velocity"][i]).norm() / openpi.io["velocity"][i].norm()
        assert 1e-4 < error < 0.03


@torch.no_grad()
def test_mixed_dtypes(tmp_path):
    """openpi's bf16 files have norms and position embeddings in fp32; the VLM computes in one dtype."""
    folder = lay(tmp_path, dtype=torch.bfloat16)
    tensors = load_file(folder / ONE)
    wide = {key: tensors[key].float() for key in tensors if "norm" in key or "embeddings" in key}
    save_file(tensors | wide, folder / ONE)
    policy = load_policy(folder)
    assert 10 < len(wide) and policy.encode(reference("pi0").inputs).kv.dtype == torch.bfloat16


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers(tmp_path, prefix):
    """torch.compile and DistributedDataParallel put their name before every key, or in the middle of it."""
    folder = lay(tmp_path)
    tensors = {prefix + key: tensor for key, tensor in load_file(folder / ONE).items()}
    save_file(
        {key.replace("gemma_expert.", "gemma_expert._orig_mod."): t for key, t in tensors.items()},
        folder / ONE,
    )
    check_golden(load_policy(folder), "pi0")


@torch.no_grad()
def test_fp64(tmp_path):
    """A checkpoint in double precision computes, in single precision."""
    policy = load_policy(lay(tmp_path, dtype=torch.float64))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    check_golden(policy, "pi0")


def test_value_head_of_another_kind(tmp_path, capsys):
    """RLinf's V_vlm reads no state, and pi0.5's critic is wider: the policy is taken, the head is not."""
    for i, shape in enumerate([(512, 48), (1024, 32)]):
        folder = lay(tmp_path / str(i), "openpi")
        head = {"value_head.mlp.0.weight": torch.zeros(shape), "value_head.mlp.0.bias": torch.zeros(shape[0])}
        head |= {"value_head.mlp.2.weight": torch.zeros(1, shape[0]), "value_head.mlp.2.bias": torch.zeros(1)}
        save_file(load_file(folder / ONE) | head, folder / ONE)
        policy = load_policy(folder)
        assert policy.value_head is None and policy.config.critic == ""
        assert str(shape) in capsys.readouterr().err
        check_golden(policy, "pi0")


@torch.no_grad()
def test_heads_of_rlinf(tmp_path):
    policy, w = load_policy(lay(tmp_path, "pt")), rl_heads()
    x = features = torch.randn(5, 32)
    for i in (0, 2, 4, 6):
        x = F.linear(x.relu() if i else x, w[f"value_head.mlp.{i}.weight"], w[f"value_head.mlp.{i}.bias"])
    close(policy.value_head(features), x[:, 0], 1e-5)
    x, low, high = features, w["noise_head.logvar_min"], w["noise_head.logvar_max"]
    for key in (f"noise_head.mlp_logvar.moduleList.{i}.linear_1." for i in range(3)):
        x = F.linear(x, w[key + "weight"], w[key + "bias"]).tanh()
    close(policy.noise_head(features), (0.5 * (low + (high - low) * (x + 1) / 2)).exp(), 1e-6)


@torch.no_grad()
def test_transformers(tmp_path):
    """Their model with openpi's weights. Its keys are its own, or openpi's where it is saved as usual."""
    from transformers import PI0Config, PI0ForConditionalGeneration

    openpi, c = reference("pi0"), reference("pi0").policy.config
    gemma = dict(model_type="gemma", num_hidden_layers=c.depth, head_dim=c.head_dim)
    gemma |= dict(num_attention_heads=c.heads, num_key_value_heads=1)
    text = gemma | dict(hidden_size=c.width, intermediate_size=c.mlp, vocab_size=c.vocab_size)
    vision = dict(hidden_size=c.vision_width, intermediate_size=c.vision_mlp)
    vision |= dict(num_attention_heads=c.vision_heads, image_size=c.image_size, patch_size=c.patch_size)
    vision |= dict(model_type="siglip_vision_model", num_hidden_layers=c.vision_depth, vision_use_head=False)
    vlm = dict(model_type="paligemma", projection_dim=c.width, image_token_id=96)
    vlm |= dict(text_config=text, vision_config=vision)
    dit = gemma | dict(hidden_size=c.expert_width, intermediate_size=c.expert_mlp)
    model = PI0ForConditionalGeneration(PI0Config(vlm_config=vlm, dit_config=dit))
    model.load_state_dict(
        renamed(
            openpi.weights,
            {
                VLM + "model.vision_tower.vision_model.": "model.vlm.vision_tower.",
                VLM + "model.": "model.vlm.",
                VLM + "lm_head.": "model.vlm.language_model.embed_tokens.",
                EXPERT + "model.": "model.dit.",
                EXPERT + "lm_head.": "model.dit.embed_tokens.",
                "action_out_proj.": "action_out_proj.",
                "": "embed_action_time.",
            },
        )
    )
    (tmp_path / "norm_stats.json").write_text(json.dumps({"norm_stats": STATS}))
    for own_keys in (True, False):
        model.save_pretrained(tmp_path, save_original_format=not own_keys)
        assert ("model.dit.norm.weight" in load_file(tmp_path / ONE)) == own_keys
        (tmp_path / "config.json").write_text(UNSEEN)
        policy = load_policy(tmp_path)
        check_golden(policy, "pi0")
        assert policy.config == c


@pytest.mark.parametrize("variant, told, unseen", [
    ("pi0", {}, (50, 48, False)),
    ("pi0", {"type": "pi0", "chunk_size": 30, "tokenizer_max_length": 64}, (30, 64, False)),  # lerobot
    ("pi0", {"model_type": "pi0", "chunk_size": 20, "vlm_config": {}}, (20, 48, False)),  # transformers
    ("pi05", {}, (10, 200, False)),
    ("pi05", {"type": "pi05", "chunk_size": 50, "tokenizer_max_length": 180}, (50, 180, True)),
    ("pi05", {"action_horizon": 15, "precision": "bfloat16"}, (15, 200, False)),  # openpi
])  # fmt: skip  # a table
def test_configs_of_others_at_full_size(variant, told, unseen):
    names = "horizon", "max_token_len", "state_in_prompt"
    with parameters_on_meta():
        policy = Policy(PiConfig(variant, **dict(zip(names, unseen))))
    assert read_config(policy.state_dict(), told) == policy.config


# --- what is not taken ---


def change(**tensors):
    tensors = {key.replace("__", "."): tensor for key, tensor in tensors.items()}
    return lambda folder: save_file(load_file(folder / ONE) | tensors, folder / ONE)


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:150_000])


DAMAGE = {  # what is wrong: (layout, how, what the message has to say)
    "truncated": ("openpi", truncate(ONE), "cannot be read"),
    "truncated shard": ("shards", truncate(SHARDS[1]), "cannot be read"),
    "truncated pt": ("pt", truncate(PT), "cannot be read"),
    "pt of a list": ("pt", lambda folder: torch.save([1, 2], folder / PT), ""),
    "missing shard": ("shards", lambda folder: (folder / SHARDS[1]).unlink(), "missing|has no"),
    "unexpected": ("openpi", change(a_stranger=torch.zeros(3)), "unexpected a_stranger"),
    "other shape": ("openpi", change(action_in_proj__bias=torch.zeros(31)), "bias is (31,) instead of (32,)"),
    "one axis": ("openpi", change(action_in_proj__weight=torch.zeros(32)), ""),
    "something else": (
        "openpi", lambda folder: save_file({"action_in_proj.weight": torch.zeros(8, 7)}, folder / ONE),
        "neither a pi0 nor a pi0.5",
    ),
    "empty statistics": ("openpi", lambda folder: (folder / NORM_STATS).write_text("{}"), "no mean of"),
    "two statistics": (
        "openpi", lambda folder: shutil.copytree(folder / "assets", folder / "b"), "several norm_stats.json",
    ),
    "a folder": ("openpi", lambda folder: (folder / "also.safetensors").mkdir(), "cannot be read"),
    "no statistics": ("openpi", lambda folder: (folder / NORM_STATS).unlink(), "copy the norm_stats.json"),
    "tokenizer": ("openpi", lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"),
}  # fmt: skip  # a table


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged(tmp_path, damage, one_line_error):
    layout, how, says = DAMAGE[damage]
    how(lay(tmp_path, layout))
    message = one_line_error(load_policy, str(tmp_path))
    assert str(tmp_path) in message and any(part in message for part in says.split("|")), message


def test_missing_shard_of_whole_layers(tmp_path, one_line_error):
    """What is left would be a network, of fewer layers."""
    lay(tmp_path, "shards", last=lambda key: "vision_model.encoder.layers.1." in key)
    (tmp_path / SHARDS[1]).unlink()
    assert SHARDS[1] in one_line_error(load_policy, tmp_path)


def edit(name, **told):
    """Other values in a JSON file, or in its norm_stats."""

    def damage(folder):
        read = json.loads((folder / name).read_text())
        (read["norm_stats"] if "norm_stats" in read else read).update(told)
        (folder / name).write_text(json.dumps(read))

    return damage


def part(key, **changed):
    return edit(NORM_STATS, **{key: {s: v for s, v in (STATS[key] | changed).items() if v is not None}})


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def in_pt(make):
    """The first weight of RLinf's .pt in another form."""

    def damage(folder):
        tensors = torch.load(folder / PT)
        key = "action_in_proj.weight"
        torch.save(tensors | {key: make(tensors[key])}, folder / PT)

    return damage


def second_file(**tensors):
    return lambda folder: save_file(tensors, folder / "more.safetensors")


def spoiled(number, key="action_in_proj.weight", layout="openpi"):
    """One number of one tensor."""

    def damage(folder):
        tensors = load_file(folder / ONE)
        tensors[key].view(-1)[7] = number
        save_file(tensors, folder / ONE)

    return layout, damage, f"NaN, infinity or numbers beyond 1e6 in {key}"


BROKEN = {  # would load, or fail somewhere later: (layout, how, what the message has to say)
    "NaN": spoiled(math.nan),
    "NaN in the VLM": spoiled(math.nan, LM_HEAD),
    "infinity": spoiled(math.inf),
    "minus infinity": spoiled(-math.inf, VLM + "model.language_model.layers.0.mlp.gate_proj.weight"),
    "a flipped exponent": spoiled(3e37),
    "whole numbers": ("openpi", change(action_in_proj__bias=torch.ones(32).int()), "action_in_proj.bias"),
    "one key in two files": (
        "openpi", second_file(**{"action_in_proj.bias": torch.ones(32)}), "bias twice, in mod",
    ),
    "untied": ("tied", spoiled(1.0, EMBEDDING)[1], "has two values of one tensor"),
    "meta": ("pt", in_pt(lambda x: x.to("meta")), "no dictionary of plain tensors"),
    "quantised": (
        "pt", in_pt(lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)), "no dictionary of plain",
    ),
    "sparse": ("pt", in_pt(lambda x: x.to_sparse()), "no dictionary of plain tensors"),
    "one number for all": ("pt", in_pt(lambda x: torch.ones(1).expand(x.shape)), "no dictionary of plain"),
    "half of a pair": ("pt", in_pt(lambda x: x + 0j), "NaN, infinity or numbers"),
    "NaN of a mean": ("openpi", part("state", mean=[math.nan, 0, 0, 0]), "mean of state"),
    "a number as words": ("openpi", part("actions", std=["1", "1", "1"]), "std of actions"),
    "truth": ("openpi", part("actions", mean=[True, 0, 0]), "mean of actions"),
    "no list": ("openpi", part("actions", mean=0.5), "mean of actions"),
    "nested": ("openpi", part("actions", mean=[[0, 0, 0]]), "mean of actions"),
    "beyond floats": ("openpi", part("actions", mean=[10**400, 0, 0]), "mean of actions"),
    "negative std": (
        "openpi", part("state", std=[1, -1, 1, 1]), "std of state in its statistics is negative",
    ),
    "shorter std": ("openpi", part("state", std=[1, 1, 1]), "has 3 numbers (mean: 4"),
    "too many": ("openpi", part("actions", **dict.fromkeys(STATS["state"], [0.5] * 33)), "at most 32"),
    "none": ("openpi", part("actions", **dict.fromkeys(STATS["state"], [])), "has 0 numbers"),
    "no std": ("openpi", part("actions", std=None), "has no std of actions"),
    "statistics of a list": ("openpi", write(NORM_STATS, b'{"norm_stats": []}'), "cannot be read"),
    "norm_stats.json cut off": (
        "openpi", write(NORM_STATS, b'{"norm_stats": {"sta'), "norm_stats.json that cannot",
    ),
    "no statistics in it": ("openpi", write(NORM_STATS, b"{}"), "has no mean of state"),
    "no horizon": ("openpi", edit("config.json", horizon=0), "its horizon is 0"),
    "negative horizon": ("openpi", edit("config.json", horizon=-3), "its horizon is -3"),
    "no tokens": ("openpi", edit("config.json", max_token_len=0), "its max_token_len is 0"),
    "a horizon as words": ("openpi", edit("config.json", horizon="6"), "horizon '6'"),
    "lerobot's as words": (
        "openpi", write("config.json", b'{"vision_heads": 4, "chunk_size": "6"}'), "chunk_size",
    ),
    "odd heads": ("openpi", edit("config.json", vision_heads=5), "vision_heads is 5 and has to be a divisor"),
    "no heads": ("openpi", edit("config.json", vision_heads=0), "its vision_heads is 0"),
    "swapped noise": (
        "openpi", edit("config.json", noise_std_min=0.5, noise_std_max=0.1), "its noise_std_min is 0.5",
    ),
    "NaN of noise": ("openpi", edit("config.json", noise_std_min=math.nan), "its noise_std_min is nan"),
    "another critic": ("openpi", edit("config.json", critic="both"), "its critic is 'both'"),
    "layers": ("openpi", edit("config.json", critic_layers=20), "its critic_layers is 20"),
    "deltas": ("openpi", edit("config.json", delta_actions=33), "its delta_actions is 33"),
    "another tokenizer": ("openpi", edit("config.json", tokenizer="sp"), "its tokenizer is 'sp'"),
    "config.json of a list": ("openpi", write("config.json", b"[1]"), "config.json that cannot be read"),
    "config.json is empty": ("openpi", write("config.json", b""), "config.json that cannot be read"),
    "config.json too deep": ("openpi", write("config.json", b"[" * 10**5), "config.json that cannot be read"),
    "config.json no text": ("openpi", write("config.json", b"\xff\xfe{"), "config.json that cannot be read"),
    "empty weights": ("openpi", write(ONE, b""), "cannot be read"),
    "empty pt": ("pt", write(PT, b""), "cannot be read"),
    "index of a list": ("shards", write(f"{ONE}.index.json", b'{"weight_map": []}'), "has no weight_map"),
    "index cut off": (
        "shards", write(f"{ONE}.index.json", b'{"weight_map": {"a'), "index.json that cannot be read",
    ),
    "tokenizer cut off": (
        "openpi", write("tokenizer.json", b'{"version": "1'), "tokenizer.json that cannot be read",
    ),
    "tokenizer no text": (
        "openpi", write("tokenizer.json", b"\xff" * 9), "tokenizer.json that cannot be read",
    ),
}  # fmt: skip  # a table


@pytest.mark.parametrize("damage", BROKEN)
def test_broken(tmp_path, damage, one_line_error):
    layout, how, says = BROKEN[damage]
    how(lay(tmp_path, layout))
    message = one_line_error(load_policy, str(tmp_path))
    assert str(tmp_path) in message and says in message, message


def test_broken_quantiles(tmp_path, one_line_error):
    for i, changed in enumerate([{"q01": [0.5] * 3, "q99": [0.5, 1, 1]}, {"q01": [2] * 3}]):
        part("actions", **changed)(lay(tmp_path / str(i), "openpi", "pi05"))
        assert "q01 of actions in its statistics is not below q99" in one_line_error(
            load_policy, tmp_path / str(i)
        )
    part("actions", q01=[2] * 3)(lay(tmp_path / "pi0"))
    assert (
        one_line_error is not None and load_policy(tmp_path / "pi0").config.variant == "pi0"
    )  # not read there


def test_tokenizers_of_others(tmp_path, one_line_error):
    lay(tmp_path)
    for model in (models.WordLevel({"?": 0, "pick": 96}, unk_token="?"), models.WordPiece({"pick": 1})):
        (tmp_path / "tokenizer.json").write_text(Tokenizer(model).to_str())
        assert "has a tokenizer.json" in one_line_error(load_policy, tmp_path)


class MakesFolder(str):
    """What unpickles by calling os.mkdir."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_does_not_run(tmp_path, zipped, one_line_error):
    file, ran = lay(tmp_path, "pt") / PT, tmp_path / "ran"
    torch.save(torch.load(file) | {"x": MakesFolder(ran)}, file, _use_new_zipfile_serialization=zipped)
    assert one_line_error(load_policy, tmp_path) and not ran.exists()
    torch.load(file, weights_only=False)
    assert ran.exists()  # it would have
    file.write_bytes(pickle.dumps(MakesFolder(tmp_path / "ran too")))
    assert one_line_error(load_policy, tmp_path) and not (tmp_path / "ran too").exists()


def test_hub_without_network(tmp_path, monkeypatch, one_line_error):
    from huggingface_hub import constants  # which has read the environment

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert "hf download somebody/pi0 --local-dir" in one_line_error(load_policy, "somebody/pi0")
    message = one_line_error(load_policy, "somebody/pi0@abc")
    assert "hf download somebody/pi0 --revision abc --local-dir" in message
    for name in ("", "nothing", "/no/such/folder", "a/b/c", "x" * 300, "../pi0@main"):
        assert f"'{name}' does not exist" in one_line_error(load_policy, name)
    snapshot = tmp_path / "models--somebody--pi0" / "snapshots" / ("0" * 40)  # downloaded before
    snapshot.mkdir(parents=True)
    (tmp_path / "models--somebody--pi0" / "refs").mkdir()
    (tmp_path / "models--somebody--pi0" / "refs" / "main").write_text("0" * 40)
    lay(snapshot)
    check_golden(load_policy("somebody/pi0"), "pi0")
    (tmp_path / "somebody").mkdir()  # now it is a wrong path, not an id
    assert "'somebody/pi0' does not exist" in one_line_error(load_policy, "somebody/pi0")


def test_download(tmp_path, monkeypatch, capsys):
    """Name and size come first, and only what is read is asked for. There is no hub: its answers are made."""
    import huggingface_hub

    sizes = {ONE: 3 * 10**9, "config.json": 700, NORM_STATS: 300, "tokenizer.json": 10**6, PT: 7 * 10**9}
    sizes |= {"optimizer/model.safetensors": 10**10, "train.log": 10**10, "README.md": 5, "x.pt": 10**10}
    asked = []

    def model_info(self, repository, revision, files_metadata):
        files = [SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()]
        return SimpleNamespace(siblings=files, sha=f"sha of {revision}")

    def snapshot_download(repository, revision, allow_patterns):
        asked.append((repository, revision, set(allow_patterns), capsys.readouterr().err))
        return str(lay(tmp_path / "snapshot"))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    check_golden(load_policy("somebody/pi0@v1.2"), "pi0")
    ((repository, revision, patterns, said),) = asked
    assert (repository, revision) == ("somebody/pi0", "sha of v1.2")
    assert patterns == {ONE, "config.json", NORM_STATS, "tokenizer.json"}
    assert said == f"downloading somebody/pi0@v1.2: 3.00 GB in 4 files, to {tmp_path}/cache\n"
    for name in ("somebody/pi0@", "somebody/pi0"):
        shutil.rmtree(tmp_path / "snapshot")
        load_policy(name)
        assert asked[-1][1] == "sha of None"


# --- saved again; words; quantiles ---


def words():
    """A tokenizer of a few words that, like PaliGemma's, puts BOS in front unless told not to."""
    known = {word: 10 + i for i, word in enumerate(["?", "<bos>", " ", "\n", "pick", "up", "the", "cup"])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\W"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 11)])
    return tokenizer.to_str()


@torch.no_grad()
@pytest.mark.parametrize("layout, variant", [("openpi", "pi0"), ("lerobot hub", "pi05"), ("pt", "pi0")])
def test_saved_again(tmp_path, layout, variant):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    (lay(source, layout, variant) / "tokenizer.json").write_text(words())
    policy, openpi = load_policy(source), reference(variant)
    again = policy
    for _ in range(2):  # also over the file that the tensors may lie in
        save_policy(again, target)
        again = load_policy(target)
        ours, theirs = policy.state_dict(), again.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert again.config == policy.config and again.stats == policy.stats
        assert again.tokenizer_json == words()
        tau = torch.tensor([0, 0.3, 0.9])
        v = [p.velocity(p.encode(openpi.inputs), openpi.io["noise"], tau)[0] for p in (policy, again)]
        assert torch.equal(*v)
    names = {"README.md", "config.json", ONE, "norm_stats.json", "tokenizer.json"}
    assert {file.name for file in target.iterdir()} == names


def test_nothing_broken_is_saved(tmp_path):
    policy = make_policy()
    save_policy(policy, tmp_path / "a")
    before = (tmp_path / "a" / ONE).read_bytes()
    for number in (math.nan, math.inf, 1e30):
        with torch.no_grad():
            policy.action_in_proj.bias[1] = number
        with pytest.raises(RuntimeError, match="action_in_proj.bias"):
            save_policy(policy, tmp_path / "a")
        assert (tmp_path / "a" / ONE).read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_the_old_folder(tmp_path):
    """No file may be larger than 20 kB."""
    policy = make_policy()
    save_policy(policy, tmp_path / "a")
    before = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_policy(policy, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()} == before
    assert len(list(tmp_path.iterdir())) == 1


def test_files_of_others_stay(tmp_path):
    """The folder is replaced, so it must be the policy's own."""
    policy = make_policy()
    save_policy(policy, tmp_path / "a")
    (tmp_path / "a" / "notes").mkdir()
    (tmp_path / "a" / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes/mine.txt"):
        save_policy(policy, tmp_path / "a")
    assert (tmp_path / "a" / "notes" / "mine.txt").read_text() == "mine"
    (tmp_path / "b").symlink_to(tmp_path / "c")  # of a link, what it points to
    save_policy(policy, tmp_path / "b")
    assert (tmp_path / "b").is_symlink() and load_policy(tmp_path / "c")


def dying(function, folder, step):
    """Runs it in a child that is gone at its n-th file operation. Did it end before?"""
    child = os.fork()
    if child == 0:
        count = 0

        def audit(event, args):
            nonlocal count
            count += event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
            count += event == "open" and (args[1] == "w" or str(args[0]) == str(folder))
            if count > step:
                os._exit(9)

        try:
            sys.addaudithook(audit)
            function()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0


@pytest.mark.parametrize("at_once", [True, False])
def test_killed_while_saving(tmp_path, at_once, monkeypatch):
    """At any moment: the old folder or the new one, whole. The first save: none, or a whole one."""
    old, new = make_policy(seed=0), make_policy(seed=1, horizon=3)
    folder, states, seen = tmp_path / "a", [p.state_dict() for p in (old, new)], []
    if not at_once:
        monkeypatch.setattr(layouts.ctypes, "CDLL", lambda _: None)  # as where no system call swaps
    for first in (True, False)[not at_once :]:
        for step in range(200):
            shutil.rmtree(folder, ignore_errors=True)
            if not first:
                save_policy(old, folder)
            ended = dying(lambda: save_policy(new, folder), tmp_path, step)
            if folder.exists() or not first and at_once:
                again = load_policy(folder)
                (which,) = [
                    i
                    for i, s in enumerate(states)
                    if all(s[k].equal(x) for k, x in again.state_dict().items())
                ]
                assert again.config == (old, new)[which].config
                seen.append((first, which))
            if ended:
                break
        assert ended and seen[-1] == (first, 1) and step > 10
    assert not list(folder.parent.glob(".a.*"))  # the next save clears what a killed one left
    assert set(seen) == ({(True, 1), (False, 0), (False, 1)} if at_once else {(False, 0), (False, 1)})


def see(policy, state, prompt="go"):
    """The tokens of one observation."""
    images = np.zeros((1, 1, 32, 32, 3), np.uint8)
    inputs = policy.preprocess({"images": images, "state": np.float32([state]), "prompt": [prompt]})
    return inputs["tokens"][inputs["token_mask"]].tolist()


def letters():
    """A tokenizer of letters, whose numbers are those of their bytes."""
    tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return tokenizer.to_str()


def test_tokens_of_words(one_line_error):
    policy = make_policy(tokenizer="paligemma")
    policy.tokenizer_json = None
    message = one_line_error(policy.tokenize, "pick up the cup")
    assert "tokenizer.json" in message and "google/paligemma-3b-pt-224" in message
    policy.tokenizer_json = words()
    tokens = [2, 14, 12, 15, 12, 16, 12, 17, 13]  # BOS, words and spaces, newline
    assert policy.tokenize("pick up the cup") == policy.tokenize(" pick_up\nthe cup\n") == tokens
    assert see(policy, [0.0] * 4, "pick cup") == [2, 14, 12, 17, 13]


def test_state_in_the_prompt():
    policy = make_policy(variant="pi05", state_in_prompt=True, max_token_len=200)
    policy.tokenizer_json = letters()
    state = [-1.0, 1.0, 0.0, *np.random.default_rng(0).uniform(-1, 1, 200)]
    bins = [min(255, math.floor((x + 1) * 128)) for x in state]
    assert bins[:3] == [0, 255, 128]
    truth = f"Task: pick up it, State: {' '.join(map(str, bins))};\nAction: "
    assert policy.tokenize("pick_up it ", state) == [2, *truth.encode()]
    low, high = (np.float32(STATS["state"][s]) for s in ("q01", "q99"))
    for state, number in ((low, 0), (low + 0.501 * (high - low), 128), (high + 0.01, 255)):
        text = f"Task: go, State: {number} {number} {number} {number};\nAction: "
        assert see(policy, state) == [2, *text.encode()]
    policy.fit_prompts(["go"])
    assert policy.token_len == len(see(policy, high + 0.01))  # the longest of states


def test_state_in_the_prompt_is_padded():
    """lerobot first pads the normalised state with zeros to max_state_dim (0.4.4, processor_pi05.py)."""
    policy = make_policy(variant="pi05", state_in_prompt=True, max_token_len=200, action_dim=6, state_dim=6)
    policy.tokenizer_json = letters()
    assert bytes(see(policy, STATS["state"]["q01"])[1:]) == b"Task: go, State: 0 0 0 0 128 128;\nAction: "
    policy.fit_prompts(["go"])
    assert policy.token_len == len(see(policy, np.add(STATS["state"]["q99"], 0.01)))


def test_quantiles_there_and_back():
    policy = make_policy(variant="pi05")
    policy.stats = {"actions": {"q01": [-0.5, 2.0, 0.0], "q99": [1.5, 6.0, 1e-6]}}  # the last: 1e-6 is added
    actions = np.float32([[[-0.5, 6.0, 0.0], [0.5, 2.0, 1e-6], [1.0, 8.0, 0.0]]])
    x = torch.tensor([[[-1.0, 1.0, -1.0, 0.0], [0.0, -1.0, 0.0, 0.0], [0.5, 2.0, -1.0, 0.0]]])
    close(policy.normalize_actions(actions), x, 3e-6)
    back = policy.postprocess(x, None)
    assert np.abs(back - actions).max() < 3e-6 and np.abs(back - actions)[..., 2].max() < 1e-9


@pytest.mark.parametrize("variant, millions", [("pi0", 311.5), ("pi05", 427.9)])
def test_full_size(variant, millions):
    """Sums by hand; models.md does not list the projections of state, actions and time."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with parameters_on_meta():
        policy = Policy(PiConfig(variant))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB, for imports
    assert all(p.is_meta for p in policy.parameters()) and sum(b.nbytes for b in policy.buffers()) < 10_000
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in policy.named_children()}

    def linear(a, b):
        return a * b + b

    def gemma(width, mlp, norm):  # 18 layers, 8 heads of 256, one of them for keys and values
        return 18 * (2 * width * 2048 + 2 * width * 256 + 3 * width * mlp + 2 * norm) + norm

    W, M, E = 1152, 4304, 1024  # SigLIP has biases; AdaRMS is a layer with three outputs
    siglip = linear(3 * 14 * 14, W) + 256 * W + 2 * W
    siglip += 27 * (4 * linear(W, W) + linear(W, M) + linear(M, W) + 4 * W)
    pi0 = variant == "pi0"
    truth = {"vision_tower": siglip, "multi_modal_projector": linear(W, 2048)}
    truth |= {"language_model": 257152 * 2048 + gemma(2048, 16384, 2048)}
    truth |= {"expert": gemma(E, 4096, E if pi0 else linear(E, 3 * E))}
    truth |= {"state_proj" if pi0 else "time_mlp_in": linear(32 if pi0 else E, E)}
    assert {name: parts[name] for name in truth} == truth
    assert round((siglip + linear(W, 2048)) / 1e6, 1) == 414.8 and round(257152 * 2048 / 1e6) == 527
    assert round(gemma(2048, 16384, 2048) / 1e9, 3) == 1.982 and round(parts["expert"] / 1e6, 1) == millions
