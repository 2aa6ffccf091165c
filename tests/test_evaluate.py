from math import isnan

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from minisd3.evaluate import STRIDE, Detector, caption_accuracy, detector, detector_loss, grid, psnr, ssim
from minisd3.scenes import BACKGROUNDS, COLOURS, HELD_OUT, KINDS, PROMPTS, Scene, Thing, pictures, scene


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


def test_detector_reads_scenes_it_never_saw() -> None:
    scenes = [scene(HELD_OUT + i) for i in range(200)]
    found = caption_accuracy(drawn(*scenes), scenes)
    assert min(found.kind, found.colour, found.thing, found.background, found.count, found.relation) >= 0.95, found


def test_detector_reads_other_shapes() -> None:
    scenes = [scene(HELD_OUT + 1000 + i) for i in range(24)]
    pixels = np.stack([np.asarray(one.render(128, 176)) for one in scenes])
    found = caption_accuracy(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, scenes)
    assert min(found.thing, found.background) >= 0.9, found


def test_detector_finds_objects_in_their_place() -> None:
    scenes = [scene(HELD_OUT + i) for i in range(64)]
    near = []
    for reading, one in zip(detector().read(drawn(*scenes)), scenes, strict=True):
        for thing in one.things:
            near += [
                max(abs(f.x - thing.x), abs(f.y - thing.y))
                for f in reading.things
                if (f.kind, f.colour) == (thing.kind, thing.colour)
            ]
    assert np.mean([distance <= 1.5 * STRIDE / 128 for distance in near]) >= 0.95


def test_the_prompts_rendered_are_recognised_and_swapped_are_not() -> None:
    rendered = drawn(*PROMPTS)
    assert caption_accuracy(rendered, PROMPTS).right >= 0.9
    assert caption_accuracy(rendered.roll(1, 0), PROMPTS).recognised <= 0.1
    assert caption_accuracy(torch.zeros(32, 3, 128, 128), PROMPTS).thing == 0


LEFT, RIGHT = Thing("house", "red", 0.27, 0.5, 0.42), Thing("fish", "blue", 0.73, 0.5, 0.42)


def test_each_kind_of_mistake_shows_in_its_own_number() -> None:
    asked = Scene("meadow", (LEFT, RIGHT), "left")
    good = caption_accuracy(drawn(asked), [asked])
    assert (good.thing, good.relation, good.count, good.background, good.right) == (1, 1, 1, 1, 1)

    swapped = caption_accuracy(drawn(asked), [Scene("meadow", (LEFT, RIGHT), "right")])
    assert (swapped.recognised, swapped.relation, swapped.right) == (1, 0, 0)

    alone = caption_accuracy(drawn(Scene("meadow", (LEFT,))), [asked])
    assert (alone.kind, alone.colour, alone.count, alone.relation, alone.recognised) == (0.5, 0.5, 0, 0, 0)

    elsewhere = caption_accuracy(drawn(asked), [Scene("night", (LEFT, RIGHT), "left")])
    assert (elsewhere.background, elsewhere.recognised, elsewhere.right) == (0, 1, 0)

    painted = caption_accuracy(drawn(Scene("meadow", (LEFT,))), [Scene("meadow", (Thing("house", "green"),))])
    assert (painted.kind, painted.colour, painted.recognised, painted.count) == (1, 0, 0, 1) and isnan(painted.relation)


def test_as_many_pictures_as_scenes() -> None:
    with pytest.raises(ValueError, match="2 pictures for 1 scenes"):
        caption_accuracy(pictures([1, 2]), [scene(1)])


def test_detector_learns() -> None:
    torch.manual_seed(0)
    net = Detector(width=16)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(12):  # the same step, so the same scenes and the same spoiling
        loss = detector_loss(net, 0, Generator().manual_seed(0), batch=2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    maps = net(noise(2, 3, 96, 128))
    assert maps.presence.shape == (2, 12, 16) and maps.background.shape == (2, len(BACKGROUNDS))
    assert maps.kind.shape == (2, len(KINDS), 12, 16) and maps.colour.shape == (2, len(COLOURS), 12, 16)


def test_grid_lays_pictures_out_row_by_row() -> None:
    flat = torch.stack([torch.full((3, 8, 16), value) for value in (-1.0, 0.0, 2.0)])
    sheet = grid(flat, columns=2)
    assert sheet.size == (32, 16)
    assert [sheet.getpixel(at) for at in ((0, 0), (16, 7), (15, 8), (31, 15))] == [(0,) * 3, (128,) * 3, (255,) * 3, (255,) * 3]
    with pytest.raises(ValueError, match="needs pictures"):
        grid(torch.zeros(3, 8, 8))
