"""Figures keep their pixels, say what they show, and come out the same every time."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from minisd3 import plots
from minisd3.config import TextConfig

SQUARE = torch.rand(3, 10, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1


def pixels(picture: plots.Picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB"))


def holds(picture: plots.Picture, part: np.ndarray) -> bool:
    """Whether the part is somewhere in the picture, to the pixel, and to the two grey levels by which colours are rounded."""
    found = np.lib.stride_tricks.sliding_window_view(pixels(picture).astype(int), part.shape)
    return bool((abs(found - part) <= 2).all((-1, -2, -3)).any())


@pytest.mark.parametrize("scale", [1, 3])
def test_a_grid_enlarges_every_pixel_by_a_whole_number(scale: int) -> None:
    shown = plots.rgb(SQUARE).repeat(scale, 0).repeat(scale, 1)
    assert holds(plots.grid([[SQUARE, -SQUARE], [-SQUARE, SQUARE]], title="four", scale=scale), shown)


def test_a_map_fills_the_place_of_a_picture_and_shares_one_range() -> None:
    low, high = torch.full((5, 6), 0.5), torch.ones(5, 6)
    picture = plots.grid([[SQUARE, low, high]], title="maps")
    for values in (low, high):
        assert holds(picture, plots.rgb(values).repeat(2, 0).repeat(2, 1))
    assert not np.array_equal(plots.rgb(low), plots.rgb(high))


def test_pictures_are_rounded_and_cut_to_bytes() -> None:
    assert plots.rgb(torch.tensor([-2.0, 0.004, 1.0])[:, None, None])[0, 0].tolist() == [0, 128, 255]
    image = Image.new("L", (2, 2), 77)
    assert (plots.rgb(image) == 77).all()
    with pytest.raises(ValueError, match="show a batch as a list"):
        plots.rgb(torch.zeros(1, 3, 4, 4))


def test_a_signed_map_is_white_at_zero_and_turns_its_colour_with_its_sign() -> None:
    below, zero, above = (
        np.asarray(plots.signed(torch.full((1, 1), value), reach=2.0))[0, 0].astype(int) for value in (-5.0, 0.0, 2.0)
    )
    assert (zero > 240).all() and below[2] > below[0] + 50 and above[0] > above[2] + 50
    with pytest.raises(ValueError, match=r"not \(1, 2, 2\)"):
        plots.signed(torch.zeros(1, 2, 2), reach=1.0)


def test_long_heads_are_wrapped_and_leave_the_pictures_alone() -> None:
    head = "a red house to the left of a tree in a meadow"
    picture = plots.grid([[SQUARE]], title="one", columns=[head], labels=["beside it, in a few lines"], scale=4)
    assert holds(picture, plots.rgb(SQUARE).repeat(4, 0).repeat(4, 1))


def test_a_title_that_is_wider_than_its_pictures_is_not_cut() -> None:
    assert (pixels(plots.grid([[SQUARE]], title="What half noise leaves of a latent with these spreads"))[:, -4:] == 255).all()


FIGURES = {
    "grid": lambda: plots.grid([[SQUARE]], title="A square", columns=["of\nnoise"]),
    "lines": lambda: plots.lines(
        {"up": ([1, 2], [1, 2]), "down": ([1, 2], [2, 1])}, title="Two ways", x="day", y="height (m)", log=True
    ),
    "points": lambda: plots.points(
        {"before": torch.zeros(1, 4, 2), "after": torch.ones(2, 4, 2)}, title="Moved", groups=torch.arange(4)
    ),
    "where": lambda: plots.where("vae"),
    "heat": lambda: plots.heat(
        torch.arange(6.0).view(2, 3), title="By day", rows=["a", "b"], columns=["1", "2", "3"], unit="share", numbers=True
    ),
    "bars": lambda: plots.bars({"small": {"a": 1, "b": 2}, "large": {"b": 3}}, title="Sizes", x="parameters"),
    "joint block": lambda: plots.joint_block(),
    "joined": lambda: plots.joined(TextConfig()),
    "quadrants": lambda: plots.quadrants(torch.eye(4), ["a", "b", "c"], {"CLIP": 1, "T5": 2}, title="Map"),
}
SAID = {
    "grid": "A square: of noise",
    "lines": "Two ways: height (m) against day; up; down",
    "points": "Moved: before; after",
    "where": "The whole of SD3, from prompt and noise to a picture; lit up: VAE decoder",
    "heat": "By day: share; a; b",
    "bars": "Sizes: parameters; small; large; made of a, b",
    "joint block": "One joint block: text and picture each have their own norm, queries, keys and values, map, gate and MLP; "
    "the attention is over both",
    "joined": "The context, 154 tokens of 4096 features, and the pooled vector, to scale: "
    "CLIP-L 77 x 768; CLIP-G 77 x 1280; zeros 77 x 2048; T5 77 x 4096",
    "quadrants": "Map: CLIP; T5; picture",
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_says_what_it_shows_and_is_the_same_every_time(name: str) -> None:
    first, second = FIGURES[name](), FIGURES[name]()
    assert first == second
    data, metadata = first._repr_mimebundle_()
    assert data == {"image/png": first.png, "text/plain": SAID[name]}
    assert metadata["image/png"] == {"alt": SAID[name], "width": first.width}
    assert pixels(first).shape[1] in (first.width, 1.5 * first.width)


def test_every_piece_can_be_lit_and_no_other() -> None:
    drawn = {plots.where(name).png for name in ("text", "patchify", "mmdit", "sampling", "vae", "controlnet", "training")}
    assert len(drawn) == 7
    with pytest.raises(ValueError, match="no piece 'unet'; it has text, patchify"):
        plots.where("unet")


def test_a_heat_map_runs_from_its_smallest_value_to_its_largest() -> None:
    values = torch.tensor([[0.2, 0.7], [float("nan"), 0.4]])
    picture = plots.heat(values, title="t", rows=["a", "b"], columns=["1", "2"], unit="share")
    for value, (red, green, blue) in ((0.0, (68, 1, 84)), (1.0, (253, 231, 37))):  # the ends of viridis
        assert holds(picture, np.full((8, 8, 3), (red, green, blue))), value
    with pytest.raises(ValueError, match=r"\(2, 2\) values for 1 rows and 2 columns"):
        plots.heat(values, title="t", rows=["a"], columns=["1", "2"], unit="share")


def test_quadrants_give_words_more_room_than_patches() -> None:
    weights = torch.zeros(5, 5)
    weights[0, 0] = weights[4, 4] = 1.0  # a word that reads itself, and a patch that does
    bright, dark = (253, 231, 37), (68, 1, 84)
    picture = plots.quadrants(
        weights, ["a", "b"], {"CLIP": 1, "T5": 1}, title="t", picture=Image.new("RGB", (128, 128), (255, 0, 0))
    )
    assert holds(picture, np.full((12, 12, 3), bright)) and holds(picture, np.full((12, 12, 3), (255, 0, 0)))
    patches = np.full((10, 10, 3), dark)
    patches[5:, 5:] = bright
    assert holds(picture, patches[1:-1, 1:-1])
    with pytest.raises(ValueError, match="do not add up to the 2 names"):
        plots.quadrants(weights, ["a", "b"], {"CLIP": 1}, title="t")


def test_an_overlay_keeps_the_picture_and_marks_its_brightest_patch() -> None:
    picture = Image.new("RGB", (8, 8), (100, 100, 100))
    laid = np.asarray(plots.overlay(picture, torch.tensor([[0.0, 1.0], [2.0, 0.0]])))
    assert laid.shape == (8, 8, 3) and (laid[:4, :4] == laid[0, 0]).all()
    expected = 0.35 * 100 + 0.65 * plots.rgb(torch.tensor([[0.0, 0.5, 1.0]]))[0]
    assert np.abs(laid[[0, 0, 7], [0, 7, 0]] - expected).max() <= 1
    assert np.array_equal(np.asarray(plots.overlay(picture, torch.ones(1, 1), top=2.0))[0, 0], laid[0, 7])


def test_which_block_feeds_which_is_said_and_every_block_feeds_one() -> None:
    picture = plots.feeds([0, 0, 1, 1], title="two for four")
    assert picture.alt == "two for four: ControlNet block 0 feeds base blocks 0, 1; ControlNet block 1 feeds base blocks 2, 3"
    assert picture.png != plots.feeds([0, 1, 1, 1], title="two for four").png
    with pytest.raises(ValueError, match=r"blocks \[0\] feed no block"):
        plots.feeds([1, 1], title="one")


def test_curves_over_fractions_have_lines_between_whole_numbers() -> None:
    def upright(xs: list[float]) -> int:
        """Columns of pixels that a line of the grid goes through."""
        picture = pixels(plots.lines({"up": (xs, [0.0, 1.0])}, title="one", x="time", y="height", dots=False))
        return int(((abs(picture.astype(int) - 0xDD) < 8).all(-1).sum(0) > len(picture) / 2).sum())

    assert 0 < upright([0.0, 1.0]) < upright([0.0, 0.9])


def test_logarithmic_axes_are_marked_even_where_values_are_close() -> None:
    def level(ys: list[float]) -> int:
        """Rows of pixels that a line of the grid goes through."""
        picture = pixels(plots.lines({"down": ([1.0, 100.0], ys)}, title="one", x="work", y="loss", log=True, dots=False))
        return int(((abs(picture.astype(int) - 0xDD) < 8).all(-1).sum(1) > picture.shape[1] / 3).sum())

    assert level([1.9, 0.9]) >= 4
