"""Flow-SDE GRPO: advantages inside a group, the update without a critic, and groups of episodes in a run.

What is shared with flow_sde_ppo.py is tested in test_ppo.py. A `check_*` is also run on something broken,
which it must reject: `grpo`, right until one of its parts is replaced, or a formula with a wrong part.
"""

import copy
import csv
import dataclasses
import inspect
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import HYBRID, make_policy, turn
from test_ppo import double, rollout, seeded  # noqa: F401
from torch.distributions import Normal

import flow_sde_grpo
import flow_sde_ppo
from envs import make_envs
from flow_sde_grpo import Agent, Args, compute_advantages, main, transition, update
from pi_models import Policy, load_policy, save_policy
from simulators.tabletop import Tabletop

# --- advantages ---


def grpo(
    centre=lambda r: r.mean(dim=1, keepdim=True),
    spread=lambda r: r.std(dim=1, correction=0, keepdim=True),
    add=lambda spread: spread + 1e-6,
    group=lambda r, size: r.view(-1, size),
    ungroup=lambda a: a.flatten(),
    share=lambda chunks: chunks.mean() / chunks,
    all_equal=lambda r: (r == r[:, :1]).all(dim=1),
    lost=lambda r: r.isnan().any(dim=1),
):
    def compute(rewards, alive, group_size):
        returns = group(rewards.sum(dim=0), group_size)
        advantages = (returns - centre(returns)) / add(spread(returns))
        advantages[all_equal(returns) | lost(returns)] = 0
        return (ungroup(advantages) * share(alive.sum(dim=0).double())).expand_as(rewards)[..., None]

    return compute


def definition(rewards, alive, group_size):
    """Eq. 17 for one episode after the other, then its share of the mean number of chunks."""
    T, N = rewards.shape
    advantages, chunks = np.zeros((T, N, 1)), [int(alive[:, n].sum()) for n in range(N)]
    for n in range(N):
        first = n // group_size * group_size
        returns = [sum(rewards[t, m] for t in range(T)) for m in range(first, first + group_size)]
        mean = sum(returns) / group_size
        std = math.sqrt(sum((r - mean) ** 2 for r in returns) / group_size)
        advantages[:, n] = (returns[n - first] - mean) / (std + 1e-6) * (sum(chunks) / N) / chunks[n]
    return advantages


def episodes():
    """5 chunks of 12 episodes of different length, in fp64; the first six differ hardly at all."""
    length = torch.tensor([5, 1, 3, 2, 5, 4, 1, 5, 5, 2, 3, 4])
    alive = torch.arange(5)[:, None] < length
    rewards = torch.randn((5, 12), generator=seeded(), dtype=torch.float64) * alive
    rewards[:, :6] *= 1e-6
    return rewards, alive


def check_definition(compute):
    rewards, alive = episodes()
    for group_size in (2, 3, 4, 6, 12):
        truth = definition(rewards.numpy(), alive.numpy(), group_size)
        assert np.allclose(compute(rewards, alive, group_size).numpy(), truth, rtol=1e-6, atol=1e-9)


def check_all_equal(compute):
    """A group whose episodes have the same return has no signal: exactly none, and no NaN."""
    alive = torch.ones(5, 24, dtype=torch.bool)
    for group_size in (2, 3, 4, 6, 8, 12):
        for value in (0.0, 1.0, 0.1, 0.3):
            rewards = torch.zeros(5, 24)
            rewards[torch.arange(24) % 5, torch.arange(24)] = value
            rewards[:, group_size:] = torch.rand((5, 24 - group_size), generator=seeded())
            advantages = compute(rewards, alive, group_size)
            assert (advantages[:, :group_size] == 0).all()
            assert (advantages[:, group_size:] != 0).all() and advantages.isfinite().all()


def check_invariance(compute):
    """What is added to all returns of a group changes nothing."""
    rewards, alive = episodes()
    more = rewards.clone()
    more[0] += torch.tensor([2.0, -5.0, 0.5]).repeat_interleave(4)
    assert torch.allclose(compute(more, alive, 4), compute(rewards, alive, 4), rtol=1e-6, atol=1e-8)


