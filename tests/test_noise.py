"""Flow-Noise: the learned noise, the joint log-probability of a chain, and the update's use of them.

What is shared with flow_sde_ppo.py is tested in test_ppo.py. As there, a `check_*` is also run on broken
code, which it must reject. The truth is `rated`: a loop over the denoise steps, with torch.distributions.
"""

import dataclasses
import inspect
import math

import pytest
import torch
from conftest import HYBRID, encode, make_policy, turn, wrapped
from test_ppo import double, rollout, seeded  # noqa: F401
from torch.distributions import Independent, Normal

import flow_noise_ppo
import flow_sde_ppo
from flow_noise_ppo import Agent, Args, log_prob, sde_transition, update
from pi_models import NoiseHead, Prefix, load_policy, save_policy

LOW, HIGH = 0.2, 0.6
USED = slice(None), slice(3), slice(3)  # 3 of the policy's 5 actions are executed, 3 of its 4 dimensions real


def make_agent(kind=Agent, args=Args, **changed):
    policy = make_policy("vlm")
    policy.need_noise_head(LOW, HIGH)
    torch.nn.init.normal_(policy.noise_head.mlp[-2].weight, std=0.8)  # stds of all sizes
    return kind(policy, dataclasses.replace(args(), chunk_len=3, **changed))


def look(policy, n):
    """A prefix in the precision of the test."""
    fields = encode(policy, n)
    return Prefix(*(f.to(torch.get_default_dtype()) if f.is_floating_point() else f for f in fields))


def modes():
    for noise in ("learned", "sde"):
        for reduction in ("sum", "mean"):
            for K in (3, 4):
                yield dict(noise=noise, logprob_reduction=reduction, denoise_steps=K, noise_level=0.7)


def gaussian(policy, prefix, x, k, K, noise="learned"):
    """Mean and std of denoise step k."""
    tau = torch.full((len(x),), k / K)
    velocity, features = policy.velocity(prefix, x, tau)
    if noise == "learned":
        return x + velocity / K, policy.noise_head(features)
    mu, std = flow_sde_ppo.transition(x, velocity, tau, 1 / K, 0.7)
    return mu, std.expand_as(x)


def rated(policy, prefix, chain, noise="learned", reduction="sum"):
    """Log-probability (Eq. 5) and entropy per number (B, 1), and std (B * K, H, D), one step at a time."""
    K, entropy, stds = chain.shape[1] - 1, [], []
    logprob = [Independent(Normal(torch.zeros(3, 3), torch.ones(3, 3)), 2).log_prob(chain[:, 0][USED])]  # A^0
    for k in range(K):
        mu, std = gaussian(policy, prefix, chain[:, k], k, K, noise)
        step = Independent(Normal(mu[USED], std[USED]), 2)
        logprob.append(step.log_prob(chain[:, k + 1][USED]))
        entropy.append(step.entropy() / (3 * 3 * K))
        stds.append(std)
    logprob, entropy = sum(logprob)[:, None], sum(entropy)[:, None]
    return logprob / (K + 1 if reduction == "mean" else 1), entropy, torch.stack(stds, dim=1).flatten(0, 1)


