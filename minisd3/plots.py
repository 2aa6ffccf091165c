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
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image
from torch import Tensor

from minisd3.config import TextConfig, require

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


def signed(values: Tensor, reach: float) -> Image.Image:
    """A map (H W) of values of both signs as a picture: blue below 0, white at 0, red above, darkest at -reach and reach."""
    require(values.ndim == 2, f"a map is (H W), not {tuple(values.shape)}")
    share = (values.detach().float().cpu() / reach).clamp(-1, 1).add(1).div(2)
    return Image.fromarray(colormaps["RdBu_r"](share.numpy(), bytes=True)[..., :3])


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
    wide = max(left + max(len(row) for row in cells) * (width + gap), 8 * len(title) + 2 * gap)
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
    whole = all(float(value).is_integer() for xs, _ in curves.values() for value in xs)  # steps, of which there are no halves
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=whole))
    if log:
        ax.set(xscale="log", yscale="log")
        for axis in (ax.xaxis, ax.yaxis):
            low, high = axis.get_view_interval()
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 4 * low else MaxNLocator(6))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
    placed: list[tuple[float, float]] = []
    for (end_y, _), end_x, name, colour in sorted(ends):
        right, at = ax.transData.transform((end_x, end_y))
        beside = [height + 15 for other, height in placed if abs(right - other) < 100]
        up = max([at, *beside])  # names that would overlap are pushed up
        placed.append((right, up))
        offset = (up - at) * 72 / 100
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


# --- numbers as colours -----------------------------------------------------------------------------------------------------------


def heat(
    values: Tensor,
    *,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    unit: str,
    x: str = "",
    y: str = "",
    numbers: bool = False,
    turned: bool = False,
) -> Picture:
    """A table (R C) as colours, from dark, its smallest value, to bright, its largest; NaN stays white. `numbers` writes them as well.

    Rows and columns are named, columns where there is room, or all of them if `turned` on their side; `x` and `y` say what they are,
    `unit` what the colours mean.
    """
    require(
        values.shape == (len(rows), len(columns)), f"{tuple(values.shape)} values for {len(rows)} rows and {len(columns)} columns"
    )
    across = max(540 / len(columns), 1)
    down = min(max(across, 16), 40)
    left, right, above, below = 24 + 6.4 * max(map(len, rows)) + (14 if y else 0), 90, 34, 34.0 + (18 if x else 0)
    below += 6.2 * max(map(len, columns)) - 8 if turned else 0
    wide, high = left + across * len(columns) + right, above + down * len(rows) + below
    figure = Figure(figsize=(wide / 100, high / 100), dpi=100, facecolor="white")
    box = (left / wide, below / high, across * len(columns) / wide, down * len(rows) / high)
    ax = _axes(figure, box, title, x, y)
    ax.grid(visible=False)
    array = values.detach().float().cpu().numpy()
    low, top = np.nanmin(array), np.nanmax(array)
    drawn = ax.imshow(array, cmap="viridis", aspect="auto", interpolation="nearest")
    every = max(1, round((14 if turned else 46) / across))  # columns, so that their names do not touch
    ax.set_xticks(range(0, len(columns), every), columns[::every], rotation=90 if turned else 0)
    ax.set_yticks(range(len(rows)), rows)
    digits = 0 if np.array_equal(array, array.round(), equal_nan=True) else 2
    for (i, j), value in np.ndenumerate(array) if numbers else ():
        if not np.isnan(value):
            ax.text(
                j, i, f"{value:.{digits}f}", ha="center", va="center", size=TEXT - 1.5, color=INK if value > (low + top) / 2 else "white"
            )
    _colour_bar(figure, drawn, (1 - (right - 12) / wide, box[1], 12 / wide, box[3]), unit)
    return _finish(figure, _say(title, unit, *rows), drawing=False)


def _colour_bar(figure: Figure, drawn: ScalarMappable, box: tuple[float, float, float, float], unit: str) -> None:
    bar = figure.colorbar(drawn, cax=figure.add_axes(box))
    bar.outline.set_visible(False)
    bar.set_label(unit, size=TEXT - 1, color=INK)
    bar.ax.tick_params(labelsize=TEXT - 2, colors=INK)
    bar.locator = MaxNLocator(5)
    bar.update_ticks()


