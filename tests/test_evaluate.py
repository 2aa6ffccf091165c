"""Measures in closed form where there is one, and else in the order that they must have; the shipped towers and detector do their work."""

from math import isnan, sqrt

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from minisd3.config import MMDiTConfig
from minisd3.controlnet import blur, canny
from minisd3.evaluate import (
    CaptionAccuracy,
    Rate,
    caption_accuracy,
    clip_score,
    clip_similarity,
    edge_f1,
    frechet_distance,
    gaussian_distance,
    grid,
    image_features,
    judge,
    loss_by_time,
    perceptual_distance,
    psnr,
    ssim,
    tally_by_number,
)
from minisd3.mmdit import MMDiT
from minisd3.scenes import HELD_OUT, PROMPTS, Scene, Thing, captions, pictures, scene
from minisd3.types import Conditioning


def drawn(*scenes: Scene) -> Tensor:
    pixels = np.stack([np.asarray(one.render()) for one in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=Generator().manual_seed(seed)) * 2 - 1


def test_psnr_of_a_constant_difference() -> None:
    image = noise(2, 3, 16, 16) * 0.5
    away = image + torch.tensor([0.2, 0.02])[:, None, None, None]
    assert psnr(away, image).tolist() == pytest.approx([20.0, 40.0], abs=1e-4)  # 10 log10(4 / 0.2^2)
    assert psnr(image, image).tolist() == [float("inf")] * 2


def test_ssim_of_flat_pictures_is_its_luminance_term() -> None:
    one, other = torch.full((1, 3, 16, 16), -0.2), torch.full((1, 3, 16, 16), 0.6)  # 0.4 and 0.8 of the range
    assert ssim(one, other).item() == pytest.approx((2 * 0.4 * 0.8 + 1e-4) / (0.4**2 + 0.8**2 + 1e-4))


def test_ssim_of_one_window_is_equation_13() -> None:
    x, y = noise(1, 1, 11, 11), noise(1, 1, 11, 11, seed=1)
    bell = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    weight = np.outer(bell, bell) / bell.sum() ** 2
    a, b = ((z[0, 0].double().numpy() + 1) / 2 for z in (x, y))
    ma, mb = (weight * a).sum(), (weight * b).sum()
    va, vb, cov = (weight * (a - ma) ** 2).sum(), (weight * (b - mb) ** 2).sum(), (weight * (a - ma) * (b - mb)).sum()
    expected = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    assert ssim(x, y).item() == pytest.approx(expected, abs=1e-9)


def test_ssim_is_1_only_for_equals_and_falls_with_noise() -> None:
    image = pictures([1, 2])
    assert ssim(image, image).tolist() == pytest.approx([1, 1])
    little, much = (ssim(image + sigma * noise(2, 3, 128, 128), image) for sigma in (0.05, 0.5))
    assert (much < little).all() and (little < 1).all()


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 16, 16\) and \(2, 3, 16, 16\)"):
        psnr(noise(1, 3, 16, 16), noise(2, 3, 16, 16))
    with pytest.raises(ValueError, match="11 pixels or more"):
        ssim(noise(1, 3, 8, 16), noise(1, 3, 8, 16))


def test_perceptual_distance_is_zero_for_equals_and_grows_with_blur_and_noise() -> None:
    image = pictures(range(4))
    grains = torch.randn(image.shape, generator=Generator().manual_seed(0))
    assert perceptual_distance(image, image).tolist() == [0] * 4
    spoiled = [blur(image, s) for s in (0.5, 1, 2, 4)], [(image + s * grains).clamp(-1, 1) for s in (0.02, 0.1, 0.3, 1)]
    for which in spoiled:
        distances = torch.stack([perceptual_distance(one, image) for one in which])  # (4 B)
        assert (distances[0] > 0).all() and (distances.diff(dim=0) > 0).all(), distances
    assert (perceptual_distance(image, image.flip(0)) > perceptual_distance(blur(image, 4), image)).all()
    with pytest.raises(ValueError, match="two equal shapes"):
        perceptual_distance(image, image[:2])