def gradient(value, agent):
    """With respect to expert and noise head, as one vector."""
    parts = torch.autograd.grad(value, agent.policy.actor_parameters(), materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


# --- a chain and its log-probability ---


def check_joint():
    """K steps in one forward pass: values and gradients of the loop, and act says the same."""
    for mode in modes():
        agent = make_agent(**mode)
        prefix = look(agent.policy, 4)
        chain, denoise_idx, logprob, _ = agent.act(prefix, seeded())
        found = agent.evaluate_actions(prefix, chain, denoise_idx)
        truth = rated(agent.policy, prefix, chain, mode["noise"], mode["logprob_reduction"])
        assert logprob.shape == found[0].shape == found[1].shape == (4, 1)
        assert torch.allclose(logprob, truth[0], rtol=1e-12, atol=1e-11), mode
        for value, true in zip(found, truth):
            assert torch.allclose(value.expand_as(true), true, rtol=1e-12, atol=1e-11), mode
        slopes, true = (gradient((x[0][:, 0] * torch.arange(1.0, 5)).sum(), agent) for x in (found, truth))
        assert torch.allclose(slopes, true, rtol=1e-9, atol=1e-12 * true.abs().max().item()), mode
        assert true.abs().max() > 1


def check_draws():
    """A^0 and the noise of each step are standard normal, independent of each other and from row to row."""
    agent = make_agent()
    prefix = look(agent.policy, 100)
    chain, denoise_idx, *_ = agent.act(prefix, seeded())
    assert torch.equal(denoise_idx, torch.arange(4).expand(100, 4))
    with torch.no_grad():
        steps = [gaussian(agent.policy, prefix, chain[:, k], k, 4) for k in range(4)]
    drawn = [chain[:, 0], *((chain[:, k + 1] - mu) / std for k, (mu, std) in enumerate(steps))]
    for i, z in enumerate(drawn):  # 2,000 numbers: 0.11 and 0.08 are 5 standard deviations
        assert z.mean().abs() < 0.11 and (z.std() - 1).abs() < 0.08
        assert (z[1:] * z[:-1]).mean().abs() < 0.11
        assert all((z * other).mean().abs() < 0.11 for other in drawn[:i])


def check_ratio():
    """In fp32: of the same weights, in other batches, it is 1."""
    for mode in modes():
        agent = make_agent(**mode)
        prefix = look(agent.policy, 12)
        chain, denoise_idx, logprob, _ = agent.act(prefix, seeded())
        for rows in torch.randperm(12, generator=seeded()).split(5):
            again = agent.evaluate_actions(prefix[rows], chain[rows], denoise_idx[rows])[0]
            assert ((again - logprob[rows]).exp() - 1).abs().max() < 1e-4, mode


def check_deterministic():
    """The ODE, whatever the noise head says."""
    agent = make_agent()
    prefix = look(agent.policy, 4)
    chain, _, logprob, _ = agent.act(prefix, seeded(), deterministic=True)
    assert chain.shape == (4, 5, 5, 4) and logprob is None
    with torch.no_grad():
        for k in range(4):
            velocity, _ = agent.policy.velocity(prefix, chain[:, k], torch.full((4,), k / 4))
            assert torch.equal(chain[:, k + 1], chain[:, k] + velocity * 0.25)
        noisy = agent.act(prefix, seeded())[0]
        for parameter in agent.policy.noise_head.parameters():
            parameter.add_(1)
    assert torch.equal(agent.act(prefix, seeded(), deterministic=True)[0], chain)
    assert not torch.equal(agent.act(prefix, seeded())[0], noisy)


@torch.no_grad()
def check_several_chunks():
    """Chunks that share a row of the prefix: as alone with a copy of it, and they do not see each other."""
    policy, row, generator = make_policy(), torch.arange(3).repeat_interleave(4), seeded()
    prefix, second = look(policy, 3), (torch.arange(3) == 1)[:, None]
    x, tau = torch.randn((12, 5, 4), generator=generator), torch.rand(12, generator=generator)
    together, alone = policy.velocity(prefix, x, tau), policy.velocity(prefix[row], x, tau)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(together, alone))
    one, kv = torch.arange(12) == 5, prefix.kv * (1 + second[..., None, None, None])
    for given, moved in (
        ((prefix, x + one[:, None, None], tau), one),
        ((prefix, x, tau + 0.1 * one), one),
        ((prefix._replace(state=prefix.state + second), x, tau), row == 1),
        ((prefix._replace(kv=kv), x, tau), row == 1),
    ):
        for after, before in zip(policy.velocity(*given), together):
            change = (after - before).abs().amax(dim=(1, 2))
            assert change[~moved].max() < 1e-12 and change[moved].min() > 1e-5


