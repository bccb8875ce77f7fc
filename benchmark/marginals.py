"""The numbers of docs/math.md. Above all: does a stochastic sampler of a flow end where the flow's ODE ends?

The flow's target is a 2-D Gaussian mixture, so velocity and score are known in closed form and there is no
network to blame. The distance is the sliced Wasserstein-1 distance: W1 of the projections on a line, averaged
over 32 directions, 100,000 samples a side. It is taken to the ODE with the same number of steps K, because
that is what evaluation runs while training samples; and once more to the mixture itself. Seeded.

    python benchmark/marginals.py    # about half a minute on one core; prints Markdown
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from flow_sde_ppo import transition

WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
MEANS = torch.tensor([[-0.8, -0.4], [0.7, 0.6], [0.3, -0.8]])  # (J, 2)
STDS = torch.tensor([0.15, 0.25, 0.1])  # of the isotropic components, (J,)


def log_density(x, tau):
    """log q_tau(x), x (B, 2): x^tau = tau A + (1 - tau) noise is a mixture too, of N(tau m_j, V_j I)."""
    variance = tau**2 * STDS.to(x) ** 2 + (1 - tau) ** 2  # V (J,)
    sq_dist = ((x[:, None] - tau * MEANS.to(x)) ** 2).sum(dim=2)  # (B, J)
    logits = WEIGHTS.to(x).log() - torch.log(2 * math.pi * variance) - sq_dist / (2 * variance)  # (B, J)
    return logits.logsumexp(dim=1)


def mixture_velocity(x, tau):
    """E[A - noise | x^tau = x], x (B, 2): linear within a component, averaged by the responsibilities."""
    variance = tau**2 * STDS.to(x) ** 2 + (1 - tau) ** 2  # V (J,)
    offset = x[:, None] - tau * MEANS.to(x)  # (B, J, 2)
    logits = WEIGHTS.to(x).log() - torch.log(variance) - (offset**2).sum(dim=2) / (2 * variance)  # (B, J)
    slope = (tau * STDS.to(x) ** 2 - (1 - tau)) / variance  # cov(A - noise, x^tau) / V, (J,)
    return (logits.softmax(dim=1)[..., None] * (MEANS.to(x) + slope[:, None] * offset)).sum(dim=1)


def printed(x, velocity, tau, delta, noise_level, solver="euler"):
    """Eq. 9 as printed, in the paper's own clock; with a negative delta it runs in the opposite one."""
    tau = tau[:, None, None]
    sigma = noise_level * torch.sqrt(tau / (1 - tau))
    factor = noise_level**2 / (2 * (1 - tau))  # sigma^2 / (2 tau), without its 0/0 at tau = 0
    return x + (velocity + factor * (x + (1 - tau) * velocity)) * delta, sigma * math.sqrt(abs(delta))


def uncorrected(x, velocity, tau, delta, noise_level, solver="euler"):
    """The noise of `transition`, but not the drift that makes up for it."""
    return x + velocity * delta, transition(x, velocity, tau, delta, noise_level, solver)[1]


def flow_noise(x, velocity, tau, delta, noise_std, solver="euler"):
    """Eq. 4, with the same standard deviation everywhere."""
    return x + velocity * delta, noise_std


