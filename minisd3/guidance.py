"""Guidance: from a model and its conditions to the velocity that a sampler integrates. Pure functions that know no network.

A model is anything called like MMDiT: model(x, t, context, pooled) -> v. Skip-layer guidance also asks it for
forward_branched, which continues part of a batch as copies that leave some blocks out.
"""

from typing import Any

import torch
from torch import Tensor

from minisd3.config import SkipLayers, require
from minisd3.types import Conditioning, Velocity


def conditional(model: Any, cond: Conditioning) -> Velocity:
    """The prompt's velocity alone: one pass, no guidance."""
    return lambda x, t: model(x, t, *cond)


def classifier_free(
    model: Any, cond: Conditioning, uncond: Conditioning, scale: float, *, interval: tuple[float, float] = (0.0, 1.0)
) -> Velocity:
    """v_uncond + scale (v_cond - v_uncond), both in one batch (Ho & Salimans 2022, eq. 6).

    Scale 1 needs no unconditional pass and makes none. Outside the interval of times there is no guidance either
    (Kynkäänniemi et al. 2024).
    """
    plain = conditional(model, cond)
    if scale == 1:
        return plain
    low, high = interval
    both = _join(cond, uncond)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if not low <= float(t.max()) <= high:
            return plain(x, t)
        v, v_uncond = model(torch.cat([x, x]), _twice(t), *both).chunk(2)
        return v_uncond + scale * (v - v_uncond)

    return velocity


def skip_layer(
    model: Any,
    cond: Conditioning,
    uncond: Conditioning,
    scale: float,
    slg: SkipLayers,
    schedule: Tensor,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """Classifier-free guidance, and away from what the model would draw without some of its blocks: + slg.scale (v_cond - v_skipped).

    The released code adds the difference to the denoised picture (sd3_impls.py: SkipLayerCFGDenoiser); on velocities it is the same.
    It acts at step i when slg.start * steps < i < slg.end * steps. Here the window is the range of times of those steps, so that it
    holds for samplers that look between steps. `schedule` is the full one, also when sampling starts in its middle.
    """
    plain = classifier_free(model, cond, uncond, scale, interval=interval)
    steps = len(schedule) - 1
    times = [float(schedule[i]) for i in range(steps) if slg.start * steps < i < slg.end * steps]
    if not times or slg.scale == 0:
        return plain
    low, high = interval if scale != 1 else (2.0, -1.0)  # scale 1: at no time
    both = _join(cond, uncond) if scale != 1 else cond

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        now = float(t.max())
        if not min(times) <= now <= max(times):
            return plain(x, t)
        guided = low <= now <= high
        xs, ts, batch = (torch.cat([x, x]), _twice(t), both) if guided else (x, t, cond)
        v, v_skipped = model.forward_branched(xs, ts, *batch, skip_layers=slg.layers, rows=len(x))
        v_cond, v_uncond = v.chunk(2) if guided else (v, v)
        return v_uncond + scale * (v_cond - v_uncond) + slg.scale * (v_cond - v_skipped)

    return velocity


def inpaint(velocity: Velocity, known: Tensor, mask: Tensor) -> Velocity:
    """Draw only where mask (B 1 H W) is 1; where it is 0, head straight for the known latents (B C H W) from wherever x is.

    That road reaches every later t at (1 - t) known + t noise, so any sampler has the known part noised to the t of each state, without
    a hand in its loop.
    """
    return lambda x, t: mask * velocity(x, t) + (1 - mask) * (x - known) / t.to(x).view(-1, 1, 1, 1)


def _join(cond: Conditioning, uncond: Conditioning) -> Conditioning:
    """Conditions of the doubled batch, the prompt's first, as the released code orders them (sd3_impls.py: CFGDenoiser)."""
    require(
        cond.context.shape == uncond.context.shape,
        f"the prompt's context is {tuple(cond.context.shape)} and the negative prompt's {tuple(uncond.context.shape)}; "
        "encode both in one call, which pads them to one length",
    )
    return Conditioning(torch.cat([cond.context, uncond.context]), torch.cat([cond.pooled, uncond.pooled]))


def _twice(t: Tensor) -> Tensor:
    return torch.cat([t, t]) if t.ndim else t
