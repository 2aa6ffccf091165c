"""Guidance: its formulas against passes made one by one, the released window, and what a step costs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minisd3.config import MMDiTConfig, SkipLayers
from minisd3.flow import sd3_schedule
from minisd3.guidance import classifier_free, conditional, inpaint, skip_layer
from minisd3.mmdit import MMDiT
from minisd3.sampling import SAMPLERS
from minisd3.types import Conditioning

MEDIUM = MMDiTConfig(  # 24 blocks, 13 of them dual, as sd3.5-medium, and narrow
    depth=24, head_dim=4, in_channels=2, pos_embed_max_size=4, context_dim=6, pooled_dim=5, qk_norm="rms",
    dual_attention_layers=tuple(range(13)),
)  # fmt: skip
SLG = SkipLayers((7, 8, 9), scale=2.5, start=0.01, end=0.20)
NOW = torch.tensor(0.97)  # inside the window of 28 steps


class Counter:
    """A model that only tells what it was asked: the number of samples and which prompts, by the first number of each context."""

    def __init__(self) -> None:
        self.passes: list[tuple[str, list[float]]] = []

    def __call__(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        assert t.ndim == 0 or len(t) == len(x) == len(context) == len(pooled)
        self.passes.append(("plain", context[:, 0, 0].tolist()))
        return x

    def forward_branched(
        self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, *, skip_layers: Any, rows: int
    ) -> tuple[Tensor, Tensor]:
        self(x, t, context, pooled)
        self.passes[-1] = (f"branched by {rows}", context[:, 0, 0].tolist())
        return x, x[:rows]


def prompt(number: float, *, batch: int = 1, length: int = 3) -> Conditioning:
    generator = torch.Generator().manual_seed(int(number))
    context = torch.randn(batch, length, MEDIUM.context_dim, generator=generator)
    context[:, 0, 0] = number
    return Conditioning(context, torch.randn(batch, MEDIUM.pooled_dim, generator=generator))


@pytest.fixture(scope="module")
def model() -> MMDiT:
    made, generator = MMDiT(MEDIUM), torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


COND, UNCOND = prompt(1, batch=2), prompt(2, batch=2)


def test_classifier_free_is_its_formula(model: MMDiT, x: Tensor) -> None:
    for t in (NOW, torch.tensor([0.9, 0.3])):
        v, v_uncond = model(x, t, *COND), model(x, t, *UNCOND)
        assert torch.equal(conditional(model, COND)(x, t), v)
        close(classifier_free(model, COND, UNCOND, 4.5)(x, t), v_uncond + 4.5 * (v - v_uncond))
        close(classifier_free(model, COND, UNCOND, 0.0)(x, t), v_uncond)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_skip_layer_equals_three_passes(model: MMDiT, x: Tensor, scale: float) -> None:
    v, v_uncond = model(x, NOW, *COND), model(x, NOW, *UNCOND)
    v_skipped = model(x, NOW, *COND, skip_layers=SLG.layers)
    expected = v_uncond + scale * (v - v_uncond) + 2.5 * (v - v_skipped)
    close(skip_layer(model, COND, UNCOND, scale, SLG, sd3_schedule(28))(x, NOW), expected)
    # as the released code has it, on denoised pictures
    a, b, c = (x - NOW * part for part in (v, v_uncond, v_skipped))
    close(x - NOW * expected, b + scale * (a - b) + 2.5 * (a - c))


def test_batches_hold_the_prompt_first_and_scale_one_makes_one_pass(x: Tensor) -> None:
    def passes(velocity: Any) -> list[tuple[str, list[float]]]:
        counter.passes.clear()
        velocity(x, NOW)
        velocity(x, NOW.expand(2))
        assert counter.passes[0] == counter.passes[1]
        return counter.passes[:1]

    counter, schedule = Counter(), sd3_schedule(28)
    assert passes(classifier_free(counter, COND, UNCOND, 1.0)) == [("plain", [1, 1])]
    assert passes(classifier_free(counter, COND, UNCOND, 5.0)) == [("plain", [1, 1, 2, 2])]
    assert passes(skip_layer(counter, COND, UNCOND, 1.0, SLG, schedule)) == [("branched by 2", [1, 1])]
    assert passes(skip_layer(counter, COND, UNCOND, 5.0, SLG, schedule)) == [("branched by 2", [1, 1, 2, 2])]
    assert passes(skip_layer(counter, COND, UNCOND, 5.0, SkipLayers((7,), scale=0), schedule)) == [("plain", [1, 1, 2, 2])]


@pytest.mark.parametrize(
    ("steps", "window", "guided"),
    [
        (50, (0.01, 0.20), range(1, 10)),
        (28, (0.01, 0.20), range(1, 6)),
        (10, (0.01, 0.20), range(1, 2)),
        (4, (0.01, 0.20), range(0)),
        (20, (0.0, 1.0), range(1, 20)),
        (100, (0.5, 0.52), range(51, 52)),
    ],
)
def test_the_window_is_the_released_one(steps: int, window: tuple[float, float], guided: range) -> None:
    """Step i is guided when start * steps < i < end * steps, strictly."""
    counter, schedule = Counter(), sd3_schedule(steps)
    slg = SkipLayers((7, 8, 9), start=window[0], end=window[1])
    velocity = skip_layer(counter, prompt(1), prompt(2), 4.0, slg, schedule)
    for _ in SAMPLERS["euler"](velocity, torch.zeros(1, 2, 4, 4), schedule):
        pass
    assert [i for i, (kind, _) in enumerate(counter.passes) if kind != "plain"] == list(guided) and len(counter.passes) == steps

    begun = len(counter.passes) - steps // 2  # begun in the middle, the same steps are guided
    for _ in SAMPLERS["euler"](velocity, torch.zeros(1, 2, 4, 4), schedule[begun:]):
        pass
    late = [i + begun for i, (kind, _) in enumerate(counter.passes[steps:]) if kind != "plain"]
    assert late == [i for i in guided if i >= begun]


def test_no_guidance_outside_the_interval(x: Tensor) -> None:
    counter, schedule = Counter(), sd3_schedule(28)
    for guide in (
        classifier_free(counter, COND, UNCOND, 4.0, interval=(0.2, 0.8)),
        skip_layer(counter, COND, UNCOND, 4.0, SLG, schedule, interval=(0.2, 0.8)),
    ):
        counter.passes.clear()
        for t in (0.81, 0.79, 0.5, 0.21, 0.19):
            guide(x, torch.tensor(t))
        assert [len(prompts) for _, prompts in counter.passes] == [2, 4, 4, 4, 2]
    guide(x, NOW)
    assert counter.passes[-1] == ("branched by 2", [1, 1])  # its own window is another


def test_no_block_is_computed_twice(model: MMDiT) -> None:
    """A skip-layer step on sd3.5-medium costs 2 x 24 + 14 blocks of one sample, where plain guidance costs 2 x 24."""
    evaluated = 0

    def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal evaluated
        evaluated += len(args[1])

    handles = [block.register_forward_pre_hook(count) for block in model.joint_blocks]
    costs = []
    for t in (NOW, torch.tensor(0.5)):
        evaluated = 0
        skip_layer(model, prompt(1), prompt(2), 4.0, SLG, sd3_schedule(28))(torch.zeros(1, 2, 4, 4), t)
        costs.append(evaluated)
    for handle in handles:
        handle.remove()
    assert costs == [2 * 24 + 14, 2 * 24]


def test_inpainting_holds_the_known_part_at_every_step() -> None:
    generator = torch.Generator().manual_seed(0)
    known, noise = torch.randn(2, 1, 3, 4, 4, generator=generator)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    for name, sampler in SAMPLERS.items():
        schedule = sd3_schedule(7)
        for t, state in zip(schedule[1:], sampler(inpaint(lambda x, t: torch.sin(x), known, mask), noise, schedule), strict=True):
            torch.testing.assert_close(state[..., 2:], ((1 - t) * known + t * noise)[..., 2:], msg=name)
        assert not torch.allclose(state[..., :2], known[..., :2], atol=0.1)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"context is \(1, 3, 6\) and the negative prompt's \(1, 4, 6\); encode both in one call"):
        classifier_free(Counter(), prompt(1), prompt(2, length=4), 4.0)
    with pytest.raises(ValueError, match="layers is empty"):
        SkipLayers(())
    with pytest.raises(ValueError, match="start 0.3 and end 0.2"):
        SkipLayers((1,), start=0.3)