def from_mixture(n=100_000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    component = torch.multinomial(WEIGHTS, n, replacement=True, generator=generator)
    return MEANS[component] + STDS[component, None] * torch.randn((n, 2), generator=generator)


def sample(step, K, noise_level=0.0, solver="euler", hybrid=False, n=100_000, seed=1):
    """End points (n, 2) of K steps from noise. step None: the ODE; hybrid: one drawn step per sample."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((n, 2), generator=generator)
    chosen = torch.randint(K - (solver == "cps"), (n, 1), generator=generator)  # cps: no noise at the end
    for k in range(K):
        velocity = mixture_velocity(x, k / K)
        ode = x + velocity / K
        if step is None:
            x = ode
            continue
        mu, std = step(x[:, None], velocity[:, None], torch.full((n,), k / K), 1 / K, noise_level, solver)
        noisy = (mu + std * torch.randn((n, 1, 2), generator=generator))[:, 0]
        x = torch.where(chosen == k, noisy, ode) if hybrid else noisy
    return x


def projections(x, directions=32):
    angle = torch.arange(directions) * math.pi / directions
    return np.sort((torch.stack([angle.cos(), angle.sin()], dim=1) @ x.T).numpy(), axis=1)  # (directions, n)


def sliced_w1(x, y):
    return np.abs(projections(x) - projections(y)).mean()


def gaussian_variance(K, noise_level, solver, noisy_steps, mean=0.7, std=0.3):
    """Exact variance of x^1 for the target N(mean, std^2): a step is affine, so two points tell its slope."""
    x, variance = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None], 1.0
    for k in range(K):
        tau, a = k / K, noise_level if k in noisy_steps else 0.0
        slope = (tau * std**2 - (1 - tau)) / (tau**2 * std**2 + (1 - tau) ** 2)
        velocity = mean + slope * (x - tau * mean)
        mu, noise_std = transition(x, velocity, torch.full((2,), tau, dtype=x.dtype), 1 / K, a, solver)
        variance = ((mu[1] - mu[0]) ** 2 * variance + noise_std[0] ** 2).item()
    return variance


def table(title, columns, rows):
    print(f"\n| {title} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(c if isinstance(c, str) else f'{c:.3f}' for c in cells)} |")


def erratum_1(a=0.5, steps=(4, 10, 100)):
    print("## Erratum 1: the clock of Eqs. 7-9")
    rows = {"the score, here": [], "the score, as printed": [], "Eq. 9 as printed but run from 1 to 0": []}
    taus = (0.1, 0.3, 0.5, 0.7, 0.9)
    for tau in taus:
        noise = torch.randn((1000, 2), generator=torch.Generator().manual_seed(1)).double()
        x = (tau * from_mixture(1000).double() + (1 - tau) * noise).requires_grad_()  # (B, 2)
        score = torch.autograd.grad(log_density(x, tau).sum(), x)[0]
        x = x.detach()
        velocity, t = mixture_velocity(x, tau), torch.full((1000,), tau, dtype=x.dtype)
        mu, std = transition(x[:, None], velocity[:, None], t, 0.05, a)
        # the other clock: time 1 - tau, velocity noise - action, steps of -delta
        mu_turned, std_turned = printed(x[:, None], -velocity[:, None], 1 - t, -0.05, a)
        size = score.square().mean().sqrt()
        differences = (
            (-(x - tau * velocity) / (1 - tau) - score) / size,
            (-x / tau - (1 - tau) / tau * velocity - score) / size,
            torch.cat([(mu - mu_turned).flatten(), (std - std_turned).flatten()]),
        )
        for cells, difference in zip(rows.values(), differences):
            cells.append(f"{difference.square().mean().sqrt():.1e}")
    title = "root mean square error (a score: relative; Eq. 9: from `transition`)"
    table(title, [f"tau = {tau}" for tau in taus], rows)

    samplers = {
        "Eq. 9 as printed": (printed,),
        "noise without drift correction": (uncorrected,),
        "`transition`, euler": (transition, "euler"),
        "`transition`, euler, hybrid": (transition, "euler", True),
        "`transition`, cps": (transition, "cps"),
        "`transition`, cps, hybrid": (transition, "cps", True),
    }
    floor = "floor: the reference, sampled again"
    to_ode, to_target = {name: [] for name in samplers}, {name: [] for name in samplers}
    to_target["the ODE"], to_ode[floor], to_target[floor] = [], [], []
    for K in steps:
        ode, mixture = sample(None, K, seed=0), from_mixture()
        for name, (step, *solver) in samplers.items():
            x = sample(step, K, a, *solver)
            to_ode[name].append(sliced_w1(x, ode))
            to_target[name].append(sliced_w1(x, mixture))
        to_target["the ODE"].append(sliced_w1(ode, mixture))
        to_ode[floor].append(sliced_w1(sample(None, K), ode))
        to_target[floor].append(sliced_w1(from_mixture(seed=1), mixture))
    columns = [f"K = {K}" for K in steps]
    table(f"sliced W1 to the ODE with the same K, a = {a}", columns, to_ode)
    table(f"sliced W1 to the mixture itself, a = {a}", columns, to_target)


def discretisation(steps=(4, 10, 100, 1000)):
    print("\n## Discretisation")
    rows = {}
    for solver in ("euler", "cps"):
        for K in (1, 2, 4):
            tau, x = torch.arange(K) / K, torch.zeros((K, 1, 1))
            stds = transition(x, x, tau, 1 / K, 0.5, solver)[1].flatten().tolist()
            rows[f"{solver}, K = {K}"] = stds + [""] * (4 - K)
    table("standard deviation of a step, a = 0.5", [f"k = {k}" for k in range(4)], rows)
    rows = {"ODE": [gaussian_variance(K, 0.0, "euler", ()) / 0.3**2 for K in steps]}
    for a in (0.5, 1.0):
        for solver in ("euler", "cps"):
            rows[f"{solver}, a = {a}"] = [gaussian_variance(K, a, solver, range(K)) / 0.3**2 for K in steps]
            for name, k in (("first", lambda K: 0), ("middle", lambda K: K // 2)):
                variances = [gaussian_variance(K, a, solver, (k(K),)) / 0.3**2 for K in steps]
                rows[f"{solver}, a = {a}, noise at the {name} step only"] = variances
    table("variance / target's variance, 1-D Gaussian, exact", [f"K = {K}" for K in steps], rows)


def erratum_2(K=4):
    print("\n## Erratum 2: the noise bounds of Flow-Noise")
    ode = sample(None, K, seed=0)
    rows = {}
    for bound in (0.08, 0.16):
        for name, std in (("the standard deviation", bound), ("the log-variance", math.exp(bound / 2))):
            rows[f"{bound} is {name}"] = [std, sliced_w1(sample(flow_noise, K, std), ode)]
    last = transition(ode[:1, None], ode[:1, None], torch.tensor([1 - 1 / K]), 1 / K, 0.5)[1].item()
    for name, hybrid in (("Flow-SDE, a = 0.5 (its last std)", False), ("the same, hybrid", True)):
        rows[name] = [last, sliced_w1(sample(transition, K, 0.5, hybrid=hybrid), ode)]
    table("the bounds of Table 7 for pi0", ["std of a step", f"sliced W1 to the ODE, K = {K}"], rows)


def erratum_3(clip_coef=0.2):
    print("\n## Erratum 3: sum or mean over the K + 1 terms of Eq. 5")
    low, high = 1 - clip_coef, 1 + clip_coef
    rows = {f"K = {K}": [f"{low ** (K + 1):.3f} ... {high ** (K + 1):.3f}", 1 / (K + 1)] for K in (3, 4, 5)}
    columns = [f"joint ratio where {low} ... {high} clips", "gradient at ratio 1 / that of the sum"]
    table("mean", columns, rows)


def erratum_4(group=8):
    print("\n## Erratum 4: Eq. 17 for a group of equal rewards")
    rewards = torch.ones(group)
    rows = {"Eq. 17 as printed": [f"advantage {((rewards - rewards.mean()) / rewards.std())[0]}"]}
    rows["with + 1e-6"] = [f"advantage {((rewards - rewards.mean()) / (rewards.std() + 1e-6))[0]}"]
    for p in (0.5, 0.9, 0.98):
        rows[f"groups without a signal at success rate {p}"] = [f"{p**group + (1 - p) ** group:.1%}"]
    table(f"groups of {group}", ["value"], rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    erratum_1()
    discretisation()
    erratum_2()
    erratum_3()
    erratum_4()
