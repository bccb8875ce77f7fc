"""The Gaussian step of a flow and its log-density, against closed forms.

Every property is a `check_*` function that takes the function under test. The real one must pass, and each of
a list of broken ones must be caught (`CAUGHT`): a check that accepts a broken formula is itself broken. They
are made from `sde`, `cps` and `density`, which are right until one of their parts is replaced.

The target of most checks is N(MEAN, STD^2): the velocity is linear, so a step is affine, and the moments are
propagated exactly, without samples. `transition` itself is evaluated at two points to find its slope.
"""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import Independent, Normal

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]

from marginals import from_mixture, log_density, mixture_velocity, sample, sliced_w1  # noqa: E402

from flow_sde_ppo import log_prob, transition  # noqa: E402

torch.set_num_threads(1)  # tensors of a few numbers: a second thread only waits for the first
MEAN, STD = 0.7, 0.3


# --- right formulas with replaceable parts, and what becomes of them ---


def sde(
    sigma=lambda tau, delta, a: a * torch.sqrt((1 - tau) / tau.clamp(min=delta)),
    pull=lambda x, v, tau, sigma: -(sigma**2) / (2 * (1 - tau)) * (x - tau * v),
    spread=lambda sigma, delta: sigma * math.sqrt(delta),
):
    def step(x, velocity, tau, delta, noise_level, solver="euler"):
        tau = tau[:, None, None]
        s = sigma(tau, delta, noise_level)
        return x + (velocity + pull(x, velocity, tau, s)) * delta, spread(s, delta)

    return step


def cps(
    action=lambda tau, delta: tau + delta,
    noise=lambda tau, delta, angle: (1 - tau - delta) * math.cos(angle),
    spread=lambda tau, delta, angle: (1 - tau - delta) * math.sin(angle),
):
    def step(x, velocity, tau, delta, noise_level, solver="cps"):
        tau, angle = tau[:, None, None], noise_level * math.pi / 2
        mu = action(tau, delta) * (x + (1 - tau) * velocity) + noise(tau, delta, angle) * (x - tau * velocity)
        return mu, spread(tau, delta, angle)

    return step


def exponential(
    fall=lambda t, end: t * (1 - end) / (end * (1 - t)),
    first=lambda delta: (1 - delta) ** (1 / delta),
    power=lambda a: a**2 / 2,
):
    def step(x, velocity, tau, delta, noise_level, solver="exponential"):
        t = tau[:, None, None].double()
        left = (1 - t - delta).clamp(min=1e-7)
        r = torch.where(t > 0, fall(t, 1 - left), first(delta)) ** power(noise_level)
        mu = (t + delta) * (x + (1 - t) * velocity) + left * r * (x - t * velocity)
        return mu.to(x.dtype), (left * torch.sqrt(1 - r**2)).to(x.dtype)

    return step


def density(
    rows=lambda terms, chunk_len, dims: terms[:, :chunk_len, :dims],
    reduce=lambda terms: terms.sum(dim=(1, 2)),
    term=lambda x, mu, std: -0.5 * ((x - mu) / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi),
):
    return lambda x, mu, std, chunk_len, dims: reduce(rows(term(x, mu, std), chunk_len, dims))


EQ_9_AS_PRINTED = sde(
    sigma=lambda tau, delta, a: a * torch.sqrt(tau / (1 - tau)),
    pull=lambda x, v, tau, s: s**2 / (2 * tau.clamp(min=1e-12)) * (x + (1 - tau) * v),
)
NO_CORRECTION = sde(pull=lambda x, v, tau, s: 0.0)
WRONG_DRIFT = {
    "Eq. 9 as printed": EQ_9_AS_PRINTED,
    "noise without drift correction": NO_CORRECTION,
    "correction with the wrong sign": sde(pull=lambda x, v, tau, s: s**2 / (2 * (1 - tau)) * (x - tau * v)),
    "correction without its half": sde(pull=lambda x, v, tau, s: -(s**2) / (1 - tau) * (x - tau * v)),
    "sigma in place of its square": sde(pull=lambda x, v, tau, s: -s / (2 * (1 - tau)) * (x - tau * v)),
    "score without 1 / (1 - tau)": sde(pull=lambda x, v, tau, s: -(s**2) / 2 * (x - tau * v)),
    "x in place of the noise": sde(pull=lambda x, v, tau, s: -(s**2) / (2 * (1 - tau)) * x),
    "A in place of the noise": sde(pull=lambda x, v, tau, s: -(s**2) / (2 * (1 - tau)) * (x + (1 - tau) * v)),
}
WRONG_SPREAD = {
    "std without sqrt(delta)": sde(spread=lambda s, delta: s),
    "std with delta": sde(spread=lambda s, delta: s * delta),
    "variance in place of std": sde(spread=lambda s, delta: s**2 * delta),
}
WRONG_SIGMA = {
    "tau not limited to delta": sde(
        sigma=lambda tau, delta, a: a * torch.sqrt((1 - tau) / tau.clamp(min=1e-3))
    ),
    "sigma without its root": sde(sigma=lambda tau, delta, a: a * (1 - tau) / tau.clamp(min=delta)),
}
WRONG_CPS = {
    "action in the proportion of tau": cps(action=lambda tau, delta: tau),
    "noise in the proportion of tau": cps(noise=lambda tau, delta, angle: (1 - tau) * math.cos(angle)),
    "old noise kept": cps(noise=lambda tau, delta, angle: 1 - tau - delta),
    "sine and cosine swapped": cps(
        noise=lambda tau, delta, angle: (1 - tau - delta) * math.sin(angle),
        spread=lambda tau, delta, angle: (1 - tau - delta) * math.cos(angle),
    ),
    "std in the proportion of tau": cps(spread=lambda tau, delta, angle: (1 - tau) * math.sin(angle)),
    "variance in place of std": cps(
        spread=lambda tau, delta, angle: ((1 - tau - delta) * math.sin(angle)) ** 2
    ),
}


