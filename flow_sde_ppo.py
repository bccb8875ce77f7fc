import math

import torch


def transition(x, velocity, tau, delta, noise_level, solver="euler"):
    """Eq. 9 in the right clock: the Gaussian A^{tau+delta} | A^tau whose marginals are those of the ODE.

    tau = 0 is noise and tau = 1 is the action. noise_level 0 is the ODE step x + velocity * delta.
    """
    tau = tau[:, None, None]  # (B, 1, 1)
    noise_hat = x - tau * velocity  # the noise that x would have come from: score = -noise_hat / (1 - tau)
    if solver == "cps":  # Flow-CPS: keep the coefficients of action and noise, turn part of the noise afresh
        action_hat, angle = x + (1 - tau) * velocity, noise_level * math.pi / 2
        mu = (tau + delta) * action_hat + (1 - tau - delta) * math.cos(angle) * noise_hat
        std = (1 - tau - delta) * math.sin(angle)
    else:  # Euler-Maruyama
        sigma = noise_level * torch.sqrt((1 - tau) / tau.clamp(min=delta))
        mu = x + (velocity - sigma**2 / (2 * (1 - tau)) * noise_hat) * delta  # Eq. 9
        std = sigma * math.sqrt(delta)
    return mu, std  # (B, H, D), (B, 1, 1)


def log_prob(x_next, mu, std, chunk_len, action_dim):
    """log N(x_next; mu, std) of a chunk: the sum over executed steps and real action dimensions, never the padding."""
    z = (x_next - mu) / std
    terms = -0.5 * z**2 - torch.log(std) - 0.5 * math.log(2 * math.pi)  # (B, H, D)
    return terms[:, :chunk_len, :action_dim].sum(dim=(1, 2))  # (B,)