def bars(stacks: Mapping[str, Mapping[str, float]], *, title: str, x: str) -> Picture:
    """One bar for each name, made of named parts, the same ones in all; `x` says quantity and unit."""
    parts = list(dict.fromkeys(part for stack in stacks.values() for part in stack))
    require(len(parts) <= len(COLOURS), f"{len(parts)} parts for {len(COLOURS)} colours; join the smallest")
    high = 86 + 30 * len(stacks)
    figure = Figure(figsize=(7.6, high / 100), dpi=100, facecolor="white")
    ax = _axes(figure, (0.19, 44 / high, 0.58, 30 * len(stacks) / high), title, x)
    for part, colour in zip(parts, COLOURS, strict=False):
        before = [sum(value for name, value in stack.items() if parts.index(name) < parts.index(part)) for stack in stacks.values()]
        widths = [stack.get(part, 0.0) for stack in stacks.values()]
        ax.barh(range(len(stacks)), widths, 0.66, before, color=colour, edgecolor="white", label=part)
    ax.set_yticks(range(len(stacks)), list(stacks))
    ax.invert_yaxis()
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=TEXT - 1, frameon=False)
    return _finish(figure, _say(title, x, *stacks, "made of " + ", ".join(parts)), drawing=True)


# --- attention --------------------------------------------------------------------------------------------------------------------


def overlay(picture: Image.Image, heat: Tensor, *, top: float | None = None) -> Image.Image:
    """A heat map (h w) of values >= 0 laid over a picture, one rectangle a patch, dark 0 to bright `top` (by default its largest)."""
    share = (heat / (top or float(heat.max()) or 1.0)).clamp(0, 1)
    colours = Image.fromarray(rgb(share)).resize(picture.size, Image.Resampling.NEAREST)
    return Image.blend(picture.convert("L").convert("RGB"), colours, 0.65)


def quadrants(
    weights: Tensor, names: Sequence[str], groups: Mapping[str, int], *, title: str, picture: Image.Image | None = None
) -> Picture:
    """An attention map (L L): rows read, columns are read. The first tokens have names, in groups of so many; the rest are the picture's.

    Colours follow the square root of a weight, so that small ones are seen too. `picture` is shown beside the map.
    """
    text = len(names)
    require(sum(groups.values()) == text, f"groups {dict(groups)} do not add up to the {text} names")
    edges = np.cumsum([0, *[13] * text, *[5] * (len(weights) - text)])  # in pixels
    side, left, above, right = int(edges[-1]), 84, 104, 80 + (170 if picture else 0)
    wide, high = left + side + right, above + max(side, 128 if picture else 0) + 28
    figure = Figure(figsize=(wide / 100, high / 100), dpi=100, facecolor="white")
    figure.text(8 / wide, 1 - 6 / high, title, size=TEXT + 1, weight="bold", color=INK, va="top")
    bottom = 1 - (above + side) / high
    ax = figure.add_axes((left / wide, bottom, side / wide, side / high))
    ax.set(xlim=(0, side), ylim=(side, 0))
    ax.spines[:].set_visible(False)
    drawn = ax.pcolormesh(edges, edges, weights.numpy(), cmap="viridis", norm=PowerNorm(0.5, vmin=0), rasterized=True)
    centres = (edges[1:] + edges[:-1])[:text] / 2
    ax.xaxis.tick_top()
    ax.set_xticks(centres, names, rotation=90)
    ax.set_yticks(centres, names)
    ax.tick_params(length=0, pad=2, labelsize=TEXT - 1.5, colors=INK)
    places = [0, *np.cumsum([*groups.values(), len(weights) - text]).tolist()]
    for (name, first), last in zip(zip([*groups, "picture, patch by patch"], places, strict=False), places[1:], strict=True):
        begin, end = edges[first], edges[last]
        ax.axvline(end, color="white", linewidth=2)
        ax.axhline(end, color="white", linewidth=2)
        ax.text((begin + end) / 2, side + 5, name, ha="center", va="top", size=TEXT, color=INK)
    ax.text(-10, (edges[text] + side) / 2, "picture", ha="right", va="center", size=TEXT, color=INK)
    _colour_bar(figure, drawn, ((left + side + 14) / wide, bottom, 12 / wide, side / high), "attention weight")
    if picture is not None:
        shown = rgb(picture.resize((128, 128), Image.Resampling.NEAREST) if max(picture.size) < 128 else picture)
        figure.figimage(shown, wide - 8 - shown.shape[1], high - above - shown.shape[0])
        figure.text(1 - (8 + shown.shape[1]) / wide, 1 - (above - 5) / high, "the picture so far", size=TEXT, color=INK)
    return _finish(figure, _say(title, *groups, "picture"), drawing=False)


