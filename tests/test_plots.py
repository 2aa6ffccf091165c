"""Figures keep their pixels, say what they show, and come out the same every time."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from minisd3 import plots

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


def test_long_heads_are_wrapped_and_leave_the_pictures_alone() -> None:
    head = "a red house to the left of a tree in a meadow"
    picture = plots.grid([[SQUARE]], title="one", columns=[head], labels=["beside it, in a few lines"], scale=4)
    assert holds(picture, plots.rgb(SQUARE).repeat(4, 0).repeat(4, 1))


FIGURES = {
    "grid": lambda: plots.grid([[SQUARE]], title="A square", columns=["of\nnoise"]),
    "lines": lambda: plots.lines({"up": ([1, 2], [1, 2]), "down": ([1, 2], [2, 1])}, title="Two ways", x="day", y="height (m)", log=True),
    "points": lambda: plots.points({"before": torch.zeros(1, 4, 2), "after": torch.ones(2, 4, 2)}, title="Moved", groups=torch.arange(4)),
    "where": lambda: plots.where("vae"),
}
SAID = {
    "grid": "A square: of noise",
    "lines": "Two ways: height (m) against day; up; down",
    "points": "Moved: before; after",
    "where": "The whole of SD3, from prompt and noise to a picture; lit up: VAE decoder",
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
