"""Advantages, the agent, and the PPO update of flow_sde_ppo.py.

As in test_math.py, a `check_*` is also run on broken code, which it must reject. For the advantages that is
`gae`, right until one of its parts is replaced; for the agent and the update, a function that they call is
patched.
"""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import HYBRID, encode, kept, make_policy, observe, turn, wrapped
from torch.distributions import Independent, Normal

import flow_noise_ppo
import flow_sde_ppo
from flow_sde_ppo import Agent, Args, compute_advantages, transition, update
from pi_models import TINY, Prefix, Prefixes, save_policy
from simulators import tabletop

# --- advantages ---


def gae(
    after=lambda following, final, terminated, truncated: (
        torch.where(truncated, final, following) * ~terminated
    ),
    ends=lambda terminated, truncated: terminated | truncated,
    inner_discount=1.0,
    inner_lambda=1.0,
    baseline=lambda values: values,
):
    """The recursion over the T * S decisions of the two-layer MDP."""

    def compute(rewards, values, next_value, terminated, truncated, final_values, gamma, gae_lambda):
        values = baseline(values)
        T, N, S = values.shape
        advantages, last = torch.zeros_like(values), torch.zeros(N)
        for t in reversed(range(T)):
            following = values[t + 1, :, 0] if t + 1 < T else next_value
            following = after(following, final_values[t], terminated[t], truncated[t])
            last = gae_lambda * last * ~ends(terminated[t], truncated[t])
            last = rewards[t] + gamma * (following + last) - values[t, :, -1]
            advantages[t, :, -1] = last
            for s in reversed(range(S - 1)):
                last = inner_discount * (values[t, :, s + 1] + inner_lambda * last) - values[t, :, s]
                advantages[t, :, s] = last
        return advantages, advantages + values

    return compute