def check_learned_noise_of_flow_sde():
    """flow_sde_ppo.py with --noise learned: the steps that are decisions are those of Eq. 4."""
    for mdp in ("hybrid", "two-layer"):
        agent = make_agent(flow_sde_ppo.Agent, flow_sde_ppo.Args, **HYBRID | dict(noise="learned", mdp=mdp))
        prefix = look(agent.policy, 16)
        chain, denoise_idx, logprob, _ = agent.act(prefix, seeded())
        again, entropy, stds = agent.evaluate_actions(prefix, chain, denoise_idx)
        for k in range(4):
            mu, std = gaussian(agent.policy, prefix, chain[:, k], k, 4)
            (row, s), z = (denoise_idx == k).nonzero().T, (chain[:, k + 1] - mu) / std
            step = Independent(Normal(mu[row][USED], std[row][USED]), 2)
            assert torch.allclose(stds.view(16, -1, 5, 4)[row, s], std[row], rtol=1e-12)
            for value in (logprob, again):
                assert torch.allclose(value[row, s], step.log_prob(chain[row, k + 1][USED]), rtol=1e-11)
            assert torch.allclose(entropy[row, s], step.entropy() / 9, rtol=1e-12)
            still = (denoise_idx != k).all(dim=1)
            assert 0.7 < z[row].std() < 1.3 and (z[still].abs() < 1e-12).all()


def check_transition():
    """Eq. 4 by hand: the mean is the ODE's step, the std is what the head says."""
    x, velocity, std = (torch.tensor(v).view(1, 3, 1) for v in ([1.0, -3, 0.5], [2.0, 8, 0], [0.1, 2, 0.5]))
    mu, spread = flow_noise_ppo.transition(x, velocity, 0.25, std)
    assert mu.flatten().tolist() == [1.5, -1, 0.5] and torch.equal(spread, std)


# --- the noise head ---


@torch.no_grad()
def check_bounds():
    """Whatever the features and the weights are; and both bounds are reached."""
    for low, high in ((0.08, 0.16), (0.04, 0.1), (0.2, 0.6), (1e-3, 1.0), (0.3, 0.3)):
        torch.manual_seed(0)
        head, features = NoiseHead(64, 4, low, high), torch.stack([torch.randn(5, 64), torch.ones(5, 64)])
        stds = [head(size * features) for size in (0, 1, 1e6, -1e6)]
        head.mlp[-2].weight *= 1e6
        stds = torch.cat(stds + [head(size * features) for size in (0, 1, 1e6, -1e6)])
        assert stds.shape == (16, 5, 4) and ((stds == low).all() or low < high)
        assert stds.min().item() == pytest.approx(low, rel=1e-6)
        assert stds.max().item() == pytest.approx(high, rel=1e-6)


@torch.no_grad()
def check_interpolation():
    """The log-variance is linear in the output of a tanh MLP with layers of 128 and 64."""
    torch.manual_seed(0)
    head = NoiseHead(64, 4, 0.08, 0.16)
    head.mlp[-2].weight *= 10
    y = features = torch.randn(3, 5, 64)
    layers = [layer for layer in head.mlp if isinstance(layer, torch.nn.Linear)]
    for layer in layers:
        y = torch.tanh(y @ layer.weight.T + layer.bias)
    assert [layer.out_features for layer in layers] == [128, 64, 4] and y.min() < -0.5 and y.max() > 0.5
    low, high = math.log(0.08**2), math.log(0.16**2)
    assert torch.allclose(2 * head(features).log(), (low + high) / 2 + y * (high - low) / 2, rtol=1e-12)


# --- the update ---


def check_update():
    """A step of plain SGD is the gradient of mean(advantage * log-prob) + ent_coef * mean(entropy), since the
    ratio is 1. Without advantages the entropy alone is left, and the stds grow."""
    for reduction, ent_coef, gain in (("sum", 0.3, 1), ("sum", 0.0, 1), ("mean", 0.3, 1), ("sum", 0.3, 0)):
        agent = make_agent(logprob_reduction=reduction)
        batch = rollout(agent)
        for name in ("advantages", "returns", "value"):
            setattr(batch, name, getattr(batch, name)[..., :1])
        batch.advantages = gain * batch.advantages
        prefixes = [turn(batch, t) for t in range(3)]
        rows = [rated(agent.policy, prefixes[t], batch.chain[t], reduction=reduction) for t in range(3)]
        logprob, entropy = (torch.cat(part)[batch.alive.flatten()] for part in list(zip(*rows))[:2])
        advantages = batch.advantages[batch.alive] - batch.advantages[batch.alive].mean()
        advantages = advantages / (advantages.square().mean().sqrt() + 1e-8)
        truth = gradient((advantages * logprob).mean() + ent_coef * entropy.mean(), agent)
        actor, critic = agent.policy.actor_parameters(), list(agent.policy.value_head.parameters())
        before = torch.nn.utils.parameters_to_vector(actor)
        once = dict(update_epochs=1, num_minibatches=1, max_grad_norm=1e9, ent_coef=ent_coef)
        optimizer = torch.optim.SGD([{"params": actor}, {"params": critic}], lr=0.01)
        metrics = update(agent, optimizer, batch, dataclasses.replace(Args(), **once), seeded())
        assert metrics["losses/entropy"] == pytest.approx(entropy.mean().item(), rel=1e-9)
        step = (torch.nn.utils.parameters_to_vector(actor) - before) / 0.01
        assert torch.allclose(step, truth, rtol=1e-6, atol=1e-9 * truth.abs().max().item())
        size = sum(p.numel() for p in agent.policy.noise_head.parameters())
        assert step[-size:].norm() > 1e-4  # the head was added last
        if not gain:
            with torch.no_grad():
                again = [rated(agent.policy, prefixes[t], batch.chain[t])[2].log().mean() for t in range(3)]
            assert sum(again) > sum(row[2].log().mean() for row in rows)