# --- text -------------------------------------------------------------------------------------------------------------------------


def joined(text: TextConfig) -> Picture:
    """How the three encoders' outputs make the context and the pooled vector, to scale: features across, tokens down."""
    l, g, width = text.clip_l.width, text.clip_g.width, text.context_dim
    tokens = text.clip_length + text.t5_length
    parts = (  # name, left, top, width, height, colour
        (f"CLIP-L\n{text.clip_length} x {l}", 0, 0, l, text.clip_length, COLOURS[4]),
        (f"CLIP-G\n{text.clip_length} x {g}", l, 0, g, text.clip_length, COLOURS[3]),
        (f"zeros\n{text.clip_length} x {width - l - g}", l + g, 0, width - l - g, text.clip_length, PALE),
        (f"T5\n{text.t5_length} x {width}", 0, text.clip_length, width, text.t5_length, "#F0E442"),
        (f"CLIP-L {l}", 0, 1.16 * tokens, l, 0.1 * tokens, COLOURS[4]),
        (f"CLIP-G {g}", l, 1.16 * tokens, g, 0.1 * tokens, COLOURS[3]),
    )
    figure = Figure(figsize=(7.6, 3.7), dpi=100, facecolor="white")
    ax = figure.add_axes((0.09, 0.02, 0.9, 0.86))
    ax.set(xlim=(-0.01 * width, 1.01 * width), ylim=(1.28 * tokens, -0.02 * tokens), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_title(f"The context: {tokens} tokens of {width} features", size=TEXT + 1, weight="bold", color=INK, loc="left")
    ax.set_ylabel("tokens", size=TEXT, color=INK)
    for name, left, top, wide, high, colour in parts:
        ax.add_patch(Rectangle((left, top), wide, high, facecolor=colour, edgecolor=INK, linewidth=0.8))
        ax.text(left + wide / 2, top + high / 2, name, ha="center", va="center", size=TEXT, color=INK)
    ax.text(0, 1.1 * tokens, f"The pooled vector: {l + g} features", ha="left", va="center", size=TEXT, color=INK)
    names = [" ".join(name.split()) for name, *_ in parts[:4]]
    return _finish(
        figure, _say(f"The context, {tokens} tokens of {width} features, and the pooled vector, to scale", *names), drawing=True
    )


# --- control ----------------------------------------------------------------------------------------------------------------------


def feeds(takes: Sequence[int], *, title: str) -> Picture:
    """Two rows of blocks, the ControlNet's under its base's: base block i takes the residual of ControlNet block takes[i]."""
    places = {net: [i for i, taken in enumerate(takes) if taken == net] for net in range(max(takes) + 1)}
    idle = [net for net, above in places.items() if not above]
    require(not idle, f"ControlNet blocks {idle} feed no block of the base; takes is {list(takes)}")
    left, unit, high = 84, 800 / len(takes), 148
    figure = Figure(figsize=((left + 800 + 6) / 100, high / 100), dpi=100, facecolor="white")
    figure.text(6 / (left + 806), 1 - 6 / high, title, size=TEXT + 1, weight="bold", color=INK, va="top")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, left + 806), ylim=(high, 0))
    ax.axis("off")
    small = TEXT if unit > 30 else TEXT - 2.5
    for name, y in (("base", 48), ("ControlNet", 118)):
        ax.text(left - 10, y, name, ha="right", va="center", size=TEXT, color=INK)

    def box(text: int, x: float, wide: float, y: float, colour: str) -> None:
        ax.add_patch(Rectangle((x + 1, y - 12), wide - 2, 24, facecolor=colour, edgecolor=INK, linewidth=0.8))
        ax.text(x + wide / 2, y, str(text), ha="center", va="center", size=small, color=INK)

    for net, above in places.items():
        box(net, left + unit * above[0], unit * len(above), 118, "#F0E442")
        for i in above:
            x = left + unit * (i + 0.5)
            box(i, x - unit / 2, unit, 48, PALE)
            ax.add_patch(FancyArrowPatch((x, 106), (x, 58), arrowstyle="-|>", mutation_scale=8, color=COLOURS[0]))
    said = (f"ControlNet block {net} feeds base blocks {', '.join(map(str, above))}" for net, above in places.items())
    return _finish(figure, _say(title, *said), drawing=True)


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
_NAMES = (
    ("prompt", 70, 35),
    ("residuals", 345, 195),
    ("noise, then x_t", 70, 115),
    ("hint: edges,\nblur, depth", 70, 195),
    ("picture", 900, 115),
)
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