# --- checks ---


def moments(step, K, noise_level, solver="euler", noisy=None, first=0, std=STD):
    """Mean and variance of x^tau from tau = first/K on, true there. noisy: the steps that are not ODE."""
    x, tau = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None], first / K
    means, variances = [tau * MEAN], [tau**2 * std**2 + (1 - tau) ** 2]
    for k in range(first, K):
        tau = k / K
        slope = (tau * std**2 - (1 - tau)) / (tau**2 * std**2 + (1 - tau) ** 2)  # cov(A - noise, x) / var(x)
        velocity = MEAN + slope * (x - tau * MEAN)
        mu, spread = x + velocity / K, torch.zeros(2, 1, 1)
        if noisy is None or k in noisy:
            mu, spread = step(x, velocity, torch.full((2,), tau, dtype=x.dtype), 1 / K, noise_level, solver)
        low, high = mu.flatten().tolist()
        means.append(low + (high - low) * means[-1])
        variances.append((high - low) ** 2 * variances[-1] + spread.flatten()[0].item() ** 2)
    return torch.tensor(means, dtype=torch.float64), torch.tensor(variances, dtype=torch.float64)


def assert_order(errors, order, bound):
    """The errors at K, 2K, 4K: each 2^order times smaller than the one before, the last below the bound."""
    errors = [abs(float(e)) for e in errors]
    assert errors[-1] < bound, errors
    assert all(order - 0.3 < math.log2(c / f) < order + 0.3 for c, f in zip(errors, errors[1:])), errors


def check_sde(step, first=0.25, noise_level=0.5):
    """Every step stochastic: the mean is right at every tau, the variance converges with order 1 in delta."""
    errors = []
    for K in (64, 128, 256):
        mean, variance = moments(step, K, noise_level, first=round(first * K))
        assert torch.allclose(mean, MEAN * torch.linspace(first, 1, len(mean), dtype=mean.dtype), atol=1e-9)
        errors.append(variance[-1] / STD**2 - 1)
    assert_order(errors, order=1, bound=0.02)


def check_sde_from_noise(step):
    """From tau = 0 the order is min(1, a^2): the error of the first steps decays like K^(-a^2)."""
    check_sde(step, first=0.0, noise_level=1.2)


def check_first_step(step):
    """The step from tau = 0 multiplies the ODE's variance by 1 + a^4/4, up to order 1 in delta."""
    errors = []
    for K in (64, 128, 256):
        ratio = moments(step, K, 0.8, noisy=[0])[1][1] / moments(step, K, 0.8, noisy=[])[1][1]
        errors.append(ratio - 1 - 0.8**4 / 4)
    assert_order(errors, order=1, bound=0.01)


def check_hybrid(step):
    """One stochastic step at tau > 0, the others ODE: the end differs from that of the ODE with order 2."""
    for tau in (0.25, 0.5, 0.75):
        errors = []
        for K in (64, 128, 256):
            mean, variance = moments(step, K, 0.5, noisy=[round(tau * K)])
            errors.append(variance[-1] / moments(step, K, 0.5, noisy=[])[1][-1] - 1)
            assert abs(mean[-1] - MEAN) < 1e-9
        assert_order(errors, order=2, bound=1e-4)


