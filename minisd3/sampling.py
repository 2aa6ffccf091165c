"""Samplers: ways to follow a velocity from noise (t = 1) to a picture (t = 0).

Each is a generator that yields the state after every step; the last is the sample. They know no network:
velocity(x, t) may be a trained model under guidance or two lines of algebra. Schedules are falling times, as flow.py makes them.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from minisd3.config import require
from minisd3.flow import denoise
from minisd3.types import Velocity


def _check(schedule: Tensor) -> None:
    require(
        schedule.ndim == 1 and len(schedule) >= 2 and bool((schedule.diff() < 0).all()),
        f"a schedule is a vector of at least two falling times, not {schedule.tolist()}",
    )


def euler(velocity: Velocity, x: Tensor, schedule: Tensor) -> Iterator[Tensor]:
    """One straight step along the velocity at a time: one model call a step, error proportional to the step."""
    _check(schedule)
    for t, t_next in pairwise(schedule):
        x = x + (t_next - t) * velocity(x, t)
        yield x


def heun(velocity: Velocity, x: Tensor, schedule: Tensor) -> Iterator[Tensor]:
    """An Euler step, then the same step with the mean of the velocities at its two ends: two calls a step, second order.

    The last step, to 0, is Euler's, as in Karras et al. 2022 (algorithm 1): 2 steps - 1 calls in all.
    """
    _check(schedule)
    for t, t_next in pairwise(schedule):
        v = velocity(x, t)
        if t_next > 0:
            v = (v + velocity(x + (t_next - t) * v, t_next)) / 2
        x = x + (t_next - t) * v
        yield x


def dpmpp_2m(velocity: Velocity, x: Tensor, schedule: Tensor) -> Iterator[Tensor]:
    """DPM-Solver++(2M): extrapolates the denoised picture from this step and the one before: one call a step, second order.

    Lu et al. 2022, algorithm 2, in the form the released code takes over from k-diffusion, where the solver's clock is -log t.
    The first step, which has no past, and the last, to 0, are first order, and those equal Euler's.
    """
    _check(schedule)
    clock = -schedule.log()
    previous: Tensor | None = None
    for i in range(len(schedule) - 1):
        t, t_next = schedule[i], schedule[i + 1]
        x0 = denoise(x, velocity(x, t), t)
        target = x0
        if previous is not None and t_next > 0:
            ratio = (clock[i] - clock[i - 1]) / (clock[i + 1] - clock[i])
            target = x0 + (x0 - previous) / (2 * ratio)
        x = torch.lerp(target, x, (t_next / t).to(x))  # (t_next / t) x + (1 - t_next / t) target
        previous = x0
        yield x


SAMPLERS: dict[str, Callable[[Velocity, Tensor, Tensor], Iterator[Tensor]]] = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}
