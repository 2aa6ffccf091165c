"""The picture world: storybook scenes drawn from a seed, with their captions, exact depth and exact object masks.

A scene is one to three big, simple objects before a plain background. Everything is drawn with Pillow in fractions of the picture,
so one description gives pictures of many sizes. Seeds below HELD_OUT are for training: a scene drawn from them never shows
an object for which `held_out(kind, colour, background)` is true. Seeds from HELD_OUT on are for testing and may show any.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi, sin
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from minisd3.config import require

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (216, 38, 44),
    "orange": (245, 134, 24),
    "yellow": (252, 218, 52),
    "green": (44, 158, 66),
    "blue": (40, 98, 224),
    "purple": (126, 52, 186),
    "pink": (250, 134, 192),
    "white": (248, 248, 250),
}


class Background(NamedTuple):
    """A sky and, below the horizon, a ground; each runs smoothly from its first colour (top) to its second (bottom)."""

    phrases: tuple[str, str]  # two ways to name it
    sky: tuple[RGB, RGB]
    ground: tuple[RGB, RGB]
    horizon: float  # height of the horizon, as a fraction of the picture from its top; 1: no ground
    hill: float  # how far the horizon swings up and down


BACKGROUNDS: dict[str, Background] = {
    "meadow": Background(
        ("in a meadow", "on the grass"), ((96, 182, 246), (206, 234, 250)), ((136, 202, 92), (88, 162, 66)), 0.62, 0.05
    ),
    "sea": Background(
        ("by the sea", "near the water"), ((150, 212, 248), (226, 242, 250)), ((36, 132, 196), (14, 82, 150)), 0.56, 0.0
    ),
    "desert": Background(
        ("in the desert", "on the sand"), ((252, 200, 132), (254, 230, 186)), ((226, 182, 112), (198, 146, 80)), 0.64, 0.06
    ),
    "snow": Background(
        ("in the snow", "in winter"), ((150, 166, 196), (204, 214, 230)), ((244, 248, 254), (214, 226, 242)), 0.6, 0.05
    ),
    "night": Background(("at night", "in the dark"), ((14, 16, 54), (54, 50, 112)), ((26, 56, 60), (14, 34, 38)), 0.7, 0.05),
    "sunset": Background(
        ("at sunset", "in the evening"), ((122, 70, 140), (252, 158, 120)), ((98, 60, 108), (58, 36, 80)), 0.68, 0.0
    ),
    "paper": Background(
        ("on plain paper", "on a blank page"), ((250, 242, 224), (242, 230, 206)), ((0, 0, 0), (0, 0, 0)), 1.0, 0.0
    ),
}

# first -> its words, shorter words, and the relation seen from the other object
RELATIONS: dict[str, tuple[str, str, str]] = {
    "left": ("to the left of", "left of", "right"),
    "right": ("to the right of", "right of", "left"),
    "above": ("above", "over", "below"),
    "below": ("below", "under", "above"),
}
PLACES = ("on the left", "on the right", "at the top", "at the bottom", "in the middle")

INK, BROWN, CREAM, GLASS, LEAF = (38, 34, 54), (124, 80, 50), (255, 244, 214), (198, 230, 246), (74, 146, 62)
FIXED = {"ink": INK, "brown": BROWN, "cream": CREAM, "glass": GLASS, "leaf": LEAF}

Shape = tuple[str, str, tuple[float, ...]]

# Each kind is a list of shapes (tool, tone, numbers), back to front, in a unit square with y down. Tones base, dark and light are
# shades of the object's colour. box and oval: left, top, right, bottom; dome: the upper half of such an oval; polygon: x, y, x, y ...
# These have an outline; disc (an oval) and facet (a polygon) have none.


def _star(radius: float) -> tuple[float, ...]:
    spokes = [(i * pi / 5, radius if i % 2 == 0 else 0.46 * radius) for i in range(10)]
    return tuple(n for turn, r in spokes for n in (0.5 + r * sin(turn), 0.53 - r * cos(turn)))


def _petal(turn: float) -> Shape:
    x, y, radius = 0.5 + 0.21 * sin(2 * pi * turn), 0.37 - 0.21 * cos(2 * pi * turn), 0.145
    return ("oval", "base", (x - radius, y - radius, x + radius, y + radius))


KINDS: dict[str, list[Shape]] = {
    "house": [
        ("box", "base", (0.13, 0.42, 0.87, 0.97)),
        ("polygon", "dark", (0.5, 0.03, 0.97, 0.48, 0.03, 0.48)),
        ("box", "brown", (0.54, 0.62, 0.74, 0.97)),
        ("box", "cream", (0.24, 0.6, 0.43, 0.79)),
    ],
    "tree": [
        ("box", "brown", (0.42, 0.8, 0.58, 0.98)),
        ("polygon", "dark", (0.5, 0.28, 0.92, 0.84, 0.08, 0.84)),
        ("polygon", "base", (0.5, 0.03, 0.82, 0.54, 0.18, 0.54)),
    ],
    "star": [("polygon", "base", _star(0.5)), ("facet", "light", _star(0.27))],
    "boat": [
        ("box", "brown", (0.46, 0.04, 0.53, 0.72)),
        ("polygon", "light", (0.55, 0.06, 0.95, 0.6, 0.55, 0.6)),
        ("polygon", "cream", (0.44, 0.18, 0.44, 0.6, 0.12, 0.6)),
        ("polygon", "base", (0.03, 0.67, 0.97, 0.67, 0.8, 0.96, 0.2, 0.96)),
    ],
    "car": [
        ("polygon", "dark", (0.2, 0.52, 0.33, 0.2, 0.7, 0.2, 0.86, 0.52)),
        ("facet", "glass", (0.29, 0.5, 0.38, 0.27, 0.49, 0.27, 0.49, 0.5)),
        ("facet", "glass", (0.57, 0.5, 0.57, 0.27, 0.66, 0.27, 0.76, 0.5)),
        ("box", "base", (0.02, 0.48, 0.98, 0.76)),
        ("oval", "ink", (0.12, 0.6, 0.38, 0.86)),
        ("oval", "ink", (0.62, 0.6, 0.88, 0.86)),
        ("disc", "cream", (0.2, 0.68, 0.3, 0.78)),
        ("disc", "cream", (0.7, 0.68, 0.8, 0.78)),
    ],
    "flower": [
        ("box", "leaf", (0.45, 0.6, 0.55, 0.98)),
        ("oval", "leaf", (0.54, 0.76, 0.82, 0.92)),
        *(_petal(i / 6) for i in range(6)),
        ("oval", "brown", (0.37, 0.24, 0.63, 0.5)),
    ],
    "fish": [
        ("polygon", "dark", (0.34, 0.3, 0.62, 0.08, 0.62, 0.36)),
        ("polygon", "dark", (0.62, 0.52, 0.97, 0.22, 0.97, 0.82)),
        ("oval", "base", (0.02, 0.22, 0.78, 0.82)),
        ("disc", "light", (0.22, 0.58, 0.58, 0.76)),
        ("disc", "cream", (0.14, 0.36, 0.3, 0.52)),
        ("disc", "ink", (0.18, 0.4, 0.27, 0.49)),
    ],
    "mushroom": [
        ("box", "cream", (0.35, 0.5, 0.65, 0.97)),
        ("dome", "base", (0.02, 0.04, 0.98, 1.14)),
        ("disc", "cream", (0.42, 0.12, 0.6, 0.3)),
        ("disc", "cream", (0.16, 0.34, 0.34, 0.52)),
        ("disc", "cream", (0.68, 0.34, 0.86, 0.52)),
    ],
    "balloon": [
        ("facet", "dark", (0.47, 0.74, 0.53, 0.74, 0.53, 0.99, 0.47, 0.99)),
        ("polygon", "dark", (0.5, 0.66, 0.6, 0.8, 0.4, 0.8)),
        ("oval", "base", (0.18, 0.02, 0.82, 0.74)),
        ("disc", "light", (0.29, 0.13, 0.44, 0.34)),
    ],
    "robot": [
        ("box", "ink", (0.47, 0.12, 0.53, 0.3)),
        ("oval", "dark", (0.41, 0.02, 0.59, 0.2)),
        ("box", "dark", (0.02, 0.46, 0.98, 0.74)),
        ("box", "base", (0.12, 0.26, 0.88, 0.96)),
        ("oval", "cream", (0.2, 0.36, 0.45, 0.61)),
        ("oval", "cream", (0.55, 0.36, 0.8, 0.61)),
        ("disc", "ink", (0.28, 0.44, 0.37, 0.53)),
        ("disc", "ink", (0.63, 0.44, 0.72, 0.53)),
        ("facet", "ink", (0.3, 0.72, 0.7, 0.72, 0.7, 0.83, 0.3, 0.83)),
    ],
}

SIZES = {1: (0.44, 0.66), 2: (0.315, 0.44), 3: (0.25, 0.34)}  # smallest and largest size in a scene of so many objects
VARIATIONS = 8  # shapes of the ground
PHRASINGS = 12  # ways to say a scene
HELD_OUT = 1_000_000_000  # the first seed that is not for training
VOCABULARY = tuple(
    sorted(
        {"a", "an", "and", ",", "there", "is", "picture", "of", "small", "big", *KINDS, *COLOURS}
        | {word for phrases, *_ in BACKGROUNDS.values() for phrase in phrases for word in phrase.split()}
        | {word for long, short, _ in RELATIONS.values() for word in (*long.split(), *short.split())}
        | {word for place in PLACES for word in place.split()}
    )
)  # every word and mark that a caption can hold


def held_out(kind: str, colour: str, background: str) -> bool:
    """Whether no training scene shows this: for each colour and background, one kind of the ten."""
    k, c, b = list(KINDS).index(kind), list(COLOURS).index(colour), list(BACKGROUNDS).index(background)
    return (k + 3 * c + 8 * b) % len(KINDS) == 0


@dataclass(frozen=True)
class Thing:
    """An object. (x, y) is its centre in fractions of the picture's width and height, size its side over the picture's shorter side."""

    kind: str
    colour: str
    x: float = 0.5
    y: float = 0.5
    size: float = 0.55

    def __post_init__(self) -> None:
        require(self.kind in KINDS, f"Thing.kind is {self.kind!r}; choose one of {', '.join(KINDS)}")
        require(self.colour in COLOURS, f"Thing.colour is {self.colour!r}; choose one of {', '.join(COLOURS)}")
        require(0 < self.size <= 1, f"Thing.size is {self.size}; it is a fraction of the picture's shorter side, in (0, 1]")

    @property
    def depth(self) -> float:
        """How near it is, in [0.5, 1]: what is drawn larger is nearer."""
        return min(1.0, 0.5 + 0.75 * self.size)

    def placed(self, height: int, width: int) -> tuple[int, int, int]:
        """Left, top and side in whole pixels."""
        side = round(self.size * min(height, width))
        return round(self.x * width - side / 2), round(self.y * height - side / 2), side


@dataclass(frozen=True)
class Scene:
    """Objects before a background. `relation` says where the first of two objects stands, seen from the second."""

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None
    variation: int = 0  # which of VARIATIONS shapes the ground has

    def __post_init__(self) -> None:
        require(self.background in BACKGROUNDS, f"Scene.background is {self.background!r}; choose one of {', '.join(BACKGROUNDS)}")
        require(len(self.things) in SIZES, f"Scene has {len(self.things)} things; it must have 1, 2 or 3")
        require(
            self.relation in RELATIONS if len(self.things) == 2 else self.relation is None,
            f"Scene.relation is {self.relation!r} with {len(self.things)} things; two things need one of {', '.join(RELATIONS)}, others None",
        )

    def caption(self, phrasing: int = 0) -> str:
        """The scene in words, all of VOCABULARY, at most 18 with the commas; PHRASINGS ways, the first the plainest."""
        require(0 <= phrasing < PHRASINGS, f"phrasing is {phrasing}; it must be in [0, {PHRASINGS})")
        manner, where = phrasing // 2, BACKGROUNDS[self.background].phrases[phrasing % 2]
        what = (self._one, self._two, self._three)[len(self.things) - 1](manner)
        return f"{where}, {what}" if manner == 1 else f"{what} {where}"

    def _one(self, manner: int) -> str:
        thing = self.things[0]
        what = self._name(thing, sized=manner in (2, 4))
        place = _place(thing) if manner in (3, 4) else ""
        return ("a picture of " if manner == 5 else "") + what + (place and " " + place)

    def _two(self, manner: int) -> str:
        assert self.relation is not None  # __post_init__ checked it
        long, short, inverse = RELATIONS[self.relation]
        first, second = (self._name(thing, sized=manner == 2) for thing in self.things)
        if manner in (3, 4):  # the same fact, told from the other side
            return f"{second} {RELATIONS[inverse][manner - 3]} {first}"
        return f"{first} {short if manner == 5 else long} {second}"

    def _three(self, manner: int) -> str:
        first, second, third = (self._name(thing, sized=False) for thing in self.things)
        return ("there is " if manner == 5 else "") + f"{first}, {second} and {third}"

    def _name(self, thing: Thing, *, sized: bool) -> str:
        low, high = SIZES[len(self.things)]
        third = (thing.size - low) / (high - low) * 3  # below 1: the lower third of the sizes such a scene has
        size = "small" if third < 1 else "big" if third > 2 else ""
        words = [size, thing.colour, thing.kind] if sized and size else [thing.colour, thing.kind]
        return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])

    def render(self, height: int = 128, width: int = 128) -> Image.Image:
        """The picture (RGB). Raises ValueError unless both sides are multiples of 16 from 96 to 192."""
        picture = Image.fromarray(_backdrop(self.background, self.variation, height, width)[0])
        for thing in self.things:
            left, top, side = thing.placed(height, width)
            sprite = _sprite(thing.kind, thing.colour, side)
            picture.paste(sprite, (left, top), sprite)
        return picture

    def masks(self, height: int = 128, width: int = 128) -> Tensor:
        """Which pixels show each object, at half coverage or more, as bool (n H W). A later object hides an earlier one."""
        _check_sides(height, width)
        masks = torch.zeros(len(self.things), height, width, dtype=torch.bool)
        for i, thing in enumerate(self.things):
            left, top, side = thing.placed(height, width)
            cover = Image.new("L", (width, height))
            cover.paste(_sprite(thing.kind, thing.colour, side).getchannel("A"), (left, top))
            masks[i] = torch.from_numpy(np.array(cover)) >= 128
            masks[:i] &= ~masks[i]
        return masks

    def depth(self, height: int = 128, width: int = 128) -> Tensor:
        """Nearness (1 H W) in [0, 1]: 0 the sky, rising to 0.4 down the ground, each object its Thing.depth."""
        depth = torch.from_numpy(_backdrop(self.background, self.variation, height, width)[1]).clone()
        for thing, mask in zip(self.things, self.masks(height, width), strict=True):
            depth[mask] = thing.depth
        return depth[None]


def _place(thing: Thing) -> str:
    """Where a lone object stands, if that is clear."""
    dx, dy = thing.x - 0.5, thing.y - 0.5
    if max(abs(dx), abs(dy)) < 0.05:
        return "in the middle"
    if abs(abs(dx) - abs(dy)) < 0.04 or max(abs(dx), abs(dy)) < 0.1:
        return ""
    return PLACES[int(dx > 0)] if abs(dx) > abs(dy) else PLACES[2 + int(dy > 0)]


def _check_sides(height: int, width: int) -> None:
    for name, side in ("height", height), ("width", width):
        require(96 <= side <= 192 and side % 16 == 0, f"{name} is {side}; a scene's sides are multiples of 16 from 96 to 192")


@lru_cache(maxsize=256)
def _backdrop(name: str, variation: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The background's picture (H W 3) and its nearness (H W); shared between scenes, so never written to."""
    _check_sides(height, width)
    _, sky, ground, horizon, hill = BACKGROUNDS[name]
    y, x = (np.arange(height, dtype=np.float32)[:, None] + 0.5) / height, (np.arange(width, dtype=np.float32) + 0.5) / width
    line = horizon + 0.02 * (variation % 3 - 1) * (horizon < 1) + hill * np.sin(2 * np.pi * (0.7 * x + variation / VARIATIONS))
    below = np.clip((y - line) * height + 0.5, 0, 1)[..., None]  # how much of the pixel is ground

    def shade(colours: tuple[RGB, RGB], along: np.ndarray) -> np.ndarray:
        top, bottom = (np.array(colour, np.float32) for colour in colours)
        return top + (bottom - top) * np.clip(along, 0, 1)[..., None]

    down = (y - line) / (1.001 - line)
    picture = shade(sky, np.broadcast_to(y / horizon, below.shape[:2])) * (1 - below) + shade(ground, down) * below
    return np.round(picture).astype(np.uint8), (0.4 * np.clip(down, 0, 1) * (line < 1)).astype(np.float32)