def check_lost(compute):
    """A simulator breaks down in an episode of the first group. It did not fail: nobody knows. Its group has
    no signal, and the others are as if it was not there."""
    alive = torch.ones((5, 12), dtype=torch.bool)
    alive[2:, 1] = alive[3:, 7] = False
    rewards = torch.zeros(5, 12, dtype=torch.float64)
    rewards[2, 1], rewards[2, 7], rewards[4, 2] = math.nan, 1, 1
    advantages = compute(rewards, alive, 4)
    assert (advantages[:, :4] == 0).all() and (advantages[:, 8:] == 0).all()
    truth = np.array([-1, -1, -1, 3]) / math.sqrt(3) / np.array([5, 5, 5, 3])
    ratio = advantages[0, 4:8, 0].numpy() / truth
    assert np.allclose(ratio, ratio[0], rtol=1e-5) and ratio[0] > 0


def everyone(f):
    return lambda r: f(r.flatten()).expand(len(r), 1)


INTERLEAVED = grpo(group=lambda r, size: r.view(size, -1).T, ungroup=lambda a: a.T.flatten())
BY_ROUNDING = lambda r: torch.zeros(len(r), dtype=torch.bool)  # noqa: E731
ADVANTAGES = {
    check_definition: {
        "mean of all": grpo(centre=everyone(torch.mean)),
        "std of all": grpo(spread=everyone(lambda r: r.std(correction=0))),
        "unbiased std": grpo(spread=lambda r: r.std(dim=1, keepdim=True)),
        "interleaved": INTERLEAVED,
        "no share": grpo(share=torch.ones_like),
        "share of the chunks": grpo(share=lambda chunks: 1 / chunks),
        "another epsilon": grpo(add=lambda spread: spread + 1e-8),
    },
    check_all_equal: {
        "no epsilon": grpo(add=lambda spread: spread, all_equal=BY_ROUNDING),
        "what rounding leaves": grpo(all_equal=BY_ROUNDING),
    },
    check_lost: {"it failed": lambda rewards, *given: grpo()(rewards.nan_to_num(), *given)},
    check_invariance: {
        "mean of all": grpo(centre=everyone(torch.mean)), "no mean": grpo(centre=lambda r: 0),
        "interleaved": INTERLEAVED,
    },
}  # fmt: skip  # a table


@pytest.mark.parametrize("compute", [compute_advantages, grpo()])
@pytest.mark.parametrize("check", ADVANTAGES, ids=lambda check: check.__name__)
def test_advantages(check, compute):
    check(compute)


@pytest.mark.parametrize("check, broken", [(check, key) for check in ADVANTAGES for key in ADVANTAGES[check]])
def test_broken_advantages_are_caught(check, broken):
    with pytest.raises(AssertionError):
        check(ADVANTAGES[check][broken])


# --- the update ---


def make_agent(noise=None):
    """With a reference whose expert is not quite the policy's, if there is to be noise."""
    args = dataclasses.replace(Args(), **HYBRID | {"chunk_len": 3})
    agent = Agent(make_policy(), args)
    if noise is not None:
        agent.reference = Agent(copy.deepcopy(agent.policy).requires_grad_(False), args)
        for p in agent.reference.policy.expert.parameters():
            p += noise * torch.randn(p.shape, generator=seeded())
    return agent


def run_update(agent, batch, kind=torch.optim.SGD, rate=1.0, **changed):
    once = dict(update_epochs=1, num_minibatches=1, max_grad_norm=1e9) | changed
    optimizer = kind([{"params": agent.policy.actor_parameters()}], lr=rate)
    return update(agent, optimizer, batch, dataclasses.replace(Args(), **HYBRID | once), seeded())


def vector(agent):
    return torch.nn.utils.parameters_to_vector(agent.policy.actor_parameters()).detach().clone()


def clipped(ratio, a):
    """Gains beyond the clip are not paid, losses are."""
    return torch.where(a > 0, ratio.clamp(max=1.2), ratio.clamp(min=0.8)) * a


