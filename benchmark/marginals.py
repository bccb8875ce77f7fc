"""The numbers of docs/math.md. Above all: does a stochastic sampler of a flow end where the flow's ODE ends?

The flow's target is a 2-D Gaussian mixture, so velocity and score are known in closed form and there is no
network to blame. The distance is the sliced Wasserstein-1 distance: W1 of the projections on a line, averaged
over 32 directions, 100,000 samples a side. It is taken to the ODE with the same number of steps K, because
that is what evaluation runs while training samples; and once more to the mixture itself. Seeded.

Then: how much of the gradient of the return the score terms are (a 1-D flow, no sampling), what noise on
padding does to the executed actions (the shipped tiny policy), and the errata. All as Markdown tables.

    python benchmark/marginals.py    # about a minute on one core
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from flow_sde_ppo import log_prob, transition

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


def sample(step, K, noise_level=0.0, solver="euler", hybrid=False, n=100_000, seed=1, last=True, x=None):
    """End points (n, 2) of K steps from x or noise. step None: the ODE; hybrid: one drawn step per sample.

    last: whether the last step may be noisy, which is Euler's alone.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((n, 2), generator=generator) if x is None else x
    noisy_steps = K if last and solver == "euler" else K - 1
    chosen = torch.randint(noisy_steps, (n, 1), generator=generator)
    for k in range(K):
        velocity = mixture_velocity(x, k / K)
        ode = x + velocity / K
        if step is None or k >= noisy_steps:
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


def gaussian_end(K, noise_level, solver, noisy_steps, mean=0.7, std=0.3):
    """For the target N(mean, std^2), exact: x^1 = slope x^0 + offset + noise; and the noise's variance.

    A step is affine, so two points tell it.
    """
    unit, slope, offset, variance = torch.tensor([0.0, 1.0]).double()[:, None, None], 1.0, 0.0, 0.0
    for k in range(K):
        tau, a = k / K, noise_level if k in noisy_steps else 0.0
        steepness = (tau * std**2 - (1 - tau)) / (tau**2 * std**2 + (1 - tau) ** 2)
        velocity = mean + steepness * (unit - tau * mean)
        mu, noise_std = transition(unit, velocity, torch.full((2,), tau).double(), 1 / K, a, solver)
        low, high = mu.flatten().tolist()
        slope, offset = (high - low) * slope, low + (high - low) * offset
        variance = (high - low) ** 2 * variance + noise_std[0].item() ** 2
    return slope, offset, variance