def _mix(colour: RGB, other: RGB, share: float) -> RGB:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))
    return red, green, blue


def _sprite(kind: str, colour: str, side: int) -> Image.Image:
    """One object (RGBA), drawn three times as large and averaged down. Its dark outline keeps it apart from every background."""
    base, scale, pen = COLOURS[colour], 3 * side, 6
    tones = FIXED | {"base": base, "dark": _mix(base, INK, 0.22), "light": _mix(base, (255, 255, 255), 0.55)}
    outline = _mix(base, INK, 0.72)
    image = Image.new("RGBA", (scale, scale))
    draw = ImageDraw.Draw(image)
    for tool, tone, numbers in KINDS[kind]:
        xy = [n * (scale - 1) for n in numbers]
        match tool:
            case "box":
                draw.rounded_rectangle(xy, scale / 40, tones[tone], outline, pen)
            case "oval":
                draw.ellipse(xy, tones[tone], outline, pen)
            case "dome":
                draw.chord(xy, 180, 360, tones[tone], outline, pen)
            case "polygon":
                draw.polygon(xy, tones[tone])
                draw.line([*xy, *xy[:4]], outline, pen, joint="curve")
            case "disc":
                draw.ellipse(xy, tones[tone])
            case "facet":
                draw.polygon(xy, tones[tone])
    return image.reduce(3)