def losses(agent, batch, surrogate=clipped, kl=lambda d: d.exp() - 1 - d, norm=lambda a: a, live=torch.clone):
    """Of the policy, and KL divergence from the reference; d is log(reference / policy)."""
    terms = [], [], []
    for t in range(3):
        prefix, chain = turn(batch, t), batch.chain[t]
        for n in live(batch.alive[t]).nonzero().flatten().tolist():
            k, logprob = batch.denoise_idx[t, n].item(), []
            x, tau = chain[n : n + 1, k], torch.tensor([k / 4])
            for policy in (agent.policy, agent.reference.policy):
                mu, std = transition(x, policy.velocity(prefix[n : n + 1], x, tau)[0], tau, 0.25, 1.0)
                logprob.append(Normal(mu, std).log_prob(chain[n, k + 1])[0, :3, :3].sum())
            terms[0].append((logprob[0] - batch.logprob[t, n, 0]).exp())
            terms[1].append(batch.advantages[t, n, 0])
            terms[2].append(logprob[1] - logprob[0])
    ratio, advantages, d = (torch.stack(part) for part in terms)
    return -surrogate(ratio, norm(advantages)).mean(), kl(d).mean()


def measured():
    """The gradients of two updates, without and with a KL penalty of weight 2, and their metrics."""
    agent = make_agent(0.01)
    batch = rollout(agent)
    shift = torch.tensor([-0.5, -0.1, 0.1, 0.5])  # of log ratios: clipped and not clipped
    batch.logprob = batch.logprob + shift[torch.randint(4, batch.logprob.shape, generator=seeded())]
    found = []
    for kl_coef in (0.0, 2.0):
        trained = copy.deepcopy(agent)
        metrics = run_update(trained, batch, kl_coef=kl_coef)
        same = zip(trained.reference.policy.parameters(), agent.reference.policy.parameters())
        assert all(torch.equal(*pair) for pair in same)
        found.append((vector(agent) - vector(trained), metrics))
    return agent, batch, found


def check_gradient(agent, batch, found, **formula):
    for kl_coef, (step, metrics) in zip((0.0, 2.0), found):
        policy_loss, kl = losses(agent, batch, **formula)
        assert metrics["losses/policy_loss"] == pytest.approx(policy_loss.item(), abs=1e-9)
        known = kl.item() if kl_coef else 0  # else nobody asks the reference
        assert metrics["losses/reference_kl"] == pytest.approx(known, rel=1e-9) and kl > 1e-3
        parts = torch.autograd.grad(policy_loss + kl_coef * kl, agent.policy.actor_parameters())
        truth = torch.cat([part.flatten() for part in parts])
        assert torch.allclose(step, truth, rtol=1e-6, atol=1e-9 * truth.abs().max().item())
    assert (found[0][0] - found[1][0]).norm() > 0.01 * found[0][0].norm()


FORMULAS = {
    "not clipped": dict(surrogate=lambda ratio, a: ratio * a),
    "always clipped": dict(surrogate=lambda ratio, a: ratio.clamp(0.8, 1.2) * a),
    "normalised again": dict(norm=lambda a: (a - a.mean()) / a.std(correction=0)),
    "divergence the other way": dict(kl=lambda d: (-d).exp() - 1 + d),
    "squares": dict(kl=lambda d: d**2 / 2),
    "the dead are alive": dict(live=torch.ones_like),
}


def test_gradient(double):  # noqa: F811
    """Of surrogate and KL penalty, against autograd through the formula, one decision at a time."""
    given = measured()
    check_gradient(*given)
    for broken in FORMULAS:
        with pytest.raises(AssertionError):
            check_gradient(*given, **FORMULAS[broken])
            pytest.fail(broken)


def test_without_reference():
    """No divergence; and none at the start, when both are the same."""
    agent = make_agent()
    batch, steps = rollout(agent), []
    for start, kl_coef in ((None, 0.0), (0.0, 5.0)):
        trained = make_agent(start)
        metrics = run_update(trained, batch, kl_coef=kl_coef)
        assert metrics["losses/reference_kl"] == 0
        steps.append(vector(trained))
    assert torch.equal(*steps) and not torch.equal(steps[0], vector(agent))