def test_a_loss_may_be_made_of_the_perceptual_distance() -> None:
    image = (0.9 * pictures([1])).requires_grad_()
    perceptual_distance(image, pictures([1])).sum().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0


# --- against a caption ------------------------------------------------------------------------------------------------------------


def test_the_prompts_rendered_are_recognised_and_swapped_are_not() -> None:
    rendered = drawn(*PROMPTS)
    assert caption_accuracy(rendered, PROMPTS).right.share >= 0.9
    assert caption_accuracy(rendered.roll(1, 0), PROMPTS).recognised.share <= 0.1
    assert caption_accuracy(torch.zeros(32, 3, 128, 128), PROMPTS).thing == (0, 40)


LEFT, RIGHT = Thing("house", "red", 0.27, 0.5, 0.42), Thing("fish", "blue", 0.73, 0.5, 0.42)


def shares(found: CaptionAccuracy, *names: str) -> list[float]:
    return [getattr(found, name).share for name in names]


def test_each_kind_of_mistake_shows_in_its_own_number() -> None:
    asked = Scene("meadow", (LEFT, RIGHT), "left")
    good = caption_accuracy(drawn(asked), [asked])
    assert shares(good, "thing", "relation", "placed", "count", "background", "right") == [1] * 6

    swapped = caption_accuracy(drawn(asked), [Scene("meadow", (LEFT, RIGHT), "right")])
    assert shares(swapped, "recognised", "relation", "placed", "right") == [1, 0, 0, 0]

    alone = caption_accuracy(drawn(Scene("meadow", (LEFT,))), [asked])
    assert shares(alone, "kind", "colour", "count", "relation", "recognised") == [0.5, 0.5, 0, 0, 0]
    assert alone.placed.of == 0 and isnan(alone.placed.share)

    elsewhere = caption_accuracy(drawn(asked), [Scene("night", (LEFT, RIGHT), "left")])
    assert shares(elsewhere, "background", "recognised", "right") == [0, 1, 0]

    painted = caption_accuracy(drawn(Scene("meadow", (LEFT,))), [Scene("meadow", (Thing("house", "green"),))])
    assert shares(painted, "kind", "colour", "recognised", "count") == [1, 0, 0, 1] and painted.relation.of == 0


def test_objects_are_known_by_their_kind_first() -> None:
    """Colours exchanged are two right kinds in wrong colours, not one thing and its opposite."""
    red, blue = Thing("house", "blue", 0.27, 0.5, 0.42), Thing("fish", "red", 0.73, 0.5, 0.42)
    [one] = judge(drawn(Scene("meadow", (red, blue), "left")), [Scene("meadow", (LEFT, RIGHT), "left")])
    assert (one.kinds, one.colours, one.relation, one.count, one.right) == ((True, True), (False, False), False, True, False)
    [one] = judge(drawn(Scene("meadow", (LEFT,))), [Scene("meadow", (Thing("star", "red"),))])
    assert (one.kinds, one.colours) == ((False,), (True,))  # something red stands in for the star


def test_accuracy_by_the_number_of_objects() -> None:
    asked = [Scene("meadow", (LEFT, RIGHT), "left"), Scene("meadow", (LEFT,)), Scene("meadow", (RIGHT,))]
    judged = judge(drawn(*asked[:2], asked[1]), asked)
    apart = tally_by_number(judged)
    assert {n: one.right for n, one in apart.items()} == {1: (1, 2), 2: (1, 1)}
    assert apart[1].relation == (0, 0) and apart[2].thing == (2, 2)


def test_intervals_are_wilson_s() -> None:
    """Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20 and 1 of 29."""
    known = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for counts, interval in known.items():
        assert Rate(*counts).interval == pytest.approx(interval, abs=1e-4)
    assert Rate(20, 20).interval == pytest.approx((1 - 0.1611, 1), abs=1e-4)
    assert isnan(Rate(0, 0).share) and isnan(Rate(0, 0).interval[0])
    assert str(Rate(81, 263)) == "30.8% (26 to 37) of 263" and str(Rate(0, 0)) == "of 0"