def definition(rewards, values, next_value, terminated, truncated, final_values, gamma, gae_lambda):
    """A_i = sum_j (product of discount * lambda from i to j) * (TD error at j), to the end of the episode."""
    T, N, S = values.shape
    advantages = torch.zeros_like(values)
    for n in range(N):
        for i in range(T * S):
            weight, total = 1.0, 0.0
            for j in range(i, T * S):
                t, s = divmod(j, S)
                now = values[t, n, s].item()
                if s < S - 1:  # inside a chunk: no reward, no discount, lambda 1
                    total += weight * (values[t, n, s + 1].item() - now)
                    continue
                if terminated[t, n]:
                    future = 0.0
                elif truncated[t, n]:
                    future = final_values[t, n].item()
                else:
                    future = values[t + 1, n, 0].item() if t + 1 < T else next_value[n].item()
                total += weight * (rewards[t, n].item() + gamma * future - now)
                weight *= gamma * gae_lambda
                if terminated[t, n] or truncated[t, n]:
                    break
            advantages[i // S, n, i % S] = total
    return advantages


def check_definition(compute):
    """7 chunks of 6 environments, whose episodes end in all ways, also in the first and in the last chunk."""
    generator = torch.Generator().manual_seed(0)
    for S in (1, 4):
        rewards, final_values = torch.randn((2, 7, 6), generator=generator, dtype=torch.float64)
        values = torch.randn((7, 6, S), generator=generator, dtype=torch.float64)
        next_value = torch.randn(6, generator=generator, dtype=torch.float64)
        terminated, truncated = torch.zeros((2, 7, 6), dtype=torch.bool)
        terminated[[0, 3, 6, 2, 2], [1, 1, 2, 3, 5]] = True
        truncated[[0, 4, 6, 3, 5], [2, 2, 4, 3, 5]] = True
        for gamma, gae_lambda in ((0.9, 0.7), (0.99, 1.0), (0.8, 0.0)):
            given = rewards, values, next_value, terminated, truncated, final_values, gamma, gae_lambda
            advantages, returns = compute(*given)
            assert torch.allclose(advantages, definition(*given), atol=1e-12)
            assert torch.allclose(returns, advantages + values, atol=1e-12)


def check_by_hand(compute):
    """gamma = lambda = 1/2. Environment 0 succeeds in chunk 2. In chunk 1 environment 1 meets the time limit
    and environment 2 succeeds, and both begin anew."""
    terminated, truncated = torch.zeros((2, 3, 3), dtype=torch.bool)
    terminated[2, 0] = truncated[1, 1] = terminated[1, 2] = True
    rewards = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    final_values = torch.full((3, 3), 9.0)  # of no meaning, but for
    final_values[1, 1] = 8
    given = torch.tensor([7.0, 6.0, 6.0]), terminated, truncated, final_values, 0.5, 0.5
    values = torch.tensor([1.0, 2.0, 4.0])[:, None].expand(3, 3)
    # errors 0 + 1 - 1, 0 + 2 - 2, 1 - 4;  0 + 1 - 1, 0 + 4 - 2 | 0 + 3 - 4;  0 + 1 - 1, 1 - 2 | 0 + 3 - 4
    truth = torch.tensor([[-0.1875, 0.5, -0.25], [-0.75, 2.0, -1.0], [-3.0, -1.0, -1.0]])
    advantages, returns = compute(rewards, values[..., None], *given)
    assert torch.equal(advantages, truth[..., None])
    assert torch.equal(returns[:, 1, 0], torch.tensor([1.5, 4.0, 3.0]))
    # two decisions a chunk, and the second is worth 1 more: the same returns, its advantage is 1 less
    advantages, returns = compute(rewards, torch.stack([values, values + 1], dim=2), *given)
    assert torch.equal(advantages, torch.stack([truth, truth - 1], dim=2))
    assert torch.equal(returns[:, 1], torch.tensor([[1.5, 1.5], [4.0, 4.0], [3.0, 3.0]]))


GAE = {
    "the time limit is an end": gae(
        after=lambda v, final, terminated, truncated: v * ~(terminated | truncated)
    ),
    "bootstrapped on success": gae(after=lambda v, final, *ends: torch.where(ends[0] | ends[1], final, v)),
    "bootstrapped from the next episode": gae(after=lambda v, final, terminated, truncated: v * ~terminated),
    "trace goes on after success": gae(ends=lambda terminated, truncated: truncated),
    "trace goes on after the time limit": gae(ends=lambda terminated, truncated: terminated),
    "gamma inside a chunk": gae(inner_discount=0.9),
    "lambda inside a chunk": gae(inner_lambda=0.9),
    "one baseline for the chunk": gae(baseline=lambda values: values[..., :1].expand_as(values)),
}


@pytest.mark.parametrize("compute", [compute_advantages, gae()])
def test_advantages(compute):
    check_definition(compute)
    check_by_hand(compute)


@pytest.mark.parametrize("check", [check_definition, check_by_hand])
@pytest.mark.parametrize("broken", GAE)
def test_broken_advantages_are_caught(check, broken):
    with pytest.raises(AssertionError):
        check(GAE[broken])


@pytest.mark.parametrize("bootstrap", [True, False])
@pytest.mark.parametrize("script", [flow_sde_ppo, flow_noise_ppo], ids=lambda script: script.__name__)
def test_the_time_limit(script, bootstrap, tmp_path, monkeypatch):
    """A run whose episodes have two chunks: without the bootstrap the time limit is an end like success."""
    batches, start, real = [], tmp_path / "start", script.update
    monkeypatch.setattr(tabletop.Tabletop, "max_episode_steps", 10)
    monkeypatch.setattr(script, "update", lambda *given: batches.append(given[2]) or real(*given))
    save_policy(make_policy("vlm"), start)
    small = dict(num_envs=4, num_steps=4, num_minibatches=1, critic_layers=2, total_timesteps=80)
    small |= dict(checkpoint=str(start), run_dir=str(tmp_path / "runs"), save_model=False, eval_freq=-1)
    script.main(script.Args(env_id="tabletop_press_button", bootstrap=bootstrap, **small))
    (batch,) = batches
    assert batch.truncated.sum() >= 4 and (batch.final_value[batch.truncated] != 0).all()
    ended = batch.terminated if bootstrap else batch.terminated | batch.truncated
    given = batch.reward, batch.value, batch.next_value, ended, batch.truncated, batch.final_value, 0.95, 0.9
    assert torch.allclose(batch.advantages, definition(*given), atol=1e-5)


# --- the agent ---


def options(**changed):
    """Arguments of the script. 3 of the policy's 5 actions are executed, 3 of its 4 dimensions are real."""
    return dataclasses.replace(Args(), **HYBRID | {"chunk_len": 3} | changed)


def make_agent(critic="vlm", **changed):
    return Agent(make_policy(critic), options(critic=critic, **changed))


def modes():
    for mdp in ("hybrid", "two-layer"):
        for solver in ("euler", "cps", "exponential"):
            for K in (3, 4):
                yield dict(mdp=mdp, sde_solver=solver, denoise_steps=K, noise_level=0.7)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def velocities(agent, prefix, chain, K):
    """Of every step of a chain, each in the batch that it was sampled in: K tensors (B, H, D)."""
    with torch.no_grad():
        taus = [torch.full((len(chain),), k / K) for k in range(K)]
        return [agent.policy.velocity(prefix, chain[:, k], taus[k])[0] for k in range(K)]


def check_euler():
    """Deterministic: K Euler steps from A^0; the noise level has no say."""
    for K in (1, 3, 4):
        agent = make_agent(denoise_steps=K, noise_level=0.5)
        prefix = encode(agent.policy, 6)
        chain, _, logprob, _ = agent.act(prefix, seeded(), deterministic=True)
        assert chain.shape == (6, K + 1, 5, 4) and logprob is None
        x = chain[:, 0]
        for k in range(K):
            with torch.no_grad():
                x = x + agent.policy.velocity(prefix, x, torch.tensor([k / K] * 6))[0] / K
            assert torch.allclose(chain[:, k + 1], x, atol=1e-6)
        loud = make_agent(denoise_steps=K, noise_level=2.0)
        assert torch.equal(loud.act(prefix, seeded(), deterministic=True)[0], chain)


def check_chain():
    """The steps of a chain that are decisions are noisy, the others are the ODE's, to the bit."""
    for mode in modes():
        agent, K = make_agent(**mode), mode["denoise_steps"]
        prefix = encode(agent.policy, 12)
        chain, denoise_idx, logprob, _ = agent.act(prefix, seeded())
        S = 1 if mode["mdp"] == "hybrid" else K - (mode["sde_solver"] != "euler")
        assert chain.shape == (12, K + 1, 5, 4) and denoise_idx.shape == logprob.shape == (12, S)
        for k, velocity in enumerate(velocities(agent, prefix, chain, K)):
            ode = (chain[:, k + 1] == chain[:, k] + velocity * (1 / K)).all(dim=(1, 2))
            assert torch.equal(~ode, (denoise_idx == k).any(dim=1)), (mode, k)


def still(**changed):
    """An agent whose velocity is zero, and 4000 environments: only the sampling is left."""
    nothing = Prefix(None, torch.ones(4000, 1, dtype=torch.bool), None, None)
    policy = SimpleNamespace(
        config=TINY, env_action_dim=3, velocity=lambda prefix, x, tau: (torch.zeros_like(x), x)
    )
    return Agent(policy, options(**changed)), nothing


def check_draws():
    """Drawn for every environment, evenly over the steps that may decide (chi-square, 0.1 %)."""
    for solver, last, K, steps, bound in (
        ("euler", True, 4, 4, 16.3),
        ("euler", False, 4, 3, 13.8),
        ("cps", True, 4, 3, 13.8),
        ("exponential", True, 4, 3, 13.8),
        ("euler", False, 3, 2, 10.8),
    ):
        changed = dict(denoise_steps=K, sde_solver=solver, noisy_last_step=last)
        agent, nothing = still(noise_level=0.5, **changed)
        generator = seeded()
        first, second = (agent.act(nothing, generator)[1][:, 0] for _ in range(2))
        for drawn in (first, second):
            count, mean = torch.bincount(drawn, minlength=steps).double(), 4000 / steps
            assert len(count) == steps and ((count - mean) ** 2 / mean).sum() < bound
        for other in (first[:-1] == first[1:], first == second):
            assert abs(other.double().mean() - 1 / steps) < 0.05


def check_noise():
    """A^0 and the noise of a step are standard normal, independent of each other and from row to row."""
    for mdp, solver in (("hybrid", "euler"), ("two-layer", "euler"), ("two-layer", "cps")):
        agent, nothing = still(mdp=mdp, sde_solver=solver, noise_level=0.5)
        chain, denoise_idx, *_ = agent.act(nothing, seeded())
        drawn, rows = [chain[:, 0]], torch.arange(4000)
        for k in denoise_idx.T:
            x = chain[rows, k]
            mu, std = transition(x, torch.zeros_like(x), k / 4, 0.25, 0.5, solver)
            drawn.append((chain[rows, k + 1] - mu) / std)
        for i, z in enumerate(drawn):  # 80,000 numbers: 0.02 is more than 5 standard deviations
            assert z.mean().abs() < 0.02 and (z.std() - 1).abs() < 0.02
            assert (z[1:] * z[:-1]).mean().abs() < 0.02
            assert all((z * other).mean().abs() < 0.02 for other in drawn[:i])


def check_ratio():
    """The stored log-probability is that of the same weights later: to the bit in the same batch."""
    for mode in modes():
        agent = make_agent(**mode)
        prefix = encode(agent.policy, 12)
        chain, denoise_idx, logprob, _ = agent.act(prefix, seeded())
        single = make_agent(**mode | {"mdp": "hybrid"})  # one decision at a time: batches of the same shape
        for s in range(denoise_idx.shape[1]):
            again = single.evaluate_actions(prefix, chain, denoise_idx[:, s : s + 1])[0]
            assert ((again - logprob[:, s : s + 1]).exp() == 1).all(), mode
        for rows in torch.randperm(12, generator=seeded()).split(5):
            again = agent.evaluate_actions(prefix[rows], chain[rows], denoise_idx[rows])[0]
            assert ((again - logprob[rows]).exp() - 1).abs().max() < 1e-4, mode


def check_log_prob():
    """log-probability, and entropy per number, of torch.distributions, without padding."""
    for mode in modes():
        agent, K = make_agent(**mode), mode["denoise_steps"]
        prefix = encode(agent.policy, 12)
        chain, denoise_idx, logprob, _ = agent.act(prefix, seeded())
        velocity = velocities(agent, prefix, chain, K)
        entropies = []
        for n in range(12):
            for s, k in enumerate(denoise_idx[n].tolist()):
                x, tau = chain[n : n + 1, k], torch.tensor([k / K])
                mu, std = transition(x, velocity[k][n : n + 1], tau, 1 / K, 0.7, mode["sde_solver"])
                step = Independent(Normal(mu[0, :3, :3], std[0].expand(3, 3)), 2)
                truth = step.log_prob(chain[n, k + 1, :3, :3]).item()
                assert logprob[n, s].item() == pytest.approx(truth, abs=1e-4)
                entropies.append(step.entropy().item() / 9)
        entropy = agent.evaluate_actions(prefix, chain, denoise_idx)[1].mean().item()
        assert entropy == pytest.approx(sum(entropies) / len(entropies), abs=1e-4)


def check_value():
    """V_expert: the head on the mean feature of each step; in the hybrid MDP the steps' mean (Eq. 16)."""
    for mode in modes():
        agent, K = make_agent("expert", **mode), mode["denoise_steps"]
        prefix = encode(agent.policy, 6)
        chain, denoise_idx, _, seen = agent.act(prefix, seeded())
        with torch.no_grad():
            value, each = agent.value(prefix, seen), []
            for k in range(K):
                features = agent.policy.velocity(prefix, chain[:, k], torch.full((6,), k / K))[1]  # (B, H, W)
                each.append(agent.policy.value_head(features.mean(dim=1)))
        each = torch.stack(each, dim=1)  # (B, K)
        assert each.std(dim=1).min() > 0.01
        truth = each.mean(dim=1)[:, None] if mode["mdp"] == "hybrid" else each[:, : denoise_idx.shape[1]]
        assert value.shape == denoise_idx.shape and torch.allclose(value, truth, atol=1e-4)


def randint(change):
    return wrapped(torch, "randint", lambda f: lambda high, size, **kw: change(f, high, size, kw))


def randn(change):
    return wrapped(torch, "randn", lambda f: lambda shape, generator, **kw: change(f, shape, generator))


def density(chunk_len, action_dim):
    return wrapped(
        flow_sde_ppo, "log_prob", lambda f: lambda x, mu, std, *_: f(x, mu, std, chunk_len, action_dim)
    )


def rating(change):
    return wrapped(Agent, "evaluate_actions", lambda f: lambda self, *a: f(*change(self, *a)))


def valuing(change):
    return wrapped(Agent, "value", lambda f: lambda self, prefix, chain: f(self, prefix, change(chain)))


def ode_mean(f):
    return lambda x, velocity, tau, delta, *a: (x + velocity * delta, f(x, velocity, tau, delta, *a)[1])


def quieter(agent, *a):
    other = copy.copy(agent)
    other.noise_level = 0.69
    return other, *a


AGENT = {  # what is broken: (how, the checks that must see it)
    "one step for the whole batch": (
        randint(lambda f, high, size, kw: f(high, (1, 1), **kw).expand(size)), [check_draws],
    ),
    "the last step never drawn": (randint(lambda f, high, size, kw: f(high - 1, size, **kw)), [check_draws]),
    "the last step of CPS drawn": (randint(lambda f, high, size, kw: f(4, size, **kw)), [check_draws]),
    "all steps noisy": (wrapped(torch, "where", lambda f: lambda c, a, b: a), [check_chain]),
    "no step noisy": (wrapped(torch, "where", lambda f: lambda c, a, b: b), [check_chain, check_noise]),
    "tau of the step's end": (
        wrapped(torch, "full", lambda f: lambda size, tau, **kw: f(size, tau + 0.25, **kw)), [check_euler],
    ),
    "noise of another scale": (randn(lambda f, shape, g: 0.9 * f(shape, generator=g)), [check_noise]),
    "the same noise in every row": (
        randn(lambda f, shape, g: f((1, *shape[1:]), generator=g).expand(shape)), [check_noise],
    ),
    "the same noise in every step": (randn(lambda f, shape, g: f(shape, generator=seeded(5))), [check_noise]),
    "rated one step off": (rating(lambda agent, p, chain, k: (agent, p, chain, (k + 1) % 2)), [check_ratio]),
    "rated with another noise level": (rating(quieter), [check_ratio]),
    "the padding counts": (density(5, 4), [check_log_prob]),
    "actions that are not executed count": (density(5, 3), [check_log_prob]),
    "the mean of the ODE": (wrapped(flow_sde_ppo, "transition", ode_mean), [check_log_prob]),
    "values of the steps' ends": (valuing(lambda chain: chain.roll(-1, dims=1)), [check_value]),
    "value of A^0 only": (valuing(lambda chain: chain[:, :1].expand_as(chain)), [check_value]),
    "values in another order": (valuing(lambda chain: chain.flip(1)), [check_value]),
}  # fmt: skip  # a table
CHECKS = [check_euler, check_chain, check_draws, check_noise, check_ratio, check_log_prob, check_value]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_agent(check):
    check()


@pytest.mark.parametrize(
    "broken, check", [(broken, check) for broken, (_, checks) in AGENT.items() for check in checks]
)
def test_broken_agent_is_caught(broken, check, monkeypatch):
    AGENT[broken][0](monkeypatch)
    with pytest.raises(AssertionError):
        check()


def test_a_single_step_decides():
    """With K = 1 there is no other step than the last: it is the decision, whatever is said of the last."""
    for last in (True, False):
        agent, nothing = still(denoise_steps=1, noisy_last_step=last)
        chain, denoise_idx, logprob, _ = agent.act(nothing, seeded())
        assert (denoise_idx == 0).all() and logprob.isfinite().all()
        assert (chain[:, 1] - chain[:, 0] * 0.5).std() == pytest.approx(
            1, abs=0.05
        )  # Eq. 9: std a, mean x / 2


def test_all_noisy_steps_of_the_two_layer_mdp_decide():
    for solver, last, steps in (
        ("euler", True, 4),
        ("euler", False, 3),
        ("cps", True, 3),
        ("exponential", True, 3),
    ):
        agent, nothing = still(mdp="two-layer", sde_solver=solver, noise_level=0.5, noisy_last_step=last)
        chain, denoise_idx, logprob, _ = agent.act(nothing, seeded())
        assert denoise_idx[0].tolist() == list(range(steps)) and logprob.isfinite().all()


def test_exploration():
    """Where the velocity is zero a chunk is linear in the noise of its steps: the spread in closed form."""
    for solver, a in (("euler", 0.5), ("cps", 0.7), ("exponential", 1.0)):
        agent, nothing = still(mdp="two-layer", sde_solver=solver, noise_level=a)
        variance, one = 0.0, torch.ones(1, 1, 1)
        for k in range(agent.noisy_steps):
            slope, std = transition(one, 0 * one, torch.tensor([k / 4]), 0.25, a, solver)
            variance = slope.item() ** 2 * variance + std.item() ** 2
        assert agent.exploration(nothing, seeded()) == pytest.approx(variance**0.5, rel=0.02)


def test_act_is_seeded():
    agent = make_agent()
    prefix = encode(agent.policy, 6)
    a, b, c = (agent.act(prefix, seeded(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and not torch.equal(a[0], c[0])


@torch.no_grad()
def test_value_of_the_vlm():
    """It reads the VLM's output and the state, and nothing of the chain."""
    for mdp, S in (("hybrid", 1), ("two-layer", 4)):
        agent = make_agent(mdp=mdp)
        prefix = encode(agent.policy, 6)
        value = agent.value(prefix)
        truth = agent.policy.value_head(torch.cat([prefix.pooled, prefix.state], dim=1))
        assert value.shape == (6, S) and torch.allclose(value, truth[:, None].expand(6, S), atol=1e-6)
        assert torch.equal(agent.value(prefix, agent.act(prefix, seeded())[3]), value)
        for other in (prefix._replace(state=prefix.state + 1), prefix._replace(pooled=prefix.pooled + 1)):
            assert ((agent.value(other) - value).abs() > 1e-4).all()


def test_value_without_features():
    """The bootstrap values of V_expert denoise on their own, from the generator they are given."""
    agent = make_agent("expert")
    prefix = encode(agent.policy, 6)
    *_, features = agent.act(prefix, seeded())
    assert torch.equal(agent.value(prefix, generator=seeded()), agent.value(prefix, features))


@pytest.mark.parametrize("mdp", ["hybrid", "two-layer"])
def test_the_value_costs_no_pass_of_the_expert(mdp):
    """V_expert's value is that of its features at every stored step, to the bit; the update makes none."""
    agent = make_agent("expert", mdp=mdp)
    prefix, passes = encode(agent.policy, 6), []
    with torch.no_grad():
        chain, denoise_idx, _, features = agent.act(prefix, seeded())
        velocity = agent.policy.velocity
        again = [velocity(prefix, chain[:, k], torch.full((6,), k / agent.K))[1] for k in range(agent.K)]
        agent.policy.velocity = lambda *args: passes.append(len(args[1])) or velocity(*args)
        value = agent.value(prefix, features)
        each = agent.policy.value_head(torch.stack([x.mean(dim=1) for x in again], dim=1))  # (B, K)
    truth = each.mean(dim=1, keepdim=True) if mdp == "hybrid" else each[:, : agent.noisy_steps]
    assert not passes and torch.equal(value, truth)
    batch, args = rollout(agent), Args(update_epochs=2, num_minibatches=1, micro_batch_size=0)
    optimizer = torch.optim.SGD([{"params": agent.policy.actor_parameters(), "lr": 0.1}], lr=0.1)
    optimizer.add_param_group({"params": list(agent.policy.value_head.parameters())})
    passes.clear()
    update(agent, optimizer, batch, args, seeded())
    assert passes == [int(batch.alive.sum()) * agent.num_stochastic] * 2  # the policy's own, once an epoch


@pytest.mark.parametrize("critic", ["vlm", "expert"])
def test_critic_does_not_shape_the_policy(critic):
    agent = make_agent(critic)
    prefix = encode(agent.policy, 6)
    agent.value(prefix, agent.act(prefix, seeded())[3]).sum().backward()
    assert all(p.grad is None for p in agent.policy.actor_parameters())
    assert all(p.grad is not None for p in agent.policy.value_head.parameters())


# --- the update ---


def rollout(agent, T=3, N=8):
    """A batch as in main(), but with random advantages, returns and old values; some chunks are dead."""
    steps = [encode(agent.policy, N, seed) for seed in range(T)]
    steps = [
        Prefix(*(f.to(torch.get_default_dtype()) if f.is_floating_point() else f for f in p)) for p in steps
    ]
    generator = seeded()
    acts = zip(*(agent.act(p, generator) for p in steps))
    chain, denoise_idx, logprob, features = (torch.stack(x) for x in acts)
    S = denoise_idx.shape[2]
    alive = torch.ones(T, N, dtype=torch.bool)
    alive[1:, 2] = alive[2:, 5:] = False
    advantages, returns, value = torch.randn((3, T, N, S), generator=generator)
    return SimpleNamespace(
        prefixes=kept(agent.policy, T, N, Prefix(*map(torch.cat, zip(*steps)))),
        chain=chain,
        denoise_idx=denoise_idx,
        logprob=logprob,
        features=features,
        advantages=advantages + 1,
        returns=returns,
        value=0.3 * value,
        alive=alive,
    )


def run_update(agent, batch, rate=1.0, kind=torch.optim.SGD, train_actor=True, seed=0, **changed):
    """One update, by default one step of plain SGD with rate 1 and no limit: the gradient itself."""
    once = dict(update_epochs=1, num_minibatches=1, max_grad_norm=1e9) | changed
    groups = [agent.policy.actor_parameters(), list(agent.policy.value_head.parameters())]
    rates = rate if train_actor else 0.0, rate
    optimizer = kind([{"params": group, "lr": lr} for group, lr in zip(groups, rates)])
    return update(agent, optimizer, batch, options(**once), seeded(seed)), optimizer


def weights(agent):
    return {key: p.detach().clone() for key, p in agent.policy.named_parameters()}


def moved(agent, before):
    """Names of the weights that are not what they were, and by how much they differ at most."""
    change = {
        key: (p.detach() - before[key]).abs().max().item() for key, p in agent.policy.named_parameters()
    }
    return {key: value for key, value in change.items() if value}


@pytest.fixture
def double(monkeypatch):
    """fp64 throughout: Gemma's norm and the observations ask for float()."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def expected_losses(agent, batch, clip=0.2):
    """Policy and value loss, term by term: gains beyond the clip are not paid, losses are."""
    policy_terms, value_terms, K = [], [], 4
    live = [(t, n) for t in range(3) for n in range(8) if batch.alive[t, n]]
    seen = torch.stack([batch.advantages[t, n] for t, n in live])
    mean = seen.sum() / seen.numel()
    std = math.sqrt(((seen - mean) ** 2).sum() / seen.numel())
    for t in range(3):
        chain, prefix = batch.chain[t], turn(batch, t)
        velocity, values = velocities(agent, prefix, chain, K), agent.value(prefix, batch.features[t])
        for n in range(8):
            for s, k in enumerate(batch.denoise_idx[t, n].tolist()) if batch.alive[t, n] else ():
                x, tau = chain[n : n + 1, k], torch.tensor([k / K])
                mu, spread = transition(x, velocity[k][n : n + 1], tau, 1 / K, 1.0)
                step = Normal(mu[0, :3, :3], spread[0])
                ratio = (step.log_prob(chain[n, k + 1, :3, :3]).sum() - batch.logprob[t, n, s]).exp().item()
                advantage = ((batch.advantages[t, n, s] - mean) / (std + 1e-8)).item()
                limit = 1 + clip if advantage > 0 else 1 - clip
                beyond = ratio > limit if advantage > 0 else ratio < limit
                policy_terms.append(-advantage * (limit if beyond else ratio))
                value, old, target = (
                    v.item() for v in (values[n, s], batch.value[t, n, s], batch.returns[t, n, s])
                )
                held = min(max(value, old - clip), old + clip)
                value_terms.append(0.5 * max((value - target) ** 2, (held - target) ** 2))
    return sum(policy_terms) / len(policy_terms), sum(value_terms) / len(value_terms)


def check_gradient(mdp="hybrid", critic="vlm", micro_batch_size=0):
    """The step of an update against finite differences of the losses, for weights of actor and critic."""
    agent = make_agent(critic, mdp=mdp)
    batch = rollout(agent)
    shift = torch.tensor(
        [-0.5, -0.1, 0.1, 0.5]
    )  # of log ratios: clipped and not clipped, none near the kinks
    batch.logprob = batch.logprob + shift[torch.randint(4, batch.logprob.shape, generator=seeded())]
    before = copy.deepcopy(agent.policy.state_dict())
    metrics, _ = run_update(agent, batch, micro_batch_size=micro_batch_size)
    gradient = {key: before[key] - p.detach() for key, p in agent.policy.named_parameters()}
    agent.policy.load_state_dict(before)
    if not micro_batch_size:
        policy_loss, value_loss = expected_losses(agent, batch)
        assert metrics["losses/policy_loss"] == pytest.approx(policy_loss, abs=1e-9)
        assert metrics["losses/value_loss"] == pytest.approx(value_loss, abs=1e-9)
    actor = [key for key, p in agent.policy.named_parameters() if p.requires_grad]
    norm = torch.stack([gradient[key].norm() for key in actor if "value_head" not in key]).norm().item()
    assert metrics["flow/grad_norm"] == pytest.approx(norm, rel=1e-9)

    parameters = dict(agent.policy.named_parameters())
    names = "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"
    names = *(f"expert.{name}" for name in names), "action_in_proj", "action_out_proj", "value_head.mlp.0"
    for key in (f"{name}.weight" for name in names):
        largest = gradient[key].abs().flatten().topk(20).indices  # a difference of zeros would tell nothing
        i = largest[torch.randint(20, (1,), generator=seeded())].item()
        losses = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameters[key].view(-1)[i] += step
                policy_loss, value_loss = expected_losses(agent, batch)
                losses.append(value_loss if "value_head" in key else policy_loss)  # neither sees the other's
                parameters[key].view(-1)[i] -= step
        slope = gradient[key].flatten()[i].item()  # SGD with rate 1
        assert abs(slope) > 1e-5 and slope == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4), key


GRADIENT = {
    "max in place of min": wrapped(torch, "min", lambda f: torch.max),
    "not clipped": wrapped(torch, "min", lambda f: lambda a, b: a),
    "always clipped": wrapped(torch, "min", lambda f: lambda a, b: b),
    "the smaller value error": wrapped(torch, "max", lambda f: torch.minimum),
    "log-prob averaged": wrapped(flow_sde_ppo, "log_prob", lambda f: lambda *a: f(*a) / 9),
    "advantages not scaled": wrapped(torch.Tensor, "std", lambda f: lambda *a, **kw: torch.ones(())),
    "advantages not centred": wrapped(
        torch.Tensor, "mean", lambda f: lambda x, *a, **kw: f(x, *a, **kw) * (x.requires_grad or x.dim() > 2)
    ),
    "the dead are alive": wrapped(torch.Tensor, "nonzero", lambda f: lambda self: f(torch.ones_like(self))),
    "chains of other rows": rating(lambda agent, p, chain, k: (agent, p, chain.roll(1, 0), k)),
    "values of other rows": wrapped(Agent, "value", lambda f: lambda *a: f(*a).roll(1, 0)),
    "the last micro batch is lost": wrapped(torch.Tensor, "split", lambda f: lambda self, n: f(self, 8)[:1]),
}


@pytest.mark.parametrize(
    "mdp, critic, micro", [("hybrid", "vlm", 0), ("two-layer", "expert", 0), ("hybrid", "expert", 8)]
)
def test_gradient(double, mdp, critic, micro):
    check_gradient(mdp, critic, micro)


@pytest.mark.parametrize("broken", GRADIENT)
def test_broken_gradient_is_caught(double, broken, monkeypatch):
    batch = rollout(make_agent())
    monkeypatch.setattr(f"{__name__}.rollout", lambda agent: batch)
    GRADIENT[broken](monkeypatch)
    with pytest.raises(AssertionError):
        check_gradient()


def test_losses_by_hand():
    """Four chunks with ratios 1/2, 1/2, 3/2, 3/2 and advantages that are normalised already."""

    def worthless():
        agent = make_agent()
        agent.policy.value_head = None
        agent.policy.need_value_head("vlm", 2)  # V = 0
        return agent

    agent, a = worthless(), 1.0
    batch = rollout(agent, T=1, N=4)
    batch.alive[:] = True
    batch.advantages = torch.tensor([a, -a, a, -a]).view(1, 4, 1)
    batch.logprob = batch.logprob - torch.tensor([0.5, 0.5, 1.5, 1.5]).log().view(1, 4, 1)
    batch.value = torch.ones(1, 4, 1)
    batch.returns = torch.tensor([2.0, -1.0, 0.9, 0.0]).view(1, 4, 1)
    metrics, _ = run_update(agent, batch)
    # the clip holds back what is gained by the second (0.8) and the third (1.2), not what the others lose
    assert metrics["losses/policy_loss"] == pytest.approx(-a * (0.5 - 0.8 + 1.2 - 1.5) / 4, abs=1e-4)
    assert metrics["losses/clipfrac"] == 1
    kl = (2 * (-0.5 + math.log(2)) + 2 * (0.5 - math.log(1.5))) / 4
    assert metrics["losses/approx_kl"] == pytest.approx(kl, abs=1e-4)
    # V = 0 and was 1, so it is held at 0.8: errors 2 and 1.2; 1 and 1.8; 0.9 and 0.1; 0 and 0.8
    assert metrics["losses/value_loss"] == pytest.approx(0.5 * (4 + 3.24 + 0.81 + 0.64) / 4, abs=1e-6)
    unclipped, _ = run_update(worthless(), batch, clip_vloss=False)
    assert unclipped["losses/value_loss"] == pytest.approx(0.5 * (4 + 1 + 0.81 + 0) / 4, abs=1e-6)
    # 1 - var(returns - V) / var(returns), V constant
    assert metrics["losses/explained_variance"] == pytest.approx(0, abs=1e-6)
    batch.value = batch.returns.clone()
    assert run_update(make_agent(), batch)[0]["losses/explained_variance"] == pytest.approx(1, abs=1e-6)


def test_first_step_has_ratio_one():
    agent = make_agent()
    metrics, _ = run_update(agent, rollout(agent))
    assert metrics["losses/clipfrac"] == 0 and abs(metrics["losses/approx_kl"]) < 1e-6
    assert abs(metrics["losses/policy_loss"]) < 1e-5  # minus the mean of normalised advantages
    assert metrics["flow/grad_norm"] > 0.01


def test_std_mean():
    """sqrt(delta) sigma at K = 4, a = 1: 1, sqrt(3) / 2, 1 / 2, 1 / (2 sqrt(3))."""
    agent = make_agent(mdp="two-layer")
    truth = (1 + math.sqrt(3) / 2 + 0.5 + 0.5 / math.sqrt(3)) / 4
    assert run_update(agent, rollout(agent))[0]["flow/std_mean"] == pytest.approx(truth, abs=1e-5)


@pytest.mark.parametrize("mdp, critic", [("hybrid", "vlm"), ("two-layer", "expert")])
def test_micro_batches(mdp, critic):
    """A few chunks at a time: the same steps as with all; with more minibatches they are others."""
    agents = [make_agent(critic, mdp=mdp) for _ in range(3)]
    batch = rollout(agents[0])
    several = dict(rate=0.05, update_epochs=2, num_minibatches=2, max_grad_norm=0.5)
    for agent, other in zip(agents, ({}, {"micro_batch_size": 5}, {"num_minibatches": 4})):
        run_update(agent, batch, **several | other)
    truth = weights(agents[0])
    assert (
        max(moved(agents[1], truth).values(), default=0) < 1e-5 < 1e-3 < max(moved(agents[2], truth).values())
    )


def test_dead_chunks_do_not_count():
    agents = [make_agent() for _ in range(3)]
    batch = rollout(agents[0])
    other = copy.deepcopy(batch)
    for name in ("chain", "logprob", "advantages", "returns", "value"):
        getattr(other, name)[~batch.alive] = math.nan
    metrics = [
        run_update(agent, b, num_minibatches=2, update_epochs=2)[0]
        for agent, b in zip(agents, (batch, other))
    ]
    assert metrics[0] == metrics[1] and not moved(agents[1], weights(agents[0]))
    other.alive[:] = True  # and if they did count, it would be seen
    with pytest.raises(SystemExit, match="1"):  # three steps without a finite gradient
        run_update(agents[2], other, num_minibatches=2, update_epochs=2)


@pytest.mark.parametrize("alive, num_minibatches", [(1, 1), (1, 2), (3, 4)])
def test_few_chunks(alive, num_minibatches):
    """Without partial resets most of a batch can be dead: fewer chunks than minibatches, or only one."""
    agent = make_agent()
    batch = rollout(agent)
    batch.alive[:] = False
    batch.alive[0, :alive] = True
    metrics, _ = run_update(agent, batch, num_minibatches=num_minibatches)
    assert math.isfinite(metrics["losses/policy_loss"]) and all(
        p.isfinite().all() for p in agent.policy.parameters()
    )


def test_what_moves():
    """The action expert and the value head, not the VLM; in the critic's warm-up only the value head."""
    for critic in ("vlm", "expert"):
        for train_actor in (True, False):
            agent = make_agent(critic)
            batch, before = rollout(agent), weights(agent)
            run_update(agent, batch, rate=1e-3, kind=torch.optim.AdamW, train_actor=train_actor)
            parts = {key.split(".")[0] for key in moved(agent, before)}
            vlm = {"vision_tower", "multi_modal_projector", "language_model"}
            assert parts == ({key.split(".")[0] for key in before} - vlm if train_actor else {"value_head"})


def test_warm_up_leaves_no_trace_in_the_actor():
    """Its moments stay empty while only the critic is trained: its first step is a new optimiser's."""
    agent = make_agent()
    batch = rollout(agent)
    _, optimizer = run_update(agent, batch, rate=1e-3, kind=torch.optim.AdamW, train_actor=False)
    actor = {id(p) for p in agent.policy.actor_parameters()}
    assert optimizer.state and not any(id(p) in actor for p in optimizer.state)


def test_metrics_are_means_over_chunks():
    """Whatever the sizes of minibatches and micro-batches: 20 live chunks in parts of about 7, or of 7."""
    agents = [make_agent() for _ in range(3)]
    batch = rollout(agents[0])
    whole = run_update(agents[0], batch, rate=0.0)[0]
    for agent, parts in zip(agents[1:], ({"num_minibatches": 3}, {"micro_batch_size": 7})):
        metrics = run_update(agent, batch, rate=0.0, **parts)[0]
        for name in ("losses/value_loss", "losses/entropy", "flow/std_mean", "losses/policy_loss"):
            assert metrics[name] == pytest.approx(whole[name], abs=1e-5), name


def test_equal_returns_are_explained_by_nothing():
    agent = make_agent()
    batch = rollout(agent)
    batch.returns[:] = 0.5
    batch.value[:] = 0.25
    assert run_update(agent, batch)[0]["losses/explained_variance"] == 1  # a constant error varies as little
    batch.value = torch.randn(batch.value.shape)
    assert -math.inf < run_update(agent, batch)[0]["losses/explained_variance"] < 0


def test_critic_learns():
    agent = make_agent()
    batch = rollout(agent)
    many = dict(rate=1e-3, kind=torch.optim.AdamW, train_actor=False, update_epochs=30, clip_vloss=False)
    losses = [run_update(agent, batch, **many)[0]["losses/value_loss"] for _ in range(3)]
    assert losses[2] < 0.5 * losses[0]


def test_target_kl():
    """An epoch that goes too far is the last one; by default all are run."""
    for target, steps in ((None, 10), (1e9, 10), (1e-6, 2)):
        agent = make_agent()
        _, optimizer = run_update(
            agent,
            rollout(agent),
            1e-3,
            torch.optim.Adam,
            update_epochs=5,
            num_minibatches=2,
            target_kl=target,
        )
        assert {int(state["step"]) for state in optimizer.state.values()} == {steps}


def test_gradient_limit():
    """Actor and critic have a limit each: neither shrinks the other's step."""
    for limit in (1e-3, 1e-2):
        agent = make_agent()
        batch, before = rollout(agent), weights(agent)
        run_update(agent, batch, max_grad_norm=limit)
        steps = {True: [], False: []}
        for key, p in agent.policy.named_parameters():
            steps[key.startswith("value_head")].append((p.detach() - before[key]).norm())
        for part in steps.values():
            assert torch.stack(part).norm().item() == pytest.approx(limit, rel=0.01)


def test_every_epoch_is_shuffled_afresh():
    agent, seen = make_agent(), []
    batch, real = rollout(agent), agent.evaluate_actions

    def spy(prefix, chain, denoise_idx):
        seen.append(chain[:, 0, 0, 0].tolist())
        return real(prefix, chain, denoise_idx)

    agent.evaluate_actions = spy
    run_update(agent, batch, rate=0.0, update_epochs=2, num_minibatches=2)
    everything = sorted(batch.chain[batch.alive][:, 0, 0, 0].tolist())
    first, second = seen[0] + seen[1], seen[2] + seen[3]
    assert first != second and sorted(first) == sorted(second) == everything


# --- where the prefixes are kept ---


def check_prefixes(T=3, N=8):
    """On the device, in host memory, encoded again, and all three at once: the same, whichever rows are asked
    for; and what is kept has the bytes that were given."""
    policy = make_policy("vlm")
    inputs = [policy.preprocess(observe(N, seed)) for seed in range(T)]
    with torch.no_grad():
        prefixes = [policy.encode(x) for x in inputs]
    every = Prefix(*map(torch.cat, zip(*prefixes)))
    size = sum(field[0].nbytes for field in every)
    gb = 9.5 * size / 2**30  # room for nine
    for room, counts in {
        (None, None): (24, 0, 0),
        (gb, None): (9, 15, 0),
        (gb, gb): (9, 9, 6),
        (0, gb): (0, 9, 15),
        (0, 0): (0, 0, 24),
    }.items():
        stored = Prefixes(policy, T, N, prefixes[0], inputs[0], *room)
        for t in range(T):
            stored.put(t, prefixes[t], inputs[t])
        assert tuple(last - first for first, last, _ in stored.parts) == counts
        for (_, _, fields), count in zip(stored.parts[:2], counts):
            assert sum(field.nbytes for field in fields.values()) == count * size
        batches = torch.randperm(24, generator=seeded()).split(7)
        found = list(stored.encoded(policy, batches))
        for rows, (asked, prefix) in zip(batches, found, strict=True):
            assert torch.equal(rows, asked)
            for field, truth in zip(prefix, every):
                assert torch.allclose(field, truth[rows], atol=1e-5)


def test_prefixes():
    check_prefixes()


@pytest.mark.parametrize(
    "damage",
    [
        wrapped(Prefixes, "_join", lambda f: lambda self, policy, found: f(self, policy, found[:1])),
        wrapped(torch.Tensor, "argsort", lambda f: lambda x: torch.arange(len(x))),
        wrapped(Prefixes, "put", lambda f: lambda self, t, *given: f(self, min(t, 1), *given)),
    ],
    ids=["one part alone", "in the order of the parts", "the last turn is lost"],
)
def test_broken_prefixes_are_caught(monkeypatch, damage):
    damage(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check_prefixes()


def test_prefixes_are_fetched_ahead(monkeypatch):
    """From host memory the next ones are fetched while those before them are in use, in another thread."""
    policy, names = make_policy("vlm"), []
    prefix = encode(policy, 6)
    fetch = Prefixes._fetch
    stored = Prefixes(policy, 1, 6, prefix, {}, 0)
    stored.put(0, prefix, {})

    def told(self, rows):
        names.append(rows.tolist())
        return fetch(self, rows)

    monkeypatch.setattr(Prefixes, "_fetch", told)
    for i, _ in enumerate(stored.encoded(policy, torch.arange(6).split(2))):
        stored.fetcher.submit(int).result()  # what was asked for before is there
        assert len(names) == min(i + 2, 3)


@pytest.mark.parametrize("critic", ["vlm", "expert"])
def test_update_is_the_same_wherever_prefixes_are_kept(critic):
    """The device, host memory, or encoded again: the same losses, and the same weights after two epochs."""
    ends, T, N = [], 3, 8
    each = sum(field.nbytes for field in encode(make_policy(critic), 1)) / 2**30
    modes = {(None, None): [24, 0, 0], (0, None): [0, 24, 0], (0, 0): [0, 0, 24]}
    for room, counts in (modes | {(9.5 * each, 9.5 * each): [9, 9, 6]}).items():
        agent = make_agent(critic)
        batch, policy = rollout(agent), agent.policy
        stored = Prefixes(policy, T, N, turn(batch, 0), policy.preprocess(observe(N)), *room)
        for t in range(T):
            stored.put(t, turn(batch, t), policy.preprocess(observe(N, t)))
        batch.prefixes, few = stored, dict(update_epochs=2, num_minibatches=2, micro_batch_size=5)
        metrics, _ = run_update(agent, batch, rate=1e-3, **few)
        ends.append((metrics, weights(agent)))
        assert [last - first for first, last, _ in stored.parts] == counts
    for metrics, after in ends[1:]:
        assert metrics == pytest.approx(ends[0][0], rel=1e-3, abs=1e-5)
        for name, weight in after.items():
            assert torch.allclose(weight, ends[0][1][name], atol=1e-6), name