def test_no_signal():
    """Without advantages only weight decay is left of an update."""
    agent, bare = make_agent(), dict(kind=torch.optim.AdamW, rate=1e-3, update_epochs=2, num_minibatches=2)
    batch, before = rollout(agent), vector(agent)
    batch.advantages = 0 * batch.advantages
    metrics = run_update(agent, batch, **bare)
    assert all(map(math.isfinite, metrics.values())) and metrics["flow/grad_norm"] == 0
    assert torch.allclose(vector(agent), before * (1 - 1e-3 * 0.01) ** 4, rtol=1e-6, atol=0)
    assert metrics["losses/policy_loss"] == 0


# --- groups ---


def check_groups(envs):
    """32 environments in groups of 4: one start for a group, and one course under the same actions."""
    seen = []
    for _ in range(2):
        obs, _ = envs.reset()
        seen += [obs["images"][group].tobytes() for group in range(0, 32, 4)]
        for _ in range(3):
            for values in (obs["images"], obs["state"], np.array(obs["prompt"])):
                grouped = values.reshape(8, 4, *values.shape[1:])
                assert (grouped == grouped[:, :1]).all()
            actions = np.random.default_rng(0).uniform(-1, 1, (8, 5, 3)).repeat(4, axis=0)
            obs, *_ = envs.step_chunk(actions)
    assert len(set(seen)) == len(seen) == 16


def test_groups():
    for group_size in (1, 2, 4, 8, 16):
        with nullcontext() if group_size == 4 else pytest.raises(AssertionError):
            check_groups(make_envs("tabletop", 32, 0, partial_reset=False, group_size=group_size))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_policy(make_policy(), folder)
    return str(folder)


def arguments(tmp_path, checkpoint, **changed):
    small = dict(num_envs=9, group_size=3, num_steps=8, total_timesteps=1, update_epochs=1, eval_freq=0)
    small |= dict(env_id="tabletop_press_button", save_model=False, checkpoint=checkpoint)
    return dataclasses.replace(Args(), **small | changed, run_dir=str(tmp_path / "runs"))


def train(tmp_path, checkpoint, patch, solved, **changed):
    """A run in which the environments `solved` succeed in their second chunk, and the others never; the
    rows of metrics.csv, and agent and batch of each update."""

    def step(self, action):
        real(self, action)
        return self.alive & np.isin(np.arange(self.num_envs), solved) & (self.length == 7)

    def spy(agent, optimizer, batch, *a):
        updates.append((agent, copy.deepcopy(batch)))
        return update(agent, optimizer, batch, *a)

    real, updates = Tabletop._step, []
    patch.setattr(Tabletop, "_step", step)
    patch.setattr(flow_sde_grpo, "update", spy)
    main(arguments(tmp_path, checkpoint, **changed))
    (folder,) = (tmp_path / "runs").iterdir()
    with open(folder / "metrics.csv") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return rows, updates


def test_scale_is_that_of_the_groups_that_are_learned_from():
    """How long the others are, and how many, does not matter."""
    rewards, alive = torch.zeros(8, 6), torch.ones(8, 6, dtype=torch.bool)
    rewards[3, 0] = 1  # of the first group, one of three, after four chunks
    alive[4:, 0] = False
    few = compute_advantages(rewards[:, :3], alive[:, :3], 3)
    for length in (1, 5, 8):
        alive[length:, 3:] = False
        many = compute_advantages(rewards, alive, 3)
        assert torch.equal(many[:, :3], few) and (many[:, 3:] == 0).all()
        alive[:, 3:] = True
    assert (few[..., 0] * alive[:, :3]).sum(dim=0).square().mean() == pytest.approx(
        ((4 + 8 + 8) / 3) ** 2, rel=1e-4
    )


