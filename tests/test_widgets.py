"""Explorers without a browser: newest value wins, Stop stops, nothing is drawn twice, and bad values are said, not raised."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from minisd3.flow import sd3_schedule
from minisd3.pipeline import load
from minisd3.widgets import Explorer, Look, Watched, follow, guidance_explorer, slider, text

STEPS = 20


class Painter:
    """Draws grey pictures in STEPS steps, and keeps count of what was asked for and how far it came."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.steps = 0

    def __call__(self, grey: int) -> Iterator[tuple[float, Image.Image | None]]:
        if grey == 13:
            raise ValueError("grey is 13; choose another")
        self.begun.append(grey)
        for step in range(1, STEPS + 1):
            self.steps += 1
            yield step / STEPS, Image.new("L", (8, 8), grey) if step == STEPS else None


def explorer() -> tuple[Explorer, Painter]:
    painter = Painter()
    return Explorer(painter, {"grey": slider("grey", 1, 0, 255)}, shows="a grey square"), painter


def png(grey: int) -> bytes | None:
    return Image.new("L", (8, 8), grey)._repr_png_()


async def settle(view: Explorer) -> None:
    assert view.task is not None
    await view.task


def in_a_loop(test: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())

    run.__name__ = test.__name__
    return run


def test_the_first_picture_is_there_at_once() -> None:
    view, painter = explorer()
    assert view.image.value == png(1)
    assert view.note.value == "shown: grey 1"
    assert view.progress.value == 100
    assert painter.steps == STEPS


@in_a_loop
async def test_a_new_value_draws_a_new_picture() -> None:
    view, _ = explorer()
    view.controls["grey"].value = 200
    await settle(view)
    assert view.image.value == png(200)
    assert view.note.value == "shown: grey 200"


@in_a_loop
async def test_only_the_newest_of_many_values_is_drawn() -> None:
    view, painter = explorer()
    for grey in range(20, 30):
        view.controls["grey"].value = grey
    await settle(view)
    assert view.image.value == png(29)
    assert painter.steps == 2 * STEPS, "the nine values that were passed by should cost nothing"


@in_a_loop
async def test_a_newer_value_cuts_the_drawing_short() -> None:
    view, painter = explorer()
    view.controls["grey"].value = 50
    while painter.steps < STEPS + 3:
        await asyncio.sleep(0)
    view.controls["grey"].value = 60
    await settle(view)
    assert view.image.value == png(60)
    assert painter.begun == [1, 50, 60]
    assert painter.steps < 3 * STEPS


@in_a_loop
async def test_stop_stops_and_stays_stopped() -> None:
    view, painter = explorer()
    view.controls["grey"].value = 50
    while painter.steps < STEPS + 3:
        await asyncio.sleep(0)
    view.stop.click()
    await settle(view)
    assert painter.steps < 2 * STEPS
    assert view.image.value == png(1)
    assert view.note.value.startswith("stopped")


@in_a_loop
async def test_a_value_seen_before_is_not_drawn_again() -> None:
    view, painter = explorer()
    for grey in (2, 1, 2):
        view.controls["grey"].value = grey
        await settle(view)
        assert view.image.value == png(grey)
    assert painter.begun == [1, 2]


@in_a_loop
async def test_reset_goes_back_to_the_first_values() -> None:
    view, _ = explorer()
    view.controls["grey"].value = 50
    await settle(view)
    view.reset.click()
    await settle(view)
    assert view.values == {"grey": 1}
    assert view.image.value == png(1)


@in_a_loop
async def test_a_value_that_does_not_work_is_said() -> None:
    view, _ = explorer()
    view.controls["grey"].value = 13
    await settle(view)
    assert view.note.value == "grey is 13; choose another"
    view.controls["grey"].value = 14
    await settle(view)
    assert view.image.value == png(14)


def test_a_page_without_a_kernel_shows_the_first_picture() -> None:
    view, _ = explorer()
    bundle = view._repr_mimebundle_()
    assert isinstance(bundle["image/png"], bytes)  # Jupyter encodes nothing else
    assert bundle["image/png"] == png(1)
    assert bundle["text/plain"] == "a grey square; controls: grey"
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_controls_report_when_let_go() -> None:
    for control in (slider("a", 1, 0, 9), slider("b", 0.5, 0.0, 1.0, 0.1, unit="share"), text("c", "")):
        assert control.continuous_update is False
    assert slider("b", 0.5, 0.0, 1.0, 0.1, unit="share").description == "b (share)"


def test_an_explorer_without_controls_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one control"):
        Explorer(Painter(), {}, shows="")


def test_follow_shows_the_last_state_and_some_on_the_way() -> None:
    shown = [(done, picture is not None) for done, picture in follow(range(4), 4, lambda _: Image.new("L", (1, 1)), every=3)]
    assert shown == [(0.25, False), (0.5, False), (0.75, True), (1.0, True)]


def test_the_guidance_explorer_draws_what_generate_draws(random_model: Path) -> None:
    sd3 = load(random_model / "sd3_tiny.safetensors")
    sd3.preset = replace(sd3.preset, steps=2)
    view = guidance_explorer(sd3, "a red house", scale=1)
    assert view.image.value == sd3.generate("a red house", progress=False)[0]._repr_png_()
    guided = {"prompt": "a star", "negative": "red", "seed": 5, "steps": 3, "cfg": 2.0, "slg": 3.0}
    steps = list(view.draw(**guided))
    assert [round(done, 2) for done, _ in steps] == [0.33, 0.67, 1.0]
    assert sd3.preset.slg is not None
    slg = replace(sd3.preset.slg, scale=3.0)
    same = sd3.generate("a star", negative="red", seed=5, steps=3, cfg=2.0, slg=slg, progress=False)[0]
    assert steps[-1][1] is not None
    assert steps[-1][1]._repr_png_() == same._repr_png_()


def test_a_watched_drawing_is_the_one_that_generate_makes_and_is_made_once(random_model: Path) -> None:
    sd3 = load(random_model / "sd3_tiny.safetensors")
    watched = Watched(sd3, seed=3, steps=2)
    drawing = watched.drawing("a red house")
    assert next(drawing) == (0.5, None)
    assert not torch.overrides._get_current_function_mode_stack()  # nothing is recorded while others run
    assert next(drawing) == (1.0, None)
    with pytest.raises(StopIteration) as end:
        next(drawing)
    looks = watched.looks("a red house")
    assert looks is end.value.value is watched.looks("a red house")
    assert [token.text for token in watched.tokens("a red house")][:5] == ["start", "a", "red", "house", "end"]
    assert looks[-1].picture.tobytes() == sd3.generate("a red house", seed=3, steps=2, progress=False)[0].tobytes()
    assert [look.t for look in looks] == pytest.approx(sd3_schedule(2, sd3.preset.shift)[:2].tolist())
    assert set(looks[0].joint) == set(range(6)) and set(looks[0].second) == {0, 1, 2}
    assert looks[0].joint[5].weights.shape == (6, 104, 104) and not torch.equal(
        looks[0].joint[5].weights, looks[1].joint[5].weights
    )


def test_only_the_newest_drawings_are_kept(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(load(random_model / "sd3_tiny.safetensors"), steps=1, size=32)
    drawn: list[str] = []
    draw = watched._draw

    def counted(prompt: str) -> Iterator[Look]:
        drawn.append(prompt)
        return draw(prompt)

    monkeypatch.setattr(watched, "_draw", counted)
    for prompt in ("a", "b", "c", "d", "e", "b", "a"):
        assert watched.looks(prompt)[0].joint[0].size == (2, 2)
    assert drawn == ["a", "b", "c", "d", "e", "a"]
