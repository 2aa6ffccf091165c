"""Rectified flow's formulas, both schedules, and the densities of training times."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Generator, Tensor

from minisd3 import flow


def test_the_line_from_data_to_noise() -> None:
    x0, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0.0, 0.3, 1.0])
    x = flow.interpolate(x0, noise, t)
    assert torch.equal(x[0], x0[0]) and torch.equal(x[2], noise[2])
    torch.testing.assert_close(x[1], 0.7 * x0[1] + 0.3 * noise[1])
    assert torch.equal(flow.interpolate(x0, noise, 0.3)[1], x[1])
    slope = torch.autograd.functional.jvp(lambda t: flow.interpolate(x0, noise, t), t, torch.ones(3))[1]
    torch.testing.assert_close(slope, flow.velocity(x0, noise))
    torch.testing.assert_close(flow.denoise(x, flow.velocity(x0, noise), t), x0)
    assert flow.interpolate(x0.half(), noise.half(), 0.3).dtype == torch.float16


def test_shift_keeps_the_ends_and_undoes_itself() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    shifted = flow.shift_time(t, 3)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted[1:-1] > t[1:-1]).all()
    torch.testing.assert_close(shifted[50], torch.tensor(0.75, dtype=torch.float64))  # 3/2 : (1 + 1)
    torch.testing.assert_close(flow.shift_time(shifted, 1 / 3), t)
    torch.testing.assert_close(flow.shift_time(flow.shift_time(t, 2), 1.5), shifted)  # shifts multiply
    odds = shifted[1:-1] / (1 - shifted[1:-1])
    torch.testing.assert_close(odds, 3 * t[1:-1] / (1 - t[1:-1]))  # noise to data: three times the ratio
    assert torch.equal(flow.shift_time(t, 1), t)
    with pytest.raises(ValueError, match="shift is 0; it must be positive"):
        flow.shift_time(t, 0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 28, 50])
def test_the_released_schedule_equals_diffusers(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    ours = flow.sd3_schedule(steps, shift)
    assert ours.dtype == torch.float32 and ours.shape == (steps + 1,)
    torch.testing.assert_close(ours, scheduler.sigmas, rtol=1e-6, atol=1e-7)


def test_both_schedules_in_closed_form() -> None:
    for steps in (2, 28, 40, 50):
        assert flow.sd3_schedule(steps, 3.0)[-2].item() == pytest.approx(0.00893, abs=5e-6)  # shifted twice
        assert flow.uniform_schedule(steps, 3.0)[-2].item() == pytest.approx(3 / (steps + 2), rel=1e-6)
        assert flow.sd3_schedule(steps, 1.0)[-2].item() == pytest.approx(0.001, rel=1e-6)
    for made in (flow.sd3_schedule(28), flow.uniform_schedule(28, 3)):
        assert made[0] == 1 and made[-1] == 0 and (made.diff() < 0).all() and made.dtype == torch.float32
    torch.testing.assert_close(flow.uniform_schedule(4), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    for schedule in (flow.sd3_schedule, flow.uniform_schedule):
        with pytest.raises(ValueError, match="steps is 0; at least 1 is needed"):
            schedule(0, 3.0)


@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096, 6000])
def test_resolution_shift_equals_diffusers(tokens: int) -> None:
    shift = flow.resolution_shift(tokens)
    mu = calculate_shift(tokens)
    assert shift == pytest.approx(math.exp(mu))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.1, 10).tolist(), mu=mu)
    torch.testing.assert_close(flow.shift_time(torch.linspace(1, 0.1, 10), shift), scheduler.sigmas[:-1])
    assert flow.resolution_shift(4096) == pytest.approx(3.158, abs=1e-3)


# Which share of the times lies below t: the integrals of the paper's densities (eq. 19 and section 3.1), the mode's by solving eq. 20.


def normal_below(t: Tensor, mean: float, std: float) -> Tensor:
    return torch.special.ndtr((torch.logit(t) - mean) / std)


def mode_below(t: Tensor, scale: float) -> Tensor:
    low, high = torch.zeros_like(t), torch.ones_like(t)  # f falls in u, so t is drawn below f(u) with probability 1 - u
    for _ in range(40):
        u = (low + high) / 2
        above = 1 - u - scale * (torch.cos(math.pi / 2 * u).square() - 1 + u) > t
        low, high = torch.where(above, u, low), torch.where(above, high, u)
    return 1 - low


Below = Callable[[Tensor], Tensor]
DRAWS: list[tuple[Callable[..., Tensor], Below]] = [
    (flow.logit_normal, partial(normal_below, mean=0, std=1)),
    (partial(flow.logit_normal, mean=0.5, std=0.6), partial(normal_below, mean=0.5, std=0.6)),
    (flow.uniform, lambda t: t),
    (flow.mode, partial(mode_below, scale=1.29)),
    (partial(flow.mode, scale=-0.8), partial(mode_below, scale=-0.8)),
    (flow.cosmap, lambda t: 2 / math.pi * torch.atan(t / (1 - t))),
    (flow.shifted(flow.uniform, 3.0), lambda t: flow.shift_time(t, 1 / 3)),
]
DENSITIES: list[Below] = [
    flow.logit_normal_density,
    partial(flow.logit_normal_density, mean=0.5, std=0.6),
    flow.uniform_density,
    flow.mode_density,
    partial(flow.mode_density, scale=-0.8),
    flow.cosmap_density,
]


@pytest.mark.parametrize("which", range(len(DENSITIES)))
def test_a_density_is_the_slope_of_the_share_below(which: int) -> None:
    t, h = torch.linspace(0.02, 0.98, 49, dtype=torch.float64), 1e-4
    below = DRAWS[which][1]
    torch.testing.assert_close(DENSITIES[which](t), (below(t + h) - below(t - h)) / (2 * h), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", range(len(DRAWS)))
def test_training_times_follow_their_density(which: int) -> None:
    """Kolmogorov and Smirnov's distance: at 40,000 draws 0.0098 is passed by one honest generator in a thousand."""
    n = 40_000
    drawn = DRAWS[which][0](n, generator=Generator().manual_seed(5)).double().sort().values
    assert drawn[0] >= 0 and drawn[-1] <= 1
    share = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    distances = [float((below(drawn) - share).abs().max()) for _, below in DRAWS]
    assert distances[which] < 0.0098
    assert all(distance > 0.03 for i, distance in enumerate(distances) if i != which)


def test_the_mode_is_in_the_middle() -> None:
    drawn = flow.mode(100_000, 1.29, generator=Generator().manual_seed(0))
    density = ((drawn - 0.5).abs() < 0.01).float().mean() / 0.02
    assert density.item() == pytest.approx(1 / (1 - 1.29 * (math.pi / 2 - 1)), rel=0.03)
    assert torch.equal(flow.mode(9, 0.0, Generator().manual_seed(1)), 1 - flow.uniform(9, Generator().manual_seed(1)))
    with pytest.raises(ValueError, match="mode's scale is 1.8; the density exists from -1 to 1.752"):
        flow.mode(1, 1.8)


def test_times_come_from_the_generator_given() -> None:
    for draw, _ in DRAWS:
        a, b, c = (draw(4, generator=Generator().manual_seed(seed)) for seed in (3, 3, 4))
        assert a.shape == (4,) and torch.equal(a, b) and not torch.equal(a, c)
