"""Sliders for the notebooks: let one go, and the picture is drawn again, step by step, until a newer value or Stop ends it.

JupyterLab runs these callbacks in a second thread, where the kernel's interrupt does not reach; so drawing is a generator of steps in
an asyncio task, which gives up between two steps once its ticket is no longer the newest. Results are kept by value.
"""

import asyncio
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeVar

import ipywidgets as W
import torch
from PIL import Image

from minisd3.config import require
from minisd3.flow import sd3_schedule
from minisd3.introspect import AttentionMap, AttentionRecorder, ContextToken, context_tokens
from minisd3.pipeline import SD3, Size

T = TypeVar("T")


class Shown(Protocol):
    """What can be shown: a PIL image, or a plots.Picture."""

    @property
    def width(self) -> int: ...  # on the page, in CSS pixels

    def _repr_png_(self) -> bytes | None: ...


# after each step the share done, 0 to 1, and a picture where there is one to show; the last step must have one
Steps = Iterator[tuple[float, Shown | None]]

_LABEL = {"description_width": "170px"}


def slider(label: str, value: float, low: float, high: float, step: float = 1, unit: str = "") -> W.Widget:
    """A slider that reports when it is let go; of whole numbers if value and step are whole."""
    kind = W.IntSlider if isinstance(value, int) and isinstance(step, int) else W.FloatSlider
    label = f"{label} ({unit})" if unit else label
    return kind(
        value, min=low, max=high, step=step, description=label, continuous_update=False, style=_LABEL, layout={"width": "480px"}
    )


def text(label: str, value: str) -> W.Widget:
    """A line of text that reports at Enter, or when it is left."""
    return W.Text(value, description=label, continuous_update=False, style=_LABEL, layout={"width": "640px"})


class Explorer:
    """Controls by name, and the picture that `draw(**values)` makes of their values. Show it as a cell's last line.

    shows: what the picture shows, for those who cannot see it. The first one is drawn at once; where there is no kernel, it stands alone.
    """

    def __init__(self, draw: Callable[..., Steps], controls: Mapping[str, W.Widget], *, shows: str) -> None:
        require(len(controls) > 0, "an Explorer needs at least one control")
        self.draw, self.controls, self.shows = draw, dict(controls), shows
        self.task: asyncio.Task[None] | None = None  # the newest drawing
        self._first, self._kept = self.values, dict[tuple[object, ...], Shown]()
        self._tickets, self._newest = itertools.count(), -1
        self.image, self.note = W.Image(format="png"), W.Label()
        self.progress = W.IntProgress(0, 0, 100, layout={"width": "300px"})
        self.stop = W.Button(description="Stop", tooltip="stop after this step", layout={"width": "80px"})
        self.reset = W.Button(description="Reset", tooltip="back to the first values", layout={"width": "80px"})
        self.box = W.VBox([*self.controls.values(), W.HBox([self.stop, self.reset, self.progress]), self.note, self.image])
        self.box.add_class("minisd3-explorer")
        for control in self.controls.values():
            control.observe(self._start, "value")
        self.stop.on_click(self._stop)
        self.reset.on_click(self._reset)
        self.run_now()

    @property
    def values(self) -> dict[str, Any]:
        return {name: control.value for name, control in self.controls.items()}

    def run_now(self) -> None:
        """Draw the present values to the end, and wait for it."""
        for _ in self._drawing(self._ticket()):
            pass

    def _ticket(self) -> int:
        self._newest = next(self._tickets)
        return self._newest

    def _drawing(self, ticket: int) -> Iterator[None]:
        """Yields after every step, so that a newer value, or Stop, can come in."""
        values = self.values
        key = tuple(values.values())
        said = ", ".join(f"{control.description} {control.value!r}" for control in self.controls.values())
        steps = iter([(1.0, self._kept[key])]) if key in self._kept else self.draw(**values)
        picture = None
        while ticket == self._newest and (step := next(steps, None)):
            done, picture = step
            if ticket == self._newest:
                self._show(done, picture, f"drawing {said}")
            yield
        if ticket == self._newest:
            assert picture is not None, "the last step of a drawing must come with its picture"
            self._kept[key] = picture
            self._show(1, picture, f"shown: {said}")

    def _show(self, done: float, picture: Shown | None, note: str) -> None:
        self.progress.value, self.note.value = round(100 * done), note
        if picture is not None:
            self.image.layout.width = f"{picture.width}px"
            self.image.value = picture._repr_png_()

    async def _run(self, ticket: int) -> None:
        try:
            for _ in self._drawing(ticket):
                await asyncio.sleep(0.002)
        except ValueError as error:  # a value that draw does not take
            self.note.value = str(error)

    def _start(self, _change: object) -> None:
        self.task = asyncio.get_running_loop().create_task(self._run(self._ticket()))

    def _stop(self, _button: object) -> None:
        self._ticket()
        self.note.value = "stopped; change a value to draw again"

    def _reset(self, _button: object) -> None:
        for name, control in self.controls.items():
            control.value = self._first[name]

    def _repr_mimebundle_(self, **kwargs: object) -> dict[str, object]:
        alt = f"{self.shows}; controls: {', '.join(control.description for control in self.controls.values())}"
        return {**self.box._repr_mimebundle_(**kwargs), "image/png": bytes(self.image.value), "text/plain": alt}