def test_run(tmp_path, checkpoint, monkeypatch):
    """One group is solved by all, one by none, one by one of three: only the third is learned from."""
    rows, updates = train(tmp_path, checkpoint, monkeypatch, [0, 1, 2, 7], total_timesteps=229)
    assert [row["global_step"] for row in rows] == [4 * 7 + 5 * 40, 456] and len(updates) == 2
    for row, (agent, batch) in zip(rows, updates):
        assert row["charts/groups_all_solved"] == row["charts/groups_none_solved"] == 1
        assert row["charts/success_once"] == pytest.approx(4 / 9) and all(map(math.isfinite, row.values()))
        assert row["flow/grad_norm"] > 0 == row["losses/reference_kl"] and not hasattr(agent, "reference")
        chunks = [8 if n in (6, 8) else 2 if n == 7 else 0 for n in range(9)]
        assert batch.alive.sum(dim=0).tolist() == chunks
        sums = (batch.advantages[..., 0] * batch.alive).sum(dim=0) / (
            (8 + 2 + 8) / 3
        )  # of whom is learned from
        truth = torch.tensor([0.0] * 6 + [-(0.5**0.5), 2**0.5, -(0.5**0.5)])
        assert torch.allclose(sums, truth, atol=1e-4)
        states = turn(batch, 0).state.view(3, 3, -1)
        assert (states == states[:, :1]).all() and len(states[:, 0].unique(dim=0)) == 3
    assert not torch.equal(*(turn(batch, 0).state for _, batch in updates))


def test_run_without_signal(tmp_path, checkpoint, monkeypatch):
    rows, ((_, batch),) = train(tmp_path, checkpoint, monkeypatch, [])
    assert rows[0]["charts/groups_all_solved"] == 0 and rows[0]["charts/groups_none_solved"] == 3
    assert rows[0]["flow/grad_norm"] == rows[0]["losses/policy_loss"] == 0 and batch.alive.all()


def check_reference(*given):
    """The expert that training started from, which stays as it was, with the VLM of the policy itself."""
    rows, ((agent, _),) = train(*given, [0], kl_coef=0.5)
    policy, reference, start = (
        dict(x.named_parameters())
        for x in (
            agent.policy,
            agent.reference.policy,
            load_policy(given[1]),
        )
    )
    assert rows[0]["losses/reference_kl"] >= 0
    for name, p in policy.items():
        vlm = name.split(".")[0] in ("vision_tower", "multi_modal_projector", "language_model")
        assert (reference[name].data_ptr() == p.data_ptr()) == vlm, name
        assert torch.equal(reference[name], start[name]) and torch.equal(p, start[name]) == vlm, name
        assert not reference[name].requires_grad and p.requires_grad != vlm


SHARED = {
    "the VLM": lambda policy, memo: memo,
    "nothing": lambda policy, memo: {},
    "the expert too": lambda policy, memo: memo | {id(policy.expert): policy.expert},
}


@pytest.mark.parametrize("shared", SHARED)
def test_reference(tmp_path, checkpoint, monkeypatch, shared):
    def deepcopy(x, *memo):
        return real(x, *(SHARED[shared](x, m) if isinstance(x, Policy) else m for m in memo))

    real = copy.deepcopy
    monkeypatch.setattr(copy, "deepcopy", deepcopy)
    with nullcontext() if shared == "the VLM" else pytest.raises(AssertionError):
        check_reference(tmp_path, checkpoint, monkeypatch)


MISTAKES = {
    "no whole episode": (dict(num_steps=7), ["--num-steps 7", "40"]),
    "uneven groups": (dict(group_size=4), ["4", "9"]),
    "groups of one": (dict(group_size=1), ["--group-size"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(tmp_path, checkpoint, mistake, one_line_error):
    changed, says = MISTAKES[mistake]
    message = one_line_error(main, arguments(tmp_path, checkpoint, num_minibatches=1, **changed))
    assert all(part in message for part in says) and not list(tmp_path.iterdir())


def test_copied_from_flow_sde_ppo():
    """What test_math.py and test_ppo.py show of these holds here too."""
    for name in ("transition", "log_prob", "Agent.step", "Agent.act", "Agent.evaluate_actions", "evaluate"):
        ours, theirs = flow_sde_grpo, flow_sde_ppo
        for part in name.split("."):
            ours, theirs = getattr(ours, part), getattr(theirs, part)
        assert inspect.getsource(ours) == inspect.getsource(theirs), name