def test_as_many_pictures_as_scenes() -> None:
    with pytest.raises(ValueError, match="2 pictures for 1 scenes"):
        caption_accuracy(pictures([1, 2]), [scene(1)])


# --- in the towers' features ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["clip_l", "clip_g"])
def test_captions_find_their_pictures_among_a_hundred(tower: str) -> None:
    seeds = range(HELD_OUT, HELD_OUT + 100)
    likeness = clip_similarity(pictures(seeds), captions(seeds), tower)  # type: ignore[arg-type]
    assert likeness.shape == (100, 100) and likeness.abs().max() <= 1 + 1e-5
    assert (likeness.argmax(0) == torch.arange(100)).sum() >= 95


def test_the_clip_score_tells_true_captions_from_others() -> None:
    seeds = range(HELD_OUT, HELD_OUT + 32)
    image, text = pictures(seeds), captions(seeds)
    assert clip_score(image, text) > 0.9 and clip_score(image.roll(1, 0), text) < 0.3
    assert clip_score(image[:2], text[:2]) == pytest.approx(clip_similarity(image[:2], text[:2]).diagonal().mean().item())
    with pytest.raises(ValueError, match="32 pictures for 31 captions"):
        clip_score(image, text[1:])


def gaussian(n: int, width: int, seed: int) -> Tensor:
    return torch.randn(n, width, generator=Generator().manual_seed(seed), dtype=torch.float64)


def test_the_distance_of_gaussians_in_closed_form() -> None:
    x = gaussian(50, 3, seed=0)
    assert gaussian_distance(x, x) == pytest.approx(0, abs=1e-9)
    spread = torch.cov(x.T).trace().item()
    moved = torch.tensor([3.0, 0.0, 4.0])
    assert gaussian_distance(x, x + moved) == pytest.approx(25)
    assert gaussian_distance(x, 3 * (x - x.mean(0)) + x.mean(0)) == pytest.approx((3 - 1) ** 2 * spread)

    a, b = gaussian(50, 2, seed=1), gaussian(40, 2, seed=2) @ torch.tensor([[2.0, 0.5], [0.0, 1.0]], dtype=torch.float64)
    p, q = torch.cov(a.T), torch.cov(b.T)  # which do not commute; of 2 x 2 the root's trace is known from trace and determinant
    root = sqrt((p @ q).trace() + 2 * (p @ q).det().sqrt())
    expected = (a.mean(0) - b.mean(0)).square().sum() + p.trace() + q.trace() - 2 * root
    assert gaussian_distance(a, b) == pytest.approx(expected.item())
    assert gaussian_distance(b, a) == pytest.approx(expected.item())
    with pytest.raises(ValueError, match="x has 1 rows"):
        gaussian_distance(a[:1], b)


def test_frechet_distance_grows_as_pictures_get_worse_and_falls_with_their_number() -> None:
    reference, others = pictures(range(HELD_OUT, HELD_OUT + 100)), pictures(range(HELD_OUT + 100, HELD_OUT + 200))
    few, clean = frechet_distance(others[:40], reference[:40]), frechet_distance(others, reference)
    assert frechet_distance(blur(others, 2), reference) > clean > 0
    assert few > clean
    features = image_features(others), image_features(reference)
    assert clean == gaussian_distance(*features) and features[0].shape == (100, 96)


# --- against a hint ---------------------------------------------------------------------------------------------------------------


def square(left: int, top: int = 24) -> Tensor:
    edges = -torch.ones(1, 3, 64, 64)
    for line in (edges[..., top, left : left + 16], edges[..., top + 15, left : left + 16], edges[..., top : top + 16, left]):
        line.fill_(1)
    return edges