def gaussian_variance(K, noise_level, solver, noisy_steps):
    slope, _, variance = gaussian_end(K, noise_level, solver, noisy_steps)
    return slope**2 + variance


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
    for solver in ("euler", "cps", "exponential"):
        for K in (1, 2, 4):
            tau, x = torch.arange(K) / K, torch.zeros((K, 1, 1))
            stds = transition(x, x, tau, 1 / K, 0.5, solver)[1].flatten().tolist()
            rows[f"{solver}, K = {K}"] = stds + [""] * (4 - K)
    table("standard deviation of a step, a = 0.5", [f"k = {k}" for k in range(4)], rows)
    rows = {"ODE": [gaussian_variance(K, 0.0, "euler", ()) / 0.3**2 for K in steps]}
    for a in (0.5, 1.0):
        for solver in ("euler", "cps", "exponential"):
            rows[f"{solver}, a = {a}"] = [gaussian_variance(K, a, solver, range(K)) / 0.3**2 for K in steps]
            for name, k in (("first", lambda K: 0), ("middle", lambda K: K // 2)):
                variances = [gaussian_variance(K, a, solver, (k(K),)) / 0.3**2 for K in steps]
                rows[f"{solver}, a = {a}, noise at the {name} step only"] = variances
    table("variance / target's variance, 1-D Gaussian, exact", [f"K = {K}" for K in steps], rows)


# A chunk of one number, so that nothing has to be sampled. The flow's target is N(0.7, 0.3^2); two weights, a
# bias and a gain, change its velocity and are zero at the flow itself. Each step has its own copy of them.


def toy_velocity(x, tau, bias, gain, mean=0.7, std=0.3):
    slope = (tau * std**2 - (1 - tau)) / (tau**2 * std**2 + (1 - tau) ** 2)
    return bias + (1 + gain) * (mean + slope * (x - tau * mean))


def toy_reward(x, goal=1.0, width=0.5):
    return torch.exp(-0.5 * ((x - goal) / width) ** 2)


def toy_step(x, k, K, a, weights):
    """Mean and standard deviation of step k from x (B,); weights (K, 2)."""
    x, tau = x[:, None, None], torch.full((len(x),), k / K, dtype=x.dtype)
    mu, std = transition(x, toy_velocity(x, k / K, *weights[k]), tau, 1 / K, a)
    return mu[:, 0, 0], std[:, 0, 0].expand(len(x))


def toy_return(K, a, noisy_steps, weights, goal=1.0, width=0.5):
    """E r(x^1), exact: a step is affine, so x^1 is normal, and the mean of r under a normal is known."""
    mean, variance, unit = torch.zeros(1).double(), 1.0, torch.tensor([0.0, 1.0]).double()
    for k in range(K):
        level = a if k in noisy_steps else 0.0
        low, high = toy_step(unit, k, K, level, weights)[0]  # two points tell the slope
        mean, std = toy_step(mean, k, K, level, weights)
        variance = (high - low) ** 2 * variance + std**2
    spread = width**2 + variance
    return (width / spread.sqrt() * torch.exp(-0.5 * (mean - goal) ** 2 / spread)).item()


def toy_gradient(K, a, draws, copies=lambda noisy_steps, K: range(K), h=1e-4):
    """Of the mean of `toy_return` over draws of noisy steps, by finite differences: bias and gain (2,).

    `copies`: of which steps the weights are moved, all of them unless told.
    """
    gradient = np.zeros(2)
    for noisy_steps in draws:
        for i in range(2):
            for sign in (-1, 1):
                weights = torch.zeros(K, 2, dtype=torch.float64)
                weights[list(copies(noisy_steps, K)), i] = sign * h
                gradient[i] += sign * toy_return(K, a, noisy_steps, weights) / (2 * h * len(draws))
    return gradient


def toy_scores(K, a, draws):
    """E[(r - E r) score] (2,), what PPO follows, and the variance of one chunk's term, all by quadrature.

    The nodes are the values of x^0 and of the noise of each noisy step, 40 each (hybrid) or 12 (two-layer).
    The score is that of the decisions, of the scripts' own `transition` and `log_prob`.
    """
    mean, square, weights = torch.zeros(2).double(), torch.zeros(2).double(), torch.zeros(K, 2).double()
    for noisy_steps in draws:
        node, weight = np.polynomial.hermite_e.hermegauss(40 if len(noisy_steps) == 1 else 12)
        dims = 1 + len(noisy_steps)
        z = torch.cartesian_prod(*[torch.tensor(node)] * dims).T  # (dims, B)
        weight = torch.cartesian_prod(*[torch.tensor(weight / weight.sum())] * dims).prod(dim=1)  # (B,)
        noise, x, score = iter(z[1:]), z[0], torch.zeros(2, len(weight)).double()
        for k in range(K):
            drawn = k in noisy_steps
            mu, std = toy_step(x, k, K, a if drawn else 0.0, weights)
            x_next = mu + std * next(noise) if drawn else mu
            for i in range(2 if drawn else 0):
                for sign in (-1, 1):  # log_prob is quadratic in the weights, so the difference is exact
                    moved = weights.clone()
                    moved[k, i] = sign
                    step = [value[:, None, None] for value in (x_next, *toy_step(x, k, K, a, moved))]
                    score[i] += sign * log_prob(*step, 1, 1) / 2
            x = x_next
        reward = toy_reward(x)
        term = (reward - (weight * reward).sum()) * score  # (2, B)
        mean += (term * weight).sum(dim=1) / len(draws)
        square += (term**2 * weight).sum(dim=1) / len(draws)
    return mean.numpy(), (square - mean**2).numpy()


def score_terms(steps=(1, 2, 4, 10)):
    print("\n## What part of the gradient the score terms are")
    for a in (0.5, 1.0):
        rows = {}
        for K in steps:
            for mdp, draws in (("hybrid", [(k,) for k in range(K)]), ("two-layer", [tuple(range(K))])):
                if len(draws[0]) > 4:  # too many nodes
                    cells = [""] * 5
                else:
                    exact, (score, variance) = toy_gradient(K, a, draws), toy_scores(K, a, draws)
                    cosine = exact @ score / np.linalg.norm(exact) / np.linalg.norm(score)
                    cells = ["{:.3f}, {:.3f}".format(*pair) for pair in (exact, score, score / exact)]
                    cells += [f"{cosine:.4f}", f"{variance.sum() / (score @ score):.0f}"]
                names = "exact gradient", "score term", "ratio", "cosine", "variance of a chunk / score²"
                for name, cell in zip(names, cells):
                    rows.setdefault(f"{mdp}: {name}", []).append(cell)
        rows = {name: rows[name] for name in sorted(rows, key=lambda name: name.startswith("two"))}
        table(f"1-D flow, bias and gain, a = {a}", [f"K = {K}" for K in steps], rows)


@torch.no_grad()
def padding(K=4, a=1.0, executed=3, observations=48, draws=8):
    """What noise on numbers that are never executed does to those that are (docs/math.md, section 9)."""
    from envs import make_envs
    from pi_models import CHECKPOINTS, load_policy

    policy = load_policy(str(CHECKPOINTS / "tabletop-sft"), "cpu")
    c, real = policy.config, policy.env_action_dim
    prefix = policy.encode(policy.preprocess(make_envs("tabletop", observations, 0).reset()[0]))
    masks = {name: torch.zeros(c.horizon, c.action_dim) for name in ("executed", "padded", "unexecuted")}
    masks["executed"][:executed, :real] = 1
    masks["padded"][:executed, real:] = 1
    masks["unexecuted"][executed:] = 1
    masks["both"] = masks["padded"] + masks["unexecuted"]
    rows = {name: [] for name in masks}
    for noisy in range(K):
        for name, mask in masks.items():
            generator, ends = torch.Generator().manual_seed(0), []
            x = torch.randn((observations, c.horizon, c.action_dim), generator=generator)
            for k in range(noisy):
                x = x + policy.velocity(prefix, x, torch.full((observations,), k / K))[0] / K
            start = x  # the same for all draws
            for _ in range(draws):
                x = start
                for k in range(noisy, K):
                    tau = torch.full((observations,), k / K)
                    velocity, _ = policy.velocity(prefix, x, tau)
                    ode, (mu, std) = x + velocity / K, transition(x, velocity, tau, 1 / K, a)
                    sample = mu + std * torch.randn(x.shape, generator=generator)
                    x = torch.where(mask.bool(), sample, ode) if k == noisy else ode
                ends.append(x[:, :executed, :real])
            spread = torch.stack(ends).var(dim=0).mean().sqrt()  # over draws, then all numbers
            rows[name].append(spread.item())
    print("\n## Noise on padding")
    rows = {
        f"on the {executed} x {real} executed numbers": rows["executed"],
        f"on the padded dimension of the {executed} executed steps": rows["padded"],
        f"on the {c.horizon - executed} steps that are not executed": rows["unexecuted"],
        "on both of these": rows["both"],
    }
    table(f"std of the executed numbers, a = {a}; noise ...", [f"at step {k}" for k in range(K)], rows)


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


def main():
    torch.set_num_threads(1)
    erratum_1()
    discretisation()
    score_terms()
    padding()
    erratum_2()
    erratum_3()
    erratum_4()


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
