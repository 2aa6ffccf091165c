"""Rectified flow: a straight line from data to noise, its velocity, and the times at which training and sampling visit it.

The conventions of the whole package: t in [0, 1], 0 is data and 1 is noise (the released code calls it sigma).
x_t = (1 - t) x0 + t noise, and the network predicts the velocity v = dx_t/dt = noise - x0, so x0 = x_t - t v.
The network multiplies t by 1000 once, inside its time embedding. Nothing here knows a network.

Source: Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", sections 2, 3.1 and 5.3.2.
"""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from minisd3.config import require


def _like(t: Tensor | float, x: Tensor) -> Tensor:
    """Times shaped to multiply x: a scalar stays one, (B,) becomes (B 1 1 ...)."""
    t = torch.as_tensor(t, dtype=torch.float32, device=x.device).to(x.dtype)
    return t.view(-1, *[1] * (x.ndim - 1)) if t.ndim else t


def interpolate(x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """The point at time t on the line from x0 to noise, both (B ...); t scalar or (B,). Eq. 13."""
    t = _like(t, x0)
    return (1 - t) * x0 + t * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """What the network learns to predict: the direction from data to noise, the same at every t."""
    return noise - x0


def denoise(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """The data end of the line through x with velocity v: the network's guess of x0 at time t."""
    return x - _like(t, x) * v


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Moves times in [0, 1] towards noise when shift > 1, keeping both ends. Eq. 23 with shift = sqrt(m / n)."""
    require(shift > 0, f"shift is {shift}; it must be positive (1 leaves times alone, the released models use 3)")
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(tokens: int) -> float:
    """The shift for a picture of this many image tokens as diffusers' dynamic shifting takes it: e^0.5 at 256 tokens, e^1.15 at 4096."""
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def _check_steps(steps: int) -> None:
    require(steps >= 1, f"steps is {steps}; at least 1 is needed")


def uniform_schedule(steps: int, shift: float = 1.0) -> Tensor:
    """The textbook grid: steps + 1 times, evenly spaced from 1 to 0, then shifted."""
    _check_steps(steps)
    return shift_time(torch.linspace(1, 0, steps + 1), shift)


def sd3_schedule(steps: int, shift: float = 3.0) -> Tensor:
    """The released models' grid: steps + 1 times from 1 to 0, the last step longer than the textbook's.

    The released code takes `steps` even times down to the smallest time of its 1000-entry table, which is shifted already, and
    shifts them all once more; only then comes 0 (sd3_infer.py: get_sigmas). With shift 3 the last time before 0 is 0.00893.
    """
    _check_steps(steps)
    smallest = shift_time(torch.tensor(1 / 1000, dtype=torch.float64), shift).item()
    times = torch.linspace(1, smallest, steps, dtype=torch.float64)
    return torch.cat([shift_time(times, shift), torch.zeros(1, dtype=torch.float64)]).float()


# --- the times at which training visits the line -----------------------------------------------------------------------------------
# Each way to draw them has its density, which is also the weight that makes uniform times count as much (section 3.1).

Times = Callable[..., Tensor]  # times(n, generator=generator) -> (n,) in [0, 1]


def logit_normal(n: int, mean: float = 0.0, std: float = 1.0, generator: Generator | None = None) -> Tensor:
    """(n,) training times, mostly in the middle: the sigmoid of a normal variable. Eq. 19."""
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator))


def logit_normal_density(t: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """The density of logit_normal at t, between 0 and 1. Eq. 19."""
    return torch.exp(-0.5 * ((torch.logit(t) - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi) * t * (1 - t))


def uniform(n: int, generator: Generator | None = None) -> Tensor:
    """(n,) training times, every t as likely."""
    return torch.rand(n, generator=generator)


def uniform_density(t: Tensor) -> Tensor:
    """1 everywhere; as a weight: none."""
    return torch.ones_like(t)


def mode(n: int, scale: float = 1.29, generator: Generator | None = None) -> Tensor:
    """(n,) training times with a heavy middle (scale > 0) that still reach both ends. Eq. 20; -1 <= scale <= 2 / (pi - 2)."""
    require(-1 <= scale <= 2 / (math.pi - 2), f"mode's scale is {scale}; the density exists from -1 to {2 / (math.pi - 2):.3f}")
    return _mode_of(torch.rand(n, generator=generator), scale)


def _mode_of(u: Tensor, scale: float) -> Tensor:
    return 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


def mode_density(t: Tensor, scale: float = 1.29) -> Tensor:
    """The density of mode at t: 1 / |f'(u)| where f(u) = t, for u found by halving, since eq. 20 has no inverse in closed form."""
    low, high = torch.zeros_like(t), torch.ones_like(t)  # f falls
    for _ in range(32):
        u = (low + high) / 2
        above = _mode_of(u, scale) > t
        low, high = torch.where(above, u, low), torch.where(above, high, u)
    return 1 / (1 + scale * (1 - math.pi / 2 * torch.sin(math.pi * u)))


def cosmap(n: int, generator: Generator | None = None) -> Tensor:
    """(n,) training times spread as the cosine schedule spreads its log signal-to-noise ratio. Eq. 21."""
    return 1 - 1 / (torch.tan(math.pi / 2 * torch.rand(n, generator=generator)) + 1)


def cosmap_density(t: Tensor) -> Tensor:
    """The density of cosmap at t. Eq. 22."""
    return 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)


def shifted(times: Times, shift: float) -> Times:
    """The same times moved towards noise, for pictures larger than those that the times were found for. Section 5.3.2."""

    def draw(n: int, generator: Generator | None = None) -> Tensor:
        return shift_time(times(n, generator=generator), shift)

    return draw