def scene(seed: int) -> Scene:
    """The scene of a seed, the same for ever: one object in 60% of them, two in 32%, three in 8%."""
    require(seed >= 0, f"seed is {seed}; it must not be negative")
    rng = Random(f"minisd3 scene {seed}")
    n = rng.choices((1, 2, 3), (60, 32, 8))[0]
    background = rng.choice(list(BACKGROUNDS))
    looks: list[tuple[str, str]] = []
    while len(looks) < n:
        look = rng.choice(list(KINDS)), rng.choice(list(COLOURS))
        if look not in looks and (seed >= HELD_OUT or not held_out(*look, background)):
            looks.append(look)
    relation = rng.choice(list(RELATIONS)) if n == 2 else None
    return Scene(background, _arranged(looks, relation, rng), relation, rng.randrange(VARIATIONS))


def _arranged(looks: list[tuple[str, str]], relation: str | None, rng: Random) -> tuple[Thing, ...]:
    """Place objects so that none leaves the picture or touches another."""
    sizes = [rng.uniform(*SIZES[len(looks)]) for _ in looks]
    if len(looks) == 1:
        spots = [(rng.uniform(sizes[0] / 2, 1 - sizes[0] / 2), rng.uniform(sizes[0] / 2, 1 - sizes[0] / 2))]
    elif len(looks) == 2:
        spots = _side_by_side(sizes, rng)
        if relation in ("above", "below"):
            spots = [(y, x) for x, y in spots]
    else:  # a zigzag from left to right
        turn = rng.choice((0.2, -0.2))
        spots = [(x, 0.5 + dy + rng.uniform(-0.06, 0.06)) for x, dy in ((0.2, turn), (0.5, -turn), (0.8, turn))]
    if relation in ("right", "below"):
        spots, sizes = spots[::-1], sizes[::-1]
    return tuple(Thing(*look, x, y, size) for look, (x, y), size in zip(looks, spots, sizes, strict=True))