# --- which check catches what ---


def on(owner, name, change):
    """What the broken function does, which is given the real one first."""
    return wrapped(owner, name, lambda f: lambda *a, **kw: change(f, *a, **kw))


def step(change, owner=Agent, name="step"):
    def changed(f, *a):
        first, second, third, *features = f(*a)
        return *change(first, second, third), *features

    return on(owner, name, changed)


def half_a_step(f, agent, *a):
    f(agent, *a)
    agent.delta /= 2


def rated_as(change):
    return step(change, name="evaluate_actions")


def head(change):
    """A std that is change(output of the network, low, high)."""
    return on(NoiseHead, "forward", lambda f, self, x: change(self.mlp(x), self.low, self.high))


def in_turn(f, x, n, dim=None):
    return x.repeat(n, 1) if dim == 0 else f(x, n, dim)


def run_on(f, x, *n):
    return torch.arange(len(x) * n[0]) if x.dim() == 1 else f(x, *n)


SEE_EACH_OTHER = on(torch, "block_diag", lambda f, *blocks: torch.ones_like(f(*blocks)))
ONE_OFF = on(Agent, "evaluate_actions", lambda f, self, p, chain, k: f(self, p, chain.roll(1, 0), k))
BROKEN = {  # check: what is broken, and how
    check_joint: {
        "A^0 left out": on(Agent, "log_prior", lambda f, self, x: 0 * f(self, x)),
        "A^0 with padding": on(Agent, "log_prior", lambda f, self, x: log_prob(x, 0 * x, 0 * x + 1, 5, 4)),
        "always the mean": on(Agent, "joint", lambda f, self, terms: terms.mean(dim=1, keepdim=True)),
        "always the sum": on(Agent, "joint", lambda f, self, terms: terms.sum(dim=1, keepdim=True)),
        "all padding": on(flow_noise_ppo, "log_prob", lambda f, *a: f(*a[:3], 5, 4)),
        "variance for std": step(lambda v, mu, std: (v, mu, std**2)),
        "mean without its delta": step(lambda v, mu, std: (v, mu + 0.75 * v, std)),
        "std without gradient": step(lambda v, mu, std: (v, mu, std.detach())),
        "mean without gradient": step(lambda v, mu, std: (v, mu.detach(), std)),
        "steps one off": on(Agent, "evaluate_actions", lambda f, *a: f(*a[:3], (a[3] + 1) % a[3].shape[1])),
        "chains one off": ONE_OFF,
        "chunks see each other": SEE_EACH_OTHER,
    },
    check_draws: {
        "the same in every step": on(torch, "randn", lambda f, *a, **kw: f(*a, generator=seeded(5))),
        "of another scale": on(torch, "randn", lambda f, *a, **kw: 0.9 * f(*a, **kw)),
        "one std": step(lambda v, mu, std: (v, mu, 0 * std + 0.4)),
    },
    check_ratio: {"chains one off": ONE_OFF, "chunks see each other": SEE_EACH_OTHER},
    check_deterministic: {
        "with noise": on(Agent, "act", lambda f, *a, deterministic=False: f(*a)),
        "half a step": on(Agent, "__init__", half_a_step),
    },
    check_several_chunks: {
        "chunks see each other": SEE_EACH_OTHER,
        "positions run on": on(torch.Tensor, "repeat", run_on),
        "states of other rows": on(torch.Tensor, "repeat_interleave", in_turn),
    },
    check_learned_noise_of_flow_sde: {
        "variance for std": step(lambda v, mu, std: (v, mu, std**2), flow_sde_ppo.Agent),
        "another mean": step(lambda v, mu, std: (v, mu - 0.1 * v, std), flow_sde_ppo.Agent),
    },
    check_transition: {
        "no delta": on(flow_noise_ppo, "transition", lambda f, x, v, delta, std: (x + v, std)),
        "variance": on(flow_noise_ppo, "transition", lambda f, x, v, delta, std: (x + v * delta, std**2)),
    },
    check_bounds: {
        "variance": head(lambda y, low, high: low**2 * (high / low) ** (y + 1)),
        "not halved": head(lambda y, low, high: low * (high / low) ** (y + 1)),
        "without tanh": head(lambda y, low, high: low * (high / low) ** ((y.atanh() + 1) / 2)),
    },
    check_interpolation: {
        "arithmetic": head(lambda y, low, high: low + (high - low) * (y + 1) / 2),
        "the other way": head(lambda y, low, high: high * (low / high) ** ((y + 1) / 2)),
    },
    check_update: {
        "entropy without gradient": rated_as(lambda p, entropy, std: (p, entropy.detach(), std)),
        "entropy penalised": rated_as(lambda p, entropy, std: (p, 2 * entropy.detach() - entropy, std)),
        "entropy averaged": rated_as(lambda p, entropy, std: (p, entropy / 4, std)),
        "the dead are alive": on(torch.Tensor, "nonzero", lambda f, x: f(torch.ones_like(x))),
    },
}
IN_FP32 = check_draws, check_ratio, check_deterministic, check_bounds