def test_edges_in_closed_form() -> None:
    none = -torch.ones(1, 3, 64, 64)
    both = torch.maximum(square(4), square(40))
    for pair, scores in (
        ((square(20), square(20)), (1, 1, 1)),
        ((square(20), square(24, 28)), (1, 1, 1)),  # 4 pixels away, across and down
        ((square(4), square(40)), (0, 0, 0)),
        ((both, square(4)), (0.5, 1, 2 / 3)),
        ((square(4), both), (1, 0.5, 2 / 3)),
        ((none, none), (1, 1, 1)),
        ((square(4), none), (0, 0, 0)),
        ((none, square(4)), (0, 0, 0)),
    ):
        assert [score.item() for score in edge_f1(*pair)] == pytest.approx(scores)
    line, away = -torch.ones(2, 1, 1, 32, 32)
    line[..., 10] = away[..., 18] = 1
    assert edge_f1(line, away).f1 == 1 and edge_f1(line, away, within=7).f1 == 0
    with pytest.raises(ValueError, match="two equal shapes"):
        edge_f1(none, none[:, :1])


def test_edges_of_scenes() -> None:
    image = pictures(range(HELD_OUT, HELD_OUT + 12))
    edges = canny(image)
    assert edge_f1(canny(image.roll(4, 3)), edges).f1.mean() > 0.95
    unrelated = edge_f1(edges.roll(1, 0), edges)
    assert unrelated.f1.shape == (12,) and unrelated.f1.mean() < 0.6
    assert edge_f1(edges.roll(1, 0), edges, within=2).f1.mean() < 0.3


# --- a transformer's loss ---------------------------------------------------------------------------------------------------------

SMALL = MMDiTConfig(depth=2, head_dim=8, in_channels=4, pos_embed_max_size=8, context_dim=16, pooled_dim=8)


def test_loss_by_time_of_a_transformer_that_says_nothing() -> None:
    """A new one's velocity is 0: the loss is that of the velocity itself, at all times."""
    latents, cond = noise(5, 4, 8, 8), Conditioning(noise(5, 3, 16), noise(5, 8))
    losses = loss_by_time(MMDiT(SMALL), latents, cond, torch.tensor([0.1, 0.5, 0.9]), Generator().manual_seed(3))
    expected = torch.randn(latents.shape, generator=Generator().manual_seed(3)).sub(latents).square().mean().item()
    assert losses.tolist() == pytest.approx([expected] * 3)


def test_loss_by_time_is_each_time_s_own_and_the_same_every_time() -> None:
    torch.manual_seed(0)
    mmdit = MMDiT(SMALL)
    for p in mmdit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    latents, cond, times = noise(5, 4, 8, 8), Conditioning(noise(5, 3, 16), noise(5, 8)), torch.tensor([0.2, 0.8])
    losses = loss_by_time(mmdit, latents, cond, times, Generator().manual_seed(3))
    assert torch.equal(losses, loss_by_time(mmdit, latents, cond, times, Generator().manual_seed(3)))
    grains = torch.randn(latents.shape, generator=Generator().manual_seed(3))
    for t, loss in zip(times, losses, strict=True):
        v = mmdit((1 - t) * latents + t * grains, t, *cond)
        assert loss.item() == pytest.approx(F.mse_loss(v, grains - latents).item())
    in_parts = loss_by_time(mmdit, latents, cond, times, Generator().manual_seed(3), batch=2)
    torch.testing.assert_close(in_parts, losses)


# --- to look at -------------------------------------------------------------------------------------------------------------------


def test_grid_lays_pictures_out_row_by_row() -> None:
    flat = torch.stack([torch.full((3, 8, 16), value) for value in (-1.0, 0.0, 2.0)])
    sheet = grid(flat, columns=2)
    assert sheet.size == (32, 16)
    assert [sheet.getpixel(at) for at in ((0, 0), (16, 7), (15, 8), (31, 15))] == [(0,) * 3, (128,) * 3, (255,) * 3, (255,) * 3]
    with pytest.raises(ValueError, match="needs pictures"):
        grid(torch.zeros(3, 8, 8))