def _side_by_side(sizes: list[float], rng: Random) -> list[tuple[float, float]]:
    """Centres of two objects, the first on the left, about equally high."""
    first, second = sizes
    slack = 1 - first - second - 0.04  # 0.04 always stays between them
    left, between = sorted((rng.uniform(0, slack), rng.uniform(0, slack)))
    high = max(sizes) / 2
    y = rng.uniform(high, 1 - high)
    wobble = [min(max(y + rng.uniform(-0.07, 0.07), s / 2), 1 - s / 2) for s in sizes]
    return [(left + first / 2, wobble[0]), (between + first + 0.04 + second / 2, wobble[1])]


def pictures(seeds: Iterable[int], height: int = 128, width: int = 128) -> Tensor:
    """The scenes of these seeds, as float32 (B 3 H W) in [-1, 1]."""
    return rendered([scene(seed) for seed in seeds], height, width)


def rendered(drawn: Iterable[Scene], height: int = 128, width: int = 128) -> Tensor:
    """These scenes, as float32 (B 3 H W) in [-1, 1]."""
    pixels = np.stack([np.asarray(one.render(height, width)) for one in drawn])  # (B H W 3)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)


def captions(seeds: Iterable[int]) -> list[str]:
    """A caption for each seed's scene; the seed also chooses the phrasing."""
    return [scene(seed).caption(Random(f"minisd3 phrasing {seed}").randrange(PHRASINGS)) for seed in seeds]


def _prompts() -> tuple[Scene, ...]:
    """24 scenes of one held-out object and 8 of two, stepping through colours and backgrounds so that all occur with every kind."""
    kinds, colours, backgrounds, relations = list(KINDS), list(COLOURS), list(BACKGROUNDS), list(RELATIONS)
    scenes = []
    for i in range(32):
        background = backgrounds[i % len(backgrounds)]
        chosen = [colours[i % 8]] if i < 24 else [colours[i % 8], colours[(i + 3) % 8]]
        looks = [(kind, colour) for colour in chosen for kind in kinds if held_out(kind, colour, background)]
        relation = relations[i % 4] if len(looks) == 2 else None
        scenes.append(Scene(background, _arranged(looks, relation, Random(f"minisd3 prompt {i}")), relation))
    return tuple(scenes)


PROMPTS = _prompts()  # no training scene holds any of these objects before its background; the prompt is scene.caption()