_LANE = (  # of the joint block, left to right: text, what the vector c gives it, centre, width
    ("norm", "shift, scale", 135, 92), ("queries,\nkeys, values", "", 240, 84), ("linear map", "gate", 468, 84),
    ("norm", "shift, scale", 606, 92), ("MLP", "gate", 708, 64),
)  # fmt: skip


def joint_block() -> Picture:
    """One block of MMDiT: two streams with parts of their own, and one attention between them."""
    figure = Figure(figsize=(8.8, 2.9), dpi=100, facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 880), ylim=(290, 0))
    ax.axis("off")
    for y, name, colour, way in ((80, "text", "#dcebf7", -34), (200, "picture", "#dff0e8", 34)):
        for begin, end in ((76, 522), (552, 770)):  # around the attention, then around the MLP
            ax.plot((begin, begin, end), (y, y + way, y + way), color=GREY)
            ax.add_patch(FancyArrowPatch((end, y + way), (end, y + way / 4), arrowstyle="-|>", mutation_scale=10, color=GREY))
        ax.add_patch(FancyArrowPatch((62, y), (846, y), arrowstyle="-|>", mutation_scale=12, color=GREY, zorder=0))
        ax.text(32, y, name, ha="center", va="center", size=TEXT, weight="bold", color=INK)
        for text, given, x, wide in _LANE:
            ax.add_patch(
                FancyBboxPatch((x - wide / 2, y - 22), wide, 44, "round,pad=0,rounding_size=6", facecolor=colour, edgecolor=GREY)
            )
            ax.text(x, y - 8 * bool(given), text, ha="center", va="center", size=TEXT, color=INK)
            ax.text(x, y + 10, given, ha="center", va="center", size=TEXT - 1, weight="bold", color=COLOURS[1])
        for x in (522, 770):
            ax.text(x, y, "+", ha="center", va="center", size=TEXT + 2, weight="bold", color=INK,
                    bbox={"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": INK})  # fmt: skip
    ax.add_patch(FancyBboxPatch((312, 50), 90, 180, "round,pad=0,rounding_size=6", facecolor="#F0E442", edgecolor=INK))
    ax.text(357, 140, "attention\nover both", ha="center", va="center", size=TEXT, weight="bold", color=INK)
    ax.text(
        440,
        268,
        "in each block made of the vector c, time and pooled text",
        ha="center",
        size=TEXT - 1,
        weight="bold",
        color=COLOURS[1],
    )
    said = "text and picture each have their own norm, queries, keys and values, map, gate and MLP; the attention is over both"
    return _finish(figure, f"One joint block: {said}", drawing=True)
