"""Noisy steps of one family (docs/math.md, section 6): how far from the ODE, for how much exploration?

Exploration e is the standard deviation of the end x^1 given the noise x^0 that it started from; the spread S
is that of the ODE's end over x^0. Both are of a number of the chunk. A level a means another thing in every
solver, so each has its own, for the same e. Exact for a 1-D Gaussian target, whose steps are affine; sampled
for the 2-D mixture of marginals.py; measured on the shipped SFT policy of the tabletop.

    python benchmark/solvers.py    # two to three minutes on one core; Markdown
"""

import sys
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from marginals import gaussian_end, sample, sliced_w1, table

import flow_noise_ppo
import flow_sde_ppo
from envs import make_envs
from evaluate import spreads
from flow_sde_ppo import transition
from pi_models import load_policy

STEPS = (2, 4, 8, 40)
SAMPLERS = {  # solver, one drawn step or all, may the last be noisy
    f"{solver}, {'one drawn step' if hybrid else 'all steps'}{'' if last else ' but never the last'}": (
        solver,
        hybrid,
        last,
    )
    for hybrid in (False, True)
    for solver, last in (("euler", True), ("euler", False), ("cps", True), ("exponential", True))
}


def exact(K, a, solver, hybrid, last):
    """e and the standard deviation of x^1, 1-D Gaussian target."""
    noisy = range(K if last and solver == "euler" else K - 1)
    draws = [(k,) for k in noisy] if hybrid else [tuple(noisy)]
    slope, offset, variance = np.array([gaussian_end(K, a, solver, draw) for draw in draws]).T
    given = variance.mean() + slope.var() + offset.var()  # E over x^0 ~ N(0, 1), which step is drawn counts
    return given**0.5, (variance.mean() + (slope**2).mean() + offset.var()) ** 0.5


def sampled(K, a, solver, hybrid, last, n=10_000):
    """e of the mixture's samples, by pairs with the same x^0."""
    x = torch.randn((n, 2), generator=torch.Generator().manual_seed(0))
    one, two = (sample(transition, K, a, solver, hybrid, n, seed, last, x) for seed in (1, 2))
    return (0.5 * (one - two) ** 2).mean().sqrt().item()


def level_for(explores, target, solver):
    """The least a with explores(a) = target, by bisection; None if there is none."""
    high = 0.25
    while explores(high) < target:
        high += 0.25
        if high > (1 if solver == "cps" else 4):
            return None
    low = high - 0.25
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if explores(middle) < target else (low, middle)
    return high


def equal_exploration(share):
    """Per sampler and K: the level a, and how far the end is from the ODE's."""
    ends = {name: [] for name in SAMPLERS}
    distances = {name: [] for name in [*SAMPLERS, "floor: the ODE, sampled again"]}
    for K in STEPS:
        S = abs(gaussian_end(K, 0.0, "euler", ())[0])
        ode = sample(None, K, seed=0)
        own = ode.std(dim=0).square().mean().sqrt().item()
        for name, sampler in SAMPLERS.items():
            a = level_for(lambda a: exact(K, a, *sampler)[0], share * S, sampler[0])
            cell = "-" if a is None else f"{exact(K, a, *sampler)[1] / S:.3f} ({a:.2f})"
            ends[name].append(cell)
            a = level_for(lambda a: sampled(K, a, *sampler), share * own, sampler[0])
            solver, hybrid, last = sampler
            x = None if a is None else sample(transition, K, a, solver, hybrid, last=last)
            distances[name].append("-" if a is None else f"{sliced_w1(x, ode):.3f} ({a:.2f})")
        distances["floor: the ODE, sampled again"].append(sliced_w1(sample(None, K), ode))
    columns = [f"K = {K}" for K in STEPS]
    table(f"e = {share} S: std of the end / the ODE's (a), 1-D Gaussian, exact", columns, ends)
    table(f"e = {share} S: sliced W1 to the ODE (a), 2-D mixture", columns, distances)


def limit(K=4):
    """Exploration is bought with distance: W2 >= e - S."""
    S, rows = abs(gaussian_end(K, 0.0, "euler", ())[0]), {}
    for solver in ("euler", "cps", "exponential"):
        for a in (0.5, 0.7, 1.0) if solver != "exponential" else (0.5, 0.7, 1.0, 2.0):
            e, std = exact(K, a, solver, False, True)
            rows[f"{solver}, a = {a}"] = [e / S, abs(std - S) / S, max(e - S, 0) / S]  # of two normals
    table(f"in units of S: 1-D Gaussian, K = {K}, all steps, exact", ["e", "W2 to the ODE", "e - S"], rows)


def convergence(a=0.5):
    """At a fixed level the exponential step converges, and Flow-CPS does not."""
    rows = {name: [] for name in [*SAMPLERS, "floor: the ODE, sampled again"]}
    for K in STEPS:
        ode = sample(None, K, seed=0)
        for name, (solver, hybrid, last) in SAMPLERS.items():
            rows[name].append(sliced_w1(sample(transition, K, a, solver, hybrid, last=last), ode))
        rows["floor: the ODE, sampled again"].append(sliced_w1(sample(None, K), ode))
    table(f"sliced W1 to the ODE, 2-D mixture, a = {a}", [f"K = {K}" for K in STEPS], rows)


def shipped_policy():
    """e and S of the tabletop's SFT policy, in standard deviations of the demonstrations' actions."""
    envs, checkpoint = make_envs("tabletop", 500, 0, partial_reset=False), flow_sde_ppo.Args.checkpoint
    policy = load_policy(checkpoint, "cpu")
    policy.fit_prompts(envs.prompts)
    rows, usual = {}, {"mdp": "hybrid", "noisy_last_step": True}
    for flags in (
        {"noise_level": 1.0},
        {"noise_level": 0.7},
        {"noise_level": 0.5},
        {"noise_level": 1.0, "noisy_last_step": False},
        {"noise_level": 0.7, "noisy_last_step": False, "mdp": "two-layer"},
        {"noise_level": 1.0, "sde_solver": "cps"},
        {"noise_level": 1.0, "sde_solver": "exponential"},
        {"noise_level": 2.0, "sde_solver": "exponential"},
    ):
        name = " ".join(f"--no-{n}" if x is False else f"--{n} {x}" for n, x in flags.items())
        played = [flow_sde_ppo.Args(denoise_steps=K, **usual | flags) for K in (2, 4)]
        agents = [flow_sde_ppo.Agent(policy, args) for args in played]
        rows[f"`{name.replace('_', '-')}`"] = [spreads(agent, envs)[1] for agent in agents]
    for std in (0.113, 0.346):  # the geometric middles of the paper's bounds and of the default ones
        policy.need_noise_head(std, std)
        agents = [flow_noise_ppo.Agent(policy, flow_noise_ppo.Args(denoise_steps=K)) for K in (2, 4)]
        found = [spreads(agent, envs)[1] for agent in agents]
        rows[f"Flow-Noise, standard deviation {std}"] = [f"{e:.3f} = {e / std:.2f} x {std}" for e in found]
    rows["the ODE over x^0: S"] = [spreads(agent, envs)[0] for agent in agents]
    table("e of the tabletop's SFT policy", ["K = 2", "K = 4"], rows)


def main():
    torch.set_num_threads(1)
    shipped_policy()
    limit()
    convergence()
    equal_exploration(share=0.6)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
