"""What the notebooks draw: one style, pictures enlarged by whole numbers, and an alternative text with every figure.

Figures are made without pyplot, whose state is shared: a slider's callback runs in a second thread and may draw as well.
Colours are those of Okabe & Ito (2008), which colour-blind readers tell apart; curves differ in their dashes and carry their names too.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image
from torch import Tensor

from minisd3.config import require

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", "-", "--")
INK, GREY, PALE = "#222222", "#8a8a8a", "#eef1f4"
TEXT = 9.0  # points; at 100 pixels an inch, 12.5 pixels


@dataclass(frozen=True)
class Picture:
    """A figure, ready to be shown: the last line of a cell, or the value of an ipywidgets.Image."""

    png: bytes
    alt: str  # what it shows, for those who cannot see it
    width: int  # on the page, in CSS pixels

    def _repr_png_(self) -> bytes:
        return self.png

    def _repr_mimebundle_(self, **_: object) -> tuple[dict[str, object], dict[str, object]]:
        return {"image/png": self.png, "text/plain": self.alt}, {"image/png": {"alt": self.alt, "width": self.width}}


def _finish(figure: Figure, alt: str, *, drawing: bool) -> Picture:
    """The file of a figure, whose inches are 100 CSS pixels each. Notebooks keep it, so it is small: pictures lose what no eye sees, the
    last bits of their colours (51 steps from 0 to 255); drawings make do with 32 colours, and get 1.5 pixels for each CSS pixel."""
    file, small = io.BytesIO(), io.BytesIO()
    figure.savefig(file, format="png", dpi=150 if drawing else 100, metadata={"Software": None})
    with Image.open(file) as image:
        plain = image.convert("RGB")
    (plain.quantize(32) if drawing else plain.point(coarse)).save(small, format="png", optimize=True)
    return Picture(small.getvalue(), alt, round(100 * figure.get_size_inches()[0]))


def coarse(value: int) -> int:
    return (value + 2) // 5 * 5


# --- pictures ---------------------------------------------------------------------------------------------------------------------


def rgb(image: Image.Image | Tensor, top: float = 1.0) -> np.ndarray:
    """(H W 3) bytes of a PIL image, a tensor (3 H W) in [-1, 1], or a map (H W) in [0, top], dark to bright."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    require(image.ndim in (2, 3), f"a picture is (3 H W) and a map (H W), not {tuple(image.shape)}; show a batch as a list")
    array = image.detach().float().cpu()
    if array.ndim == 3:
        return ((array.permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    return colormaps["viridis"]((array / top).numpy(), bytes=True)[..., :3]


def grid(
    rows: Sequence[Sequence[Image.Image | Tensor]],
    *,
    title: str,
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    scale: int = 1,
) -> Picture:
    """Rows of pictures, `columns` above and `labels` beside them; all as wide as the widest `scale` times enlarged.

    Each is a PIL image, a tensor (3 H W) in [-1, 1] or a map (H W) of values >= 0; all maps share one range, from dark 0 to bright.
    """
    top = max([float(p.max()) for row in rows for p in row if isinstance(p, Tensor) and p.ndim == 2], default=1.0)
    cells = [[rgb(p, top) for p in row] for row in rows]
    width = max(c.shape[1] for row in cells for c in row) * scale
    cells = [[c.repeat(width // c.shape[1], 0).repeat(width // c.shape[1], 1) for c in row] for row in cells]
    height = max(c.shape[0] for row in cells for c in row)
    gap, letters = 6, max(int(width / 7.6), 8)  # letters that fit above a picture
    heads = [textwrap.fill(c, letters) for c in columns]
    left = gap + (12 + 7 * max((len(part) for label in labels for part in textwrap.wrap(label, 16)), default=-1) if labels else 0)
    above = 30 + 16 * max((h.count("\n") + 1 for h in heads), default=0)
    wide = max(left + max(len(row) for row in cells) * (width + gap), int(7.4 * len(title)) + 2 * gap)
    high = above + len(cells) * (height + gap)
    figure = Figure(figsize=(wide / 100, high / 100), dpi=100, facecolor="white")
    figure.text(gap / wide, 1 - 6 / high, title, size=TEXT + 1, weight="bold", color=INK, va="top")
    for i, head in enumerate(heads):
        x = left + i * (width + gap) + width / 2
        figure.text(x / wide, 1 - (above - 5) / high, head, size=TEXT, color=INK, ha="center", va="baseline")
    for r, row in enumerate(cells):
        y = above + r * (height + gap)
        if labels:
            label = textwrap.fill(labels[r], 16)
            figure.text((left - 8) / wide, 1 - (y + height / 2) / high, label, size=TEXT, color=INK, ha="right", va="center")
        for i, cell in enumerate(row):
            figure.figimage(cell, left + i * (width + gap), high - y - cell.shape[0])
    return _finish(figure, _say(title, *labels, *columns), drawing=False)


def _say(title: str, *names: str) -> str:
    return f"{title}: {'; '.join(' '.join(name.split()) for name in names)}" if names else title


# --- curves and points ------------------------------------------------------------------------------------------------------------


def _axes(figure: Figure, box: tuple[float, float, float, float], title: str, x: str = "", y: str = "") -> Axes:
    ax = figure.add_axes(box)
    ax.set_title(title, size=TEXT + 1, weight="bold", color=INK, loc="left")
    ax.set_xlabel(x, size=TEXT, color=INK)
    ax.set_ylabel(y, size=TEXT, color=INK)
    ax.tick_params(labelsize=TEXT - 1, colors=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def lines(
    curves: Mapping[str, tuple[Sequence[float] | Tensor, Sequence[float] | Tensor]],
    *,
    title: str,
    x: str,
    y: str,
    log: bool = False,
    dots: bool = True,
) -> Picture:
    """Curves name -> (xs, ys), each named at its right end. `log` is for both axes; `x` and `y` say quantity and unit."""
    figure = Figure(figsize=(7.2, 3.6), dpi=100, facecolor="white")
    ax = _axes(figure, (0.1, 0.15, 0.62, 0.74), title, x, y)
    ends = []
    for (name, curve), colour, dash in zip(curves.items(), COLOURS, DASHES, strict=False):
        xs, ys = (np.asarray(values, float) for values in curve)
        ax.plot(xs, ys, dash, color=colour, marker="o" if dots else "", markersize=4, linewidth=1.8)
        ends.append(((ys[-1], ys.mean()), xs[-1], name, colour))
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if log:
        ax.set(xscale="log", yscale="log")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
    placed = -np.inf
    for (end_y, _), end_x, name, colour in sorted(ends):
        at = ax.transData.transform((end_x, end_y))[1]
        placed = max(at, placed + 15)  # names that would overlap are pushed up
        offset = (placed - at) * 72 / 100
        ax.annotate(name, (end_x, end_y), (8, offset), textcoords="offset points", color=colour, size=TEXT, va="center",
                    annotation_clip=False)  # fmt: skip
    return _finish(figure, _say(title, f"{y} against {x}", *curves), drawing=True)


def points(panels: Mapping[str, Tensor], *, title: str, groups: Tensor | None = None, reach: float = 3.5) -> Picture:
    """Panels name -> (S N 2): N points that went through S states; their ways as thin lines, dots where they are now.

    groups (N,): small whole numbers, one colour each. The axes reach from -reach to reach.
    """
    side, count = 190, len(panels)
    figure = Figure(figsize=(count * side / 100, (side + 44) / 100), dpi=100, facecolor="white")
    figure.text(8 / (count * side), 1 - 6 / (side + 44), title, size=TEXT + 1, weight="bold", color=INK, va="top")
    for i, (name, states) in enumerate(panels.items()):
        ax = _axes(figure, ((i + 0.03) / count, 0.02, 0.94 / count, (side - 8) / (side + 44)), "")
        ax.set_title(name, size=TEXT, color=INK)
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[])
        ax.spines[:].set(visible=True, color="#cccccc")
        ax.plot(*states.unbind(-1), color=GREY, linewidth=0.5, alpha=0.6)
        for group in (groups if groups is not None else torch.zeros(states.shape[1])).unique():
            x, y = (states[-1] if groups is None else states[-1][groups == group]).unbind(-1)
            ax.scatter(x, y, s=7, color=COLOURS[int(group)], marker="os^Dv"[int(group) % 5], zorder=3)
    return _finish(figure, _say(title, *panels), drawing=True)


# --- the whole, and where we are in it --------------------------------------------------------------------------------------------

_BOXES = {  # name: notebook, left, top, width, height, text
    "text": ("04", 150, 12, 150, 46, "text encoders\nCLIP-L, CLIP-G, T5"),
    "patchify": ("02", 150, 92, 150, 46, "patchify, positions,\ntime embedding"),
    "mmdit": ("03", 356, 12, 130, 126, "MMDiT\nblocks of joint\nattention"),
    "sampling": ("05", 552, 92, 130, 46, "guidance and\nsampler"),
    "vae": ("01", 738, 92, 100, 46, "VAE decoder"),
    "controlnet": ("06", 150, 172, 150, 46, "ControlNet"),
    "training": ("07", 552, 12, 130, 46, "training: learns\nv = noise − x0"),
}
_NAMES = (("prompt", 70, 35), ("residuals", 345, 195), ("noise, then x_t", 70, 115), ("hint: edges,\nblur, depth", 70, 195), ("picture", 900, 115))
_ARROWS = (  # from, to, what flows
    ((110, 35), (150, 35), ""), ((118, 115), (150, 115), ""), ((110, 195), (150, 195), ""),
    ((300, 35), (356, 35), "context\npooled"), ((300, 115), (356, 115), "tokens"), ((300, 195), (385, 138), ""),
    ((486, 115), (552, 115), "velocity"), ((486, 35), (552, 35), ""), ((682, 115), (738, 115), "x0"), ((838, 115), (872, 115), ""),
)  # fmt: skip


def where(lit: str) -> Picture:
    """The whole of SD3 in one diagram, with the piece that a notebook is about lit up: text, patchify, mmdit, sampling, vae, ..."""
    require(lit in _BOXES, f"the diagram has no piece {lit!r}; it has {', '.join(_BOXES)}")
    figure = Figure(figsize=(9.4, 2.3), dpi=100, facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 940), ylim=(230, 0))
    ax.axis("off")
    for name, (number, x, y, w, h, text) in _BOXES.items():
        on = name == lit
        ax.add_patch(FancyBboxPatch((x, y), w, h, "round,pad=0,rounding_size=6", facecolor="#F0E442" if on else PALE,
                                    edgecolor=INK if on else GREY, linewidth=2 if on else 1))  # fmt: skip
        ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", size=TEXT, weight="bold" if on else "normal", color=INK)
        ax.text(x + w - 5, y + h - 4, number, ha="right", va="bottom", size=TEXT - 2.5, color=INK if on else GREY)
    for text, x, y in _NAMES:
        ax.text(x, y, text, ha="center", va="center", size=TEXT, color=INK)
    for start, end, text in _ARROWS:
        ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=GREY, shrinkA=1, shrinkB=1))
        ax.text((start[0] + end[0]) / 2, start[1] - 5, text, ha="center", va="bottom", size=TEXT - 2, color=INK)
    ax.plot((617, 617, 70, 70), (138, 158, 158, 140), color=COLOURS[0])
    ax.add_patch(FancyArrowPatch((70, 150), (70, 124), arrowstyle="-|>", mutation_scale=10, color=COLOURS[0]))
    ax.text(605, 162, "again at every step, t from 1 to 0", ha="right", va="top", size=TEXT - 1, color=COLOURS[0])
    text = " ".join(_BOXES[lit][5].split())
    return _finish(figure, f"The whole of SD3, from prompt and noise to a picture; lit up: {text}", drawing=True)
