"""The samplers: exact where they should be, of the order they claim, and equal to k-diffusion's and diffusers' step by step."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor

from minisd3.flow import denoise, sd3_schedule, uniform_schedule
from minisd3.sampling import SAMPLERS, dpmpp_2m, euler, heun

SPREAD = 0.3  # of the data in the closed-form flow: N(1, SPREAD^2)


def gaussian_velocity(x: Tensor, t: Tensor) -> Tensor:
    """dx/dt when the data are N(1, SPREAD^2): E[noise - x0 | x]."""
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    centred = x - (1 - t)
    return (t - (1 - t) * SPREAD**2) / variance * centred - 1


def gaussian_end(noise: Tensor) -> Tensor:
    """Where that flow takes noise: it keeps a point's distance from the mean, in standard deviations."""
    return 1 + SPREAD * noise


def curved(x: Tensor, t: Tensor) -> Tensor:
    """A velocity without a closed-form flow, for comparing samplers with one another."""
    return torch.sin(3 * x) + t * x.cos() - 0.5


def last(states: Any) -> Tensor:
    return list(states)[-1]


@pytest.mark.parametrize("name", SAMPLERS)
def test_straight_paths_are_followed_exactly(name: str) -> None:
    """With one datum x0 the velocity (x - x0) / t is constant along every path, so any number of steps is enough."""
    x0, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    for steps in (1, 2, 7):
        states = list(SAMPLERS[name](lambda x, t: (x - x0) / t, noise, sd3_schedule(steps)))
        assert len(states) == steps
        torch.testing.assert_close(states[-1], x0)
        for state, t in zip(states, sd3_schedule(steps)[1:], strict=True):
            torch.testing.assert_close(state, (1 - t) * x0 + t * noise, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_orders_of_convergence(name: str, order: int) -> None:
    """Twice the steps, 2^order times less error. The grid ends at 0.2, since the step to 0 is first order in all three."""
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    variance = (0.8 * SPREAD) ** 2 + 0.2**2
    exact = 0.8 + math.sqrt(variance) * x  # at t = 0.2

    def error(steps: int) -> float:
        return float((last(SAMPLERS[name](gaussian_velocity, x, torch.linspace(1, 0.2, steps + 1).double())) - exact).abs().max())

    errors = [error(steps) for steps in (128, 256, 512)]
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([order] * 2, abs=0.1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_closed_form_is_reached_over_the_released_schedule(name: str) -> None:
    x = torch.linspace(-2, 2, 9)
    error = (last(SAMPLERS[name](gaussian_velocity, x, sd3_schedule(50, 3.0))) - gaussian_end(x)).abs().max()
    assert error < {"euler": 0.06, "heun": 0.001, "dpmpp_2m": 0.08}[name]


def test_dpmpp_begins_and_ends_as_euler() -> None:
    x = torch.linspace(-1, 1, 5)
    schedule = sd3_schedule(6)
    ours = list(dpmpp_2m(curved, x, schedule))
    torch.testing.assert_close(ours[0], next(euler(curved, x, schedule)))
    torch.testing.assert_close(ours[-1], last(euler(curved, ours[-2], schedule[-2:])))
    assert not torch.allclose(ours[1], last(euler(curved, ours[0], schedule[1:3])))


def two_step(
    velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, schedule: Tensor, clock: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """DPM-Solver++(2M) as an exponential integrator (Lu et al. 2022, eq. 5.2): between two times x / t, seen as a function of the
    clock -log t, relaxes to the denoised picture, which is taken as linear in `clock`."""
    states, past = [], []
    for t, s in pairwise(schedule):
        past.append((clock(t), x - t * velocity(x, t)))
        h = t.log() - s.log()  # infinite at the end
        slope = torch.zeros_like(x)
        if len(past) > 1 and s > 0:
            (before, d0), (now, d1) = past[-2:]
            slope = (d1 - d0) * (clock(s) - now) / (now - before)
        x = torch.exp(-h) * x - torch.expm1(-h) * (past[-1][1] + slope / 2)
        states.append(x)
    return states


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2
def test_dpmpp_is_k_diffusions_and_its_clock_alone_differs_from_diffusers() -> None:
    """diffusers' clock is log((1 - t) / t), which needs a grid that begins below 1."""
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, lower_order_final=False
    )
    scheduler.set_timesteps(9)
    schedule = scheduler.sigmas.double()
    assert schedule[0] < 1
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    ours = list(dpmpp_2m(curved, x, schedule))
    torch.testing.assert_close(
        torch.stack(ours), torch.stack(two_step(curved, x, schedule, lambda t: -t.log())), rtol=1e-6, atol=1e-6
    )

    theirs = [x]
    for t, timestep in zip(schedule, scheduler.timesteps, strict=False):
        theirs.append(scheduler.step(curved(theirs[-1], t), timestep, theirs[-1], return_dict=False)[0])
    expected = two_step(curved, x, schedule, lambda t: torch.log((1 - t) / t))
    torch.testing.assert_close(torch.stack(theirs[1:]), torch.stack(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[0], theirs[1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours[-1], theirs[-1], atol=1e-4)


@pytest.mark.parametrize("steps", [2, 9])
def test_euler_and_heun_equal_diffusers(steps: int) -> None:
    x = torch.linspace(-1, 1, 5)
    for ours, scheduler in ((euler, FlowMatchEulerDiscreteScheduler(shift=3.0)), (heun, FlowMatchHeunDiscreteScheduler(shift=3.0))):
        scheduler.set_timesteps(steps)
        theirs = x
        for timestep in scheduler.timesteps:
            theirs = scheduler.step(curved(theirs, timestep / 1000), timestep, theirs, return_dict=False)[0]
        torch.testing.assert_close(last(ours(curved, x, sd3_schedule(steps))), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "calls"), [("euler", 10), ("heun", 19), ("dpmpp_2m", 10)])
def test_calls_and_types(name: str, calls: int) -> None:
    seen: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        assert x.dtype == torch.bfloat16 and t.ndim == 0
        return x

    states = SAMPLERS[name](velocity, torch.ones(1, 2, 2, 2, dtype=torch.bfloat16), uniform_schedule(10))
    assert next(states).shape == (1, 2, 2, 2) and len(seen) <= 2  # nothing is computed ahead
    assert len(list(states)) == 9 and len(seen) == calls and all(t > 0 for t in seen)


def test_a_start_in_the_middle_continues_as_the_whole_does() -> None:
    """What image to image leans on: euler and heun carry nothing from step to step."""
    x, schedule = torch.linspace(-1, 1, 5), sd3_schedule(10)
    for sampler in (euler, heun):
        states = list(sampler(curved, x, schedule))
        assert torch.equal(last(sampler(curved, states[3], schedule[4:])), states[-1])


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "schedule", [torch.tensor([1.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.5, 0.5]), torch.ones(2, 2)]
)
def test_impossible_schedules_are_shown(name: str, schedule: Tensor) -> None:
    with pytest.raises(ValueError, match=r"a vector of at least two falling times, not \[.*\d"):
        next(SAMPLERS[name](curved, torch.zeros(1), schedule))


def test_denoise_agrees_with_the_last_step() -> None:
    x, t = torch.linspace(-1, 1, 5), torch.tensor(0.2)
    torch.testing.assert_close(last(euler(curved, x, torch.tensor([0.2, 0.0]))), denoise(x, curved(x, t), t))