def follow(states: Iterable[T], steps: int, show: Callable[[T], Shown], *, every: int = 0) -> Steps:
    """What a sampler yields, as an Explorer's steps: shown at the end, and after `every` so many steps."""
    for done, state in enumerate(states, start=1):
        yield done / steps, show(state) if done == steps or (every and done % every == 0) else None


def enlarged(picture: Image.Image, scale: int = 3) -> Image.Image:
    """Every pixel scale x scale times, none invented."""
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def guidance_explorer(sd3: SD3, prompt: str, *, scale: int = 3) -> Explorer:
    """Type a prompt, choose seed, steps and guidance, and see the picture form."""
    preset = sd3.preset

    def draw(prompt: str, negative: str, seed: int, steps: int, cfg: float, slg: float = 0.0) -> Steps:
        skipping = replace(preset.slg, scale=slg) if preset.slg and slg else None
        noise = sd3.noise([torch.Generator().manual_seed(seed)])
        states = sd3.sample(noise, *sd3.encode_prompt(prompt, negative), steps=steps, cfg=cfg, slg=skipping)
        return follow(states, steps, lambda latent: enlarged(sd3.decode(latent)[0], scale), every=4)

    controls = {
        "prompt": text("prompt", prompt),
        "negative": text("negative prompt", ""),
        "seed": slider("seed", 0, 0, 99),
        "steps": slider("steps", preset.steps, 1, 2 * preset.steps),
        "cfg": slider("CFG scale", preset.cfg, 1.0, 12.0, 0.5),
    }
    if preset.slg:
        controls["slg"] = slider("skip-layer scale", 0.0, 0.0, 6.0, 0.25)
    return Explorer(draw, controls, shows=f"the picture drawn from the prompt {prompt!r}")


class Look(NamedTuple):
    """A step of a drawing: what the picture is becoming, and what attends to what, by block."""

    t: float
    picture: Image.Image  # where it would end if it went straight on from here
    joint: dict[int, AttentionMap]
    second: dict[int, AttentionMap]  # the picture's own attention, in dual blocks


class Watched:
    """A model's drawings with all their attention: each prompt is drawn once, and can then be looked at from every side.

    A map of L tokens takes 4 L^2 bytes for each head, block and step, so a large model needs a small size and few steps. The newest
    drawings are kept.
    """

    KEPT = 4

    def __init__(self, sd3: SD3, *, seed: int = 0, steps: int | None = None, size: Size | None = None) -> None:
        self.sd3, self.seed, self.settings, self.size = sd3, seed, sd3.settings(steps=steps), size
        self._kept: dict[str, list[Look]] = {}

    def tokens(self, prompt: str) -> list[ContextToken]:
        return context_tokens(self.sd3.text.tokenize(prompt))

    def looks(self, prompt: str) -> list[Look]:
        """One for each step."""
        if prompt not in self._kept:
            for _ in self.drawing(prompt):
                pass
        return self._kept[prompt]

    def drawing(self, prompt: str) -> Generator[tuple[float, None], None, list[Look]]:
        """The same for an Explorer's draw, step by step: `looks = yield from watched.drawing(prompt)`."""
        if prompt not in self._kept:
            looks: list[Look] = []
            for look in self._draw(prompt):
                looks.append(look)
                yield len(looks) / self.settings.steps, None
            self._kept = dict([*self._kept.items(), (prompt, looks)][-self.KEPT :])
        return self._kept[prompt]

    def _draw(self, prompt: str) -> Iterator[Look]:
        x = self.sd3.noise([torch.Generator().manual_seed(self.seed)], self.size)
        states = self.sd3.sample(x, *self.sd3.encode_prompt(prompt), **self.settings._asdict())
        for t, t_next in pairwise(sd3_schedule(self.settings.steps, self.settings.shift).tolist()):
            with AttentionRecorder(self.sd3.mmdit) as recorder:  # not open while others run, between two steps
                latent = next(states)
            guess = latent + (latent - x) * (t_next / (t - t_next))
            joint, second = ({block: kept for (_, block), kept in maps.items()} for maps in (recorder.maps, recorder.second))
            yield Look(t, self.sd3.decode(guess)[0], joint, second)
            x = latent