def run(check, request):
    if check not in IN_FP32:
        request.getfixturevalue("double")
    check()


@pytest.mark.parametrize("check", BROKEN, ids=lambda check: check.__name__)
def test_real(check, request):
    run(check, request)


@pytest.mark.parametrize("check, broken", [(check, broken) for check in BROKEN for broken in BROKEN[check]])
def test_broken_is_caught(check, broken, request, monkeypatch):
    BROKEN[check][broken](monkeypatch)
    with pytest.raises(AssertionError):
        run(check, request)


def test_copied_from_flow_sde_ppo():
    """What test_math.py and test_ppo.py show of these holds here too."""
    for name in ("log_prob", "compute_advantages", "evaluate"):
        ours, theirs = (inspect.getsource(getattr(script, name)) for script in (flow_noise_ppo, flow_sde_ppo))
        assert ours == theirs, name
    x, velocity = torch.randn((2, 8, 5, 4), generator=seeded())
    for K in (1, 3, 4):
        for noise_level in (0.0, 0.5, 1.0):
            given = x, velocity, torch.arange(8) % K / K, 1 / K, noise_level
            assert all(map(torch.equal, sde_transition(*given), flow_sde_ppo.transition(*given)))


@torch.no_grad()
def test_need_noise_head(tmp_path):
    """One with the same bounds is kept, also over a file; other bounds need a new one, which is trained."""
    policy, x, stds = make_agent().policy, torch.randn((4, 5, 4), generator=seeded()), []
    save_policy(policy, tmp_path)
    for p in (policy, load_policy(tmp_path)):
        kept, prefix = p.noise_head, look(p, 4)
        p.need_noise_head(LOW, HIGH)
        assert p.noise_head is kept and (kept.low, kept.high) == (LOW, HIGH)
        stds.append(kept(p.velocity(prefix, x, torch.full((4,), 0.5))[1]))
    assert torch.equal(*stds) and stds[0].std() > 0.01
    for bounds in ((LOW, 0.7), (0.1, 0.7)):
        before = policy.noise_head
        policy.need_noise_head(*bounds)
        assert policy.noise_head is not before and (policy.noise_head.low, policy.noise_head.high) == bounds
        assert (policy.config.noise_std_min, policy.config.noise_std_max) == bounds
    trained = {id(p) for p in policy.actor_parameters() if p.requires_grad}
    assert trained >= {id(p) for p in policy.noise_head.parameters()}