def check_cps_proportions(step):
    """Where the action is certain, Flow-CPS is exact at every tau and for any K, hybrid or not."""
    for K in (3, 4, 10):
        tau = torch.linspace(0, 1, K + 1, dtype=torch.float64)
        for noisy in (None, *([k] for k in range(K - 1))):
            mean, variance = moments(step, K, 0.7, "cps", noisy, std=0.0)
            assert torch.allclose(mean, tau * MEAN, atol=1e-12)
            assert torch.allclose(variance, (1 - tau) ** 2, atol=1e-12)


def check_cps_sde_limit(step):
    """With an angle that shrinks like sqrt(delta), Flow-CPS is an SDE that keeps the marginals: order 1."""
    variances = [moments(step, K, K**-0.5, "cps")[1][-1] for K in (64, 128, 256)]
    assert_order([variance / STD**2 - 1 for variance in variances], order=1, bound=0.02)


def check_cps_bias(step):
    """With a fixed angle a step loses variance, however small delta: p q (1 - cos)^2 / (p + q)."""
    p, q, c, errors = 0.25 * STD**2, 0.25, math.cos(0.25 * math.pi), []  # at tau = 1/2
    for K in (64, 128, 256):
        variance = moments(step, K, 0.5, "cps", first=K // 2)[1][1]
        tau = 0.5 + 1 / K
        errors.append(variance - tau**2 * STD**2 - (1 - tau) ** 2 + p * q * (1 - c) ** 2 / (p + q))
    assert_order(errors, order=1, bound=1e-3)


def check_exponential(step):
    """tau' A_hat + c e_hat with c = (1 - tau') q^(a^2 / 2) in fp64: in fp32, at every K, a and step."""
    x, velocity = torch.randn((2, 16, 5, 4), generator=torch.Generator().manual_seed(0))
    for K in (2, 3, 4, 7, 10, 25, 40):
        for a in (0.3, 0.5, 0.7, 1.0, 1.4):
            for k in range(K):
                tau, end, X, V = k / K, (k + 1) / K, x.double(), velocity.double()
                q = tau * (1 - end) / (end * (1 - tau)) if k else (1 - 1 / K) ** K
                r = q ** (a**2 / 2)
                truth = end * (X + (1 - tau) * V) + (1 - end) * r * (X - tau * V)
                mu, std = step(x, velocity, torch.full((16,), tau), 1 / K, a, "exponential")
                assert ((mu - truth).abs() < 1e-6 * truth.abs().clamp(min=1)).all(), (K, a, k)
                assert std.dtype == torch.float32 and (std > 0).all()
                assert (std - (1 - end) * math.sqrt(1 - r**2)).abs().max() < 1e-6, (K, a, k)


def check_exponential_converges(step):
    """All steps noisy, a fixed noise level: the variance of the end converges to the flow's with order 1."""
    variances = [moments(step, K, 0.8, "exponential", first=K // 4)[1][-1] for K in (64, 128, 256)]
    assert_order([variance / STD**2 - 1 for variance in variances], order=1, bound=0.03)


def check_mixture(step, solver="euler", hybrid=False):
    """Samples of a 2-D Gaussian mixture, where the velocity is not linear."""
    x = sample(step, 20, 0.5, solver, hybrid, n=20_000)
    assert sliced_w1(x, sample(None, 20, n=20_000, seed=0)) < 0.03


def check_stds(step):
    """sigma sqrt(delta) with sigma = a sqrt((1 - tau) / tau); the first is the noise level, for any K."""
    for K, a in ((1, 0.5), (4, 0.5), (4, 1.0), (10, 0.3)):
        x = torch.ones(K, 1, 1)
        stds = step(x, x, torch.arange(K) / K, 1 / K, a, "euler")[1].flatten().tolist()
        assert stds == pytest.approx([a] + [a * math.sqrt((1 - k / K) / k) for k in range(1, K)], rel=1e-5)
        if (K, a) == (4, 0.5):
            assert stds == pytest.approx([0.5, 0.433, 0.25, 0.144], abs=5e-4)


def check_cps_stds(step):
    for K, a in ((1, 0.5), (4, 0.5), (10, 1.0)):
        x = torch.ones(K, 1, 1)
        stds = step(x, x, torch.arange(K) / K, 1 / K, a, "cps")[1].flatten().tolist()
        expected = [(1 - (k + 1) / K) * math.sin(a * math.pi / 2) for k in range(K)]
        assert stds == pytest.approx(expected, abs=1e-6)
        assert stds[-1] == pytest.approx(0, abs=1e-6)


def chunks(K=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, velocity = torch.randn((2, K, 5, 3), generator=generator)
    return x, velocity, torch.arange(K) / K  # (K, H, D) twice, (K,)


def check_noiseless(step, solver="euler"):
    """noise_level 0 is the ODE: to the bit for Euler-Maruyama, to rounding for Flow-CPS."""
    for K in (1, 3, 4, 10):
        x, velocity, tau = chunks(K)
        mu, std = step(x, velocity, tau, 1 / K, 0.0, solver)
        assert (std == 0).all()
        if solver == "euler":
            assert torch.equal(mu, x + velocity * (1 / K))
        else:
            assert torch.allclose(mu, x + velocity * (1 / K), atol=1e-6)


def check_rows(step, solver="euler"):
    """A batch may hold a different tau in every row, and no row sees another."""
    x, velocity, tau = chunks()
    mu, std = step(x, velocity, tau, 0.25, 0.5, solver)
    assert mu.shape == x.shape and std.shape == (4, 1, 1)
    for k in range(4):
        alone = step(x[k : k + 1], velocity[k : k + 1], tau[k : k + 1], 0.25, 0.5, solver)
        assert torch.equal(alone[0][0], mu[k]) and torch.equal(alone[1][0], std[k])


def check_score(score):
    """grad log q_tau from the velocity, against automatic differentiation of the mixture's density."""
    for tau in (0.1, 0.5, 0.9):
        x = tau * from_mixture(500).double() + (1 - tau) * from_mixture(500, seed=1).double()
        x.requires_grad_()
        truth = torch.autograd.grad(log_density(x, tau).sum(), x)[0]
        x = x.detach()
        assert torch.allclose(score(x, mixture_velocity(x, tau), tau), truth, rtol=1e-9, atol=1e-9)


def gaussians(per_element=False):
    """3 chunks of 6 steps and 8 dimensions, of which 4 steps are executed and 5 dimensions are real."""
    generator = torch.Generator().manual_seed(0)
    x, mu, std = torch.randn((3, 3, 6, 8), generator=generator, dtype=torch.float64)
    std = std.abs() + 0.1  # as of a noise network; the SDE has one per chunk
    return x, mu, std if per_element else std[:, :1, :1]


def check_log_prob(density):
    for per_element in (False, True):
        x, mu, std = gaussians(per_element)
        used = Normal(mu[:, :4, :5], std.expand_as(mu)[:, :4, :5])
        truth = Independent(used, 2).log_prob(x[:, :4, :5])  # (B,)
        assert torch.allclose(density(x, mu, std, 4, 5), truth, rtol=1e-12)


def check_padding(density):
    """What is not executed or not real has no say, and every other element has, in its own chunk only."""
    x, mu, std = gaussians()
    before = density(x, mu, std, 4, 5)
    for h in range(6):
        for d in range(8):
            moved = x.clone()
            moved[1, h, d] += 0.5
            changed = density(moved, mu, std, 4, 5) != before
            assert changed.tolist() == [False, h < 4 and d < 5, False]


# --- which check catches what ---


def one_tau_for_all(x, velocity, tau, delta, noise_level, solver="euler"):
    return transition(x, velocity, tau.mean().expand_as(tau), delta, noise_level, solver)


def never_silent(x, velocity, tau, delta, noise_level, solver="euler"):
    return transition(x, velocity, tau, delta, noise_level + 1e-3, solver)


def without(mutants, *names):
    return {name: mutant for name, mutant in mutants.items() if name not in names}


WRONG_REDUCTION = {
    "the mean": density(reduce=lambda terms: terms.mean(dim=(1, 2))),
    "over steps, then the mean": density(reduce=lambda terms: terms.sum(dim=1).mean(dim=1)),
    "the padding too": density(rows=lambda terms, chunk_len, dims: terms),
    "the padded steps too": density(rows=lambda terms, chunk_len, dims: terms[:, :, :dims]),
    "the padded dimensions too": density(rows=lambda terms, chunk_len, dims: terms[:, :chunk_len]),
    "steps and dimensions swapped": density(rows=lambda terms, chunk_len, dims: terms[:, :dims, :chunk_len]),
    "the first step left out": density(rows=lambda terms, chunk_len, dims: terms[:, 1:chunk_len, :dims]),
}
WRONG_TERM = {
    "no log std": density(term=lambda x, mu, std: -0.5 * ((x - mu) / std) ** 2 - 0.5 * math.log(2 * math.pi)),
    "no constant": density(term=lambda x, mu, std: -0.5 * ((x - mu) / std) ** 2 - torch.log(std)),
    "std taken for a variance": density(term=lambda x, mu, std: Normal(mu, std.sqrt()).log_prob(x)),
}
WRONG_SCORE = {
    "as printed": lambda x, velocity, tau: -x / tau - (1 - tau) / tau * velocity,
    "of the noise itself": lambda x, velocity, tau: -(x - tau * velocity),
    "wrong sign": lambda x, velocity, tau: (x - tau * velocity) / (1 - tau),
}
at_zero_alike = "score without 1 / (1 - tau)", "x in place of the noise"
WRONG_EXPONENTIAL = {
    "Flow-CPS's": lambda *a: cps()(*a[:5]),
    "a^2 in place of a^2 / 2": exponential(power=lambda a: a**2),
    "noise / action upside down": exponential(fall=lambda t, end: (1 - t) * end / ((1 - end) * t)),
    "of the noise alone": exponential(fall=lambda t, end: (1 - end) / (1 - t)),
    "no limit at tau = 0": exponential(first=lambda delta: 0.0),
}
CAUGHT = {
    check_sde: WRONG_DRIFT | WRONG_SPREAD,
    check_sde_from_noise: WRONG_DRIFT | WRONG_SPREAD | WRONG_SIGMA,
    check_first_step: without(WRONG_DRIFT, *at_zero_alike) | WRONG_SPREAD | WRONG_SIGMA,
    check_hybrid: WRONG_DRIFT | WRONG_SPREAD,
    check_mixture: WRONG_DRIFT | WRONG_SPREAD,
    check_stds: WRONG_SPREAD | WRONG_SIGMA | {"Eq. 9 as printed": EQ_9_AS_PRINTED},
    check_noiseless: {"noise that never ends": never_silent},
    check_rows: {"one tau for all": one_tau_for_all},
    check_cps_proportions: without(WRONG_CPS, "sine and cosine swapped"),
    check_cps_sde_limit: WRONG_CPS,
    check_cps_bias: without(WRONG_CPS, "action in the proportion of tau", "sine and cosine swapped"),
    check_cps_stds: without(WRONG_CPS, *list(WRONG_CPS)[:3]),
    check_exponential: WRONG_EXPONENTIAL,
    check_exponential_converges: {"Flow-CPS's": WRONG_EXPONENTIAL["Flow-CPS's"]},
    check_score: WRONG_SCORE,
    check_log_prob: WRONG_REDUCTION | WRONG_TERM,
    check_padding: without(WRONG_REDUCTION, "the mean", "over steps, then the mean"),
}
RIGHT = {check: transition for check in CAUGHT} | {
    check_score: lambda x, velocity, tau: -(x - tau * velocity) / (1 - tau),
    check_log_prob: log_prob,
    check_padding: log_prob,
}


@pytest.mark.parametrize("check", CAUGHT, ids=lambda check: check.__name__)
def test_real(check):
    check(RIGHT[check])


def test_real_in_other_modes():
    check_noiseless(transition, "cps")
    check_rows(transition, "cps")
    check_mixture(transition, "cps")
    check_mixture(transition, "exponential")
    check_mixture(transition, "euler", hybrid=True)
    check_mixture(transition, "cps", hybrid=True)


@pytest.mark.parametrize("check, broken", [(check, broken) for check in CAUGHT for broken in CAUGHT[check]])
def test_broken_is_caught(check, broken):
    with pytest.raises(AssertionError):
        check(CAUGHT[check][broken])


def test_mutants_are_right_before_they_are_broken():
    for check in (check_sde, check_sde_from_noise, check_first_step, check_hybrid, check_mixture, check_stds):
        check(sde())
    for check in (check_cps_proportions, check_cps_sde_limit, check_cps_bias, check_cps_stds):
        check(cps())
    for check in (check_exponential, check_exponential_converges):
        check(exponential())
    for check in (check_log_prob, check_padding):
        check(density())


def test_how_wrong_eq_9_as_printed_is():
    """Not a matter of a coarse grid: at K = 256 the variance is wrong by more than an order of magnitude."""
    mean, variance = moments(EQ_9_AS_PRINTED, 256, 0.5, first=64)
    assert variance[-1] > 10 * STD**2 and mean[-1] > 1.5 * MEAN
    assert moments(NO_CORRECTION, 256, 0.5, first=64)[1][-1] > 1.4 * STD**2
    ode = sample(None, 20, n=20_000, seed=0)
    assert sliced_w1(sample(EQ_9_AS_PRINTED, 20, 0.5, n=20_000), ode) > 0.3
    assert sliced_w1(sample(NO_CORRECTION, 20, 0.5, n=20_000), ode) > 0.1
