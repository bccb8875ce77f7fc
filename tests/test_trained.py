"""What learns besides the expert: adapters in the VLM, or all of it. Missing cameras. Another robot."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import kept, make_policy, observe
from test_scripts import train

import flow_noise_ppo
import flow_sde_grpo
import flow_sde_ppo
from pi_models import LoRALinear, load_policy, save_policy


def with_adapters(rank=3, alpha=6, **sizes):
    """A policy whose adapters are not zero any more."""
    policy = make_policy(critic="vlm", **sizes)
    policy.set_trained("expert+lora", rank, alpha)
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.2)
    return policy


def flow(policy, obs):
    """Everything that depends on an observation: the prefix's fields and a velocity."""
    prefix = policy.encode(policy.preprocess(obs))
    x = torch.randn(len(prefix.mask), 5, 4, generator=torch.Generator().manual_seed(0))
    return [prefix.kv, prefix.pooled, policy.velocity(prefix, x, torch.full((len(x),), 0.25))[0]]


def test_new_adapters_change_nothing():
    policy, obs = make_policy(critic="vlm"), observe(3)
    before = flow(policy, obs)
    policy.set_trained("expert+lora", 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(before, flow(policy, obs)))


def test_adapter_is_a_low_rank_weight():
    """The same numbers as plain linear layers whose weights are W + alpha / rank B A."""
    policy, obs = with_adapters(), observe(3)
    expected, count = flow(policy, obs), 0
    for part in policy.vlm_modules:
        for module in list(part.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, LoRALinear):
                    plain = torch.nn.Linear(child.in_features, child.out_features, child.bias is not None)
                    with torch.no_grad():
                        plain.weight.copy_(child.weight + 6 / 3 * child.lora_b @ child.lora_a)
                        if child.bias is not None:
                            plain.bias.copy_(child.bias)
                    setattr(module, name, plain)
                    count += 1
    assert count == 6 + 2 * 7  # q, k, v, out, fc1, fc2 of SigLIP; q, k, v, o, gate, up, down of a Gemma layer
    for a, b in zip(expected, flow(policy, obs)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    before = flow(make_policy(critic="vlm"), obs)
    assert all((a - b).abs().max() > 0.01 for a, b in zip(before, expected))


def test_adapters_are_saved(tmp_path, one_line_error):
    policy, obs = with_adapters(), observe(3)
    save_policy(policy, tmp_path / "a")
    loaded = load_policy(tmp_path / "a")
    assert (loaded.config.lora_rank, loaded.config.lora_alpha) == (3, 6) and loaded.vlm_trained
    assert all(torch.equal(a, b) for a, b in zip(flow(policy, obs), flow(loaded, obs)))
    loaded.set_trained("expert+lora", 3, 6)  # these are the ones
    assert all(torch.equal(a, b) for a, b in zip(flow(policy, obs), flow(loaded, obs)))
    message = one_line_error(loaded.set_trained, "expert+lora", 8, 6)
    assert "rank 3 and alpha 6" in message


@pytest.mark.parametrize("part", ["expert", "expert+lora", "all"])
def test_what_learns(part):
    policy = make_policy(critic="vlm")
    policy.set_trained(part, 2, 2)
    names = {name for name, p in policy.named_parameters() if p.requires_grad}
    vlm = {name for name in names if name.startswith(("vision", "multi_modal", "language"))}
    every = {n for n, _ in policy.named_parameters() if n.startswith(("vision", "multi_modal", "language"))}
    expected = {"expert": set(), "expert+lora": {n for n in every if "lora_" in n}, "all": every}[part]
    assert vlm == expected and (part == "expert") == (not vlm) and policy.vlm_trained == (part != "expert")
    assert {n for n in names if n.startswith("expert.")}
    counted = {id(p) for p in policy.actor_parameters()}
    assert counted >= {id(p) for n, p in policy.named_parameters() if n in vlm}
    policy.set_trained("expert")
    assert not any(p.requires_grad for m in policy.vlm_modules for p in m.parameters())


def test_masters_in_fp32():
    """What a bf16 checkpoint's VLM learns with is in fp32, and what it does not learn stays in bf16."""
    policy, obs = make_policy(critic="vlm"), observe(3)
    exact = flow(policy, obs)
    for module in policy.vlm_modules:
        module.bfloat16()
    policy.set_trained("expert+lora", 2, 2)
    for name, parameter in policy.language_model.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
    half = flow(policy, obs)
    policy.set_trained("all")
    assert all(p.dtype == torch.float32 for m in policy.vlm_modules for p in m.parameters())
    every = flow(policy, obs)
    assert every[0].dtype == half[0].dtype == torch.bfloat16  # computed in, also now
    for a, b, c in zip(exact, half, every):
        scale = a.abs().mean()
        assert 0 < (a - b).abs().mean() / scale < 0.05 and 0 < (a - c).abs().mean() / scale < 0.05
    sum(f.float().sum() for f in every[2:]).backward()
    assert policy.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_the_critic_sends_no_gradient_into_the_vlm():
    policy = with_adapters()
    agent = flow_sde_ppo.Agent(policy, flow_sde_ppo.Args())
    agent.value(policy.encode(policy.preprocess(observe(2)))).sum().backward()
    assert all(p.grad is None for m in policy.vlm_modules for p in m.parameters())
    assert all(p.grad is not None for p in policy.value_head.parameters())


def test_update_encodes_again():
    """One step of SGD on the whole network: the gradient of the surrogate, by hand, through the VLM."""
    args = flow_sde_ppo.Args(update_epochs=1, num_minibatches=1, micro_batch_size=3, max_grad_norm=1e9)
    policy = with_adapters()
    agent = flow_sde_ppo.Agent(policy, args)
    generator, N = torch.Generator().manual_seed(0), 6
    with torch.no_grad():
        inputs = policy.preprocess(observe(N))
        chain, denoise_idx, logprob, features = agent.act(policy.encode(inputs), generator)
    advantages = torch.randn(N, 1, generator=generator)
    batch = SimpleNamespace(
        prefixes=kept(policy, 1, N, policy.encode(inputs), inputs),
        chain=chain[None],
        denoise_idx=denoise_idx[None],
        logprob=logprob[None],
        features=features[None],
        advantages=advantages[None],
        value=torch.zeros(1, N, 1),
        returns=torch.randn((1, N, 1), generator=generator),
        alive=torch.ones(1, N, dtype=torch.bool),
    )
    names = [name for name, p in policy.named_parameters() if p.requires_grad and "value_head" not in name]
    parameters = [dict(policy.named_parameters())[name] for name in names]
    assert any("lora_a" in name for name in names)

    # by hand: at equal weights the ratio is one and the surrogate's gradient is -mean(A grad log p)
    normal = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
    new, *_ = agent.evaluate_actions(policy.encode(inputs), chain, denoise_idx)
    expected = torch.autograd.grad(-(normal * new).mean(), parameters, allow_unused=True)

    before = [p.detach().clone() for p in parameters]
    groups = [{"params": parameters}, {"params": list(policy.value_head.parameters()), "lr": 0.0}]
    flow_sde_ppo.update(agent, torch.optim.SGD(groups, lr=1.0), batch, args, generator)
    moved = {name: old - new.detach() for name, old, new in zip(names, before, parameters)}
    for name, gradient in zip(names, expected):
        torch.testing.assert_close(
            moved[name], torch.zeros_like(moved[name]) if gradient is None else gradient, rtol=1e-3, atol=2e-5
        )
    assert max(moved[name].abs().max() for name in names if "lora_b" in name and "q_proj" in name) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("part", ["expert+lora", "all"])
@pytest.mark.parametrize("script", [flow_sde_ppo, flow_noise_ppo, flow_sde_grpo])
def test_scripts_train_the_vlm(tmp_path, script, part):
    start = str(tmp_path / "start")
    save_policy(make_policy(), start)
    changed = dict(train=part, lora_rank=2, lora_alpha=4, save_model=True, learning_rate=1e-2)
    _, folder, _ = train(tmp_path / "runs", start, script, **changed)
    before, after = (dict(load_policy(f).named_parameters()) for f in (start, str(folder / "checkpoint")))
    weight = "language_model.layers.0.self_attn.q_proj."
    if part == "expert+lora" or script is not flow_sde_grpo:
        assert torch.equal(after[weight + "weight"], before[weight + "weight"]) == (part == "expert+lora")
    assert (weight + "lora_b" in after) == (part == "expert+lora")
    if part == "expert+lora" and script is not flow_sde_grpo:  # whose groups all fail here
        assert after[weight + "lora_b"].abs().max() > 0


def test_the_penalty_needs_a_frozen_vlm(tmp_path, one_line_error):
    args = flow_sde_grpo.Args(kl_coef=0.1, train="all", run_dir=str(tmp_path / "runs"))
    assert "--kl-coef" in one_line_error(flow_sde_grpo.main, args) and not list(tmp_path.iterdir())


# --- cameras ---


def two_cameras(n=4):
    obs = observe(n)
    images = np.concatenate([obs["images"], obs["images"][:, :, ::-1]], axis=1)
    return obs | {"images": images, "image_mask": np.ones((n, 2), bool)}


def test_a_camera_that_nobody_has_is_dropped():
    policy, obs = make_policy(critic="vlm"), two_cameras()
    obs["image_mask"][:, 1] = False
    assert policy.preprocess(obs)["images"].shape[1] == 1
    assert all(torch.equal(a, b) for a, b in zip(flow(policy, obs), flow(policy, observe(4))))


def test_a_camera_that_some_miss_is_masked():
    """The same as if those that have it and those that miss it were encoded apart."""
    policy, obs = make_policy(critic="vlm"), two_cameras()
    obs["image_mask"][:2, 1] = False
    inputs = policy.preprocess(obs)
    assert inputs["images"].shape[1] == 2 and (inputs["images"][:2, 1] == -1).all()
    mixed = flow(policy, obs)[1:]
    whole, one = two_cameras(), observe(4)
    for got, without, there in zip(mixed, flow(policy, one)[1:], flow(policy, whole)[1:]):
        torch.testing.assert_close(got[:2], without[:2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[2:], there[2:], rtol=1e-4, atol=1e-5)
        assert (without[2:] - there[2:]).abs().max() > 1e-3


def test_no_camera():
    policy, obs = make_policy(critic="vlm"), observe(4)
    obs["images"] = np.zeros((4, 0, 1, 1, 3), np.uint8)
    prefix = policy.encode(policy.preprocess(obs))
    assert prefix.mask.shape[1] == policy.token_len and prefix.kv.isfinite().all()


# --- another robot ---


@pytest.mark.parametrize("state, action, changed", [
    (39, 4, {"state_proj.weight"}),
    (4, 7, {"action_in_proj.weight", "action_out_proj.weight", "action_out_proj.bias"}),
    (8, 7, {"state_proj.weight", "action_in_proj.weight", "action_out_proj.weight", "action_out_proj.bias"}),
    (3, 2, set()),
])  # fmt: skip  # a table
def test_fit_robot(state, action, changed):
    policy = make_policy()
    before = {name: p.shape for name, p in policy.named_parameters()}
    kept = {name: p.detach().clone() for name, p in policy.named_parameters()}
    policy.fit_robot(state, action)
    after = dict(policy.named_parameters())
    assert {name for name in after if after[name].shape != before[name]} == changed
    same = {name for name in after if name.split(".")[0] not in {c.split(".")[0] for c in changed}}
    assert all(torch.equal(kept[name], after[name]) for name in same)
    assert policy.env_action_dim == action and policy.config == dataclasses.replace(
        policy.config, state_dim=max(4, state), action_dim=max(4, action)
    )
    obs = observe(2) | {"state": np.zeros((2, state), np.float32)}
    prefix = policy.encode(policy.preprocess(obs))
    x = torch.zeros(2, 5, policy.config.action_dim)
    velocity, _ = policy.velocity(prefix, x, torch.zeros(2))
    assert policy.postprocess(velocity, obs).shape == (2, 5, action)
    assert F.mse_loss(velocity, velocity) == 0
