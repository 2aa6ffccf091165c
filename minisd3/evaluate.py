"""Judging pictures: PSNR and SSIM against a reference, and whether a picture shows what its caption says.

The second needs a Detector: a small convolutional network, trained on rendered scenes, that reads kind, colour, place and background
from a picture as CenterNet does (Zhou et al. 2019, Objects as Points): one heat map whose peaks are objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Generator, Tensor, nn

from minisd3.config import require
from minisd3.scenes import BACKGROUNDS, COLOURS, HELD_OUT, KINDS, Scene, Thing, scene

STRIDE = 8  # pixels a cell of the detector's maps
DETECTOR_SEEDS = 2 * HELD_OUT  # scenes from this seed on train the detector: neither the generator's nor the tests'


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, one for each picture: (B C H W) in [-1, 1] twice -> (B). Infinite where they are equal."""
    _same_shape(image, reference)
    return 10 * torch.log10(4 / (image.double() - reference.double()).square().mean((1, 2, 3)))  # peak: the span 2, squared


def ssim(image: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity, one for each picture: (B C H W) in [-1, 1] twice -> (B) in [-1, 1].

    Wang et al. 2004, equation 13 with its constants: an 11-pixel Gaussian window of deviation 1.5, only where it fits.
    """
    _same_shape(image, reference)
    require(min(image.shape[2:]) >= 11, f"ssim needs sides of 11 pixels or more, not {tuple(image.shape[2:])}")
    x, y = (((z.double() + 1) / 2).flatten(0, 1)[:, None] for z in (image, reference))  # (B*C 1 H W) in [0, 1]
    bell = torch.exp(-(torch.arange(-5, 6, dtype=x.dtype, device=x.device) ** 2) / (2 * 1.5**2))
    window = (torch.outer(bell, bell) / bell.sum() ** 2)[None, None]
    mean_x, mean_y, xx, yy, xy = (F.conv2d(z, window) for z in (x, y, x * x, y * y, x * y))
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    likeness = likeness * (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x**2 + yy - mean_y**2 + c2)
    return likeness.mean((1, 2, 3)).unflatten(0, image.shape[:2]).mean(1)


def _same_shape(image: Tensor, reference: Tensor) -> None:
    shapes = tuple(image.shape), tuple(reference.shape)
    require(image.ndim == 4 and shapes[0] == shapes[1], f"needs two equal shapes (B C H W), not {shapes[0]} and {shapes[1]}")


class Found(NamedTuple):
    """An object that the detector sees; x and y as in Thing, to the cell."""

    kind: str
    colour: str
    x: float
    y: float
    score: float


class Reading(NamedTuple):
    """What the detector sees in one picture, surest object first."""

    background: str
    things: tuple[Found, ...]


class Maps(NamedTuple):
    """The detector's logits, on a grid of cells of STRIDE pixels."""

    presence: Tensor  # (B h w): an object's centre is here
    kind: Tensor  # (B kinds h w)
    colour: Tensor  # (B colours h w)
    background: Tensor  # (B backgrounds)


class Detector(nn.Module):
    """Maps of what is where in pictures (B 3 H W) in [-1, 1]. Dilated layers see an object 84 pixels large from its centre."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(_layer(3, 24, 2), _layer(24, 48, 2), _layer(48, width, 2))
        self.body = nn.Sequential(*(_layer(width, width, 1, dilation) for dilation in (1, 2, 4, 2, 1)))
        self.things = nn.Conv2d(width, 1 + len(KINDS) + len(COLOURS), 1)
        self.background = nn.Linear(width, len(BACKGROUNDS))

    def forward(self, picture: Tensor) -> Maps:
        x = self.body(self.stem(picture))  # (B width h w)
        presence, kind, colour = self.things(x).split((1, len(KINDS), len(COLOURS)), dim=1)
        return Maps(presence[:, 0], kind, colour, self.background(x.mean((2, 3))))

    @torch.no_grad()
    def read(self, pictures: Tensor, threshold: float = 0.5) -> list[Reading]:
        """What each of the pictures (B 3 H W) in [-1, 1] shows."""
        maps = self(pictures)
        heat = maps.presence.sigmoid()  # (B h w)
        peaks = heat * (heat == F.max_pool2d(heat, 5, 1, 2))  # no two objects' centres are within 2 cells
        kinds, colours = maps.kind.argmax(1).tolist(), maps.colour.argmax(1).tolist()
        names = list(KINDS), list(COLOURS), list(BACKGROUNDS)
        readings = []
        for b, background in enumerate(maps.background.argmax(1).tolist()):
            cells = [(peaks[b, i, j].item(), i, j) for i, j in (peaks[b] > threshold).nonzero().tolist()]
            things = [
                Found(names[0][kinds[b][i][j]], names[1][colours[b][i][j]], (j + 0.5) / heat.shape[2], (i + 0.5) / heat.shape[1], p)
                for p, i, j in sorted(cells, reverse=True)
            ]
            readings.append(Reading(names[2][background], tuple(things)))
        return readings


def _layer(before: int, after: int, stride: int, dilation: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, 3, stride, dilation, dilation)
    return nn.Sequential(convolution, nn.GroupNorm(8, after), nn.SiLU())


@lru_cache(maxsize=1)
def detector() -> Detector:
    """The trained detector that comes with the package."""
    net = Detector()
    net.load_state_dict({k: v.float() for k, v in load_file(Path(__file__).parent / "models/tiny/detector.safetensors").items()})
    return net.eval().requires_grad_(False)


def detector_loss(net: nn.Module, step: int, generator: Generator, *, batch: int = 32) -> Tensor:
    """A loss for training.fit: read freshly rendered scenes, some spoiled the way a generator's pictures are."""
    drawn = [scene(DETECTOR_SEEDS + seed) for seed in torch.randint(HELD_OUT, (batch,), generator=generator).tolist()]
    pixels = torch.from_numpy(np.stack([np.asarray(one.render()) for one in drawn])).permute(0, 3, 1, 2)  # (B 3 H W)
    maps: Maps = net(_spoiled(pixels / 127.5 - 1, generator))
    truth = _truth(drawn, *maps.presence.shape[1:])
    heat = truth.presence
    ignored = (heat > 0) & (heat < 1)  # beside a centre either answer will do
    presence = F.binary_cross_entropy_with_logits(maps.presence, heat, weight=torch.where(heat == 1, 8.0, 1.0) * ~ignored)
    kind, colour = (F.cross_entropy(logits, labels, ignore_index=-1) for logits, labels in zip(maps[1:3], truth[1:3], strict=True))
    return 10 * presence + kind + colour + F.cross_entropy(maps.background, truth.background)


def _truth(drawn: Sequence[Scene], h: int, w: int) -> Maps:
    """What the maps should say: presence 1 in a centre's cell and 0.5 around it; there the labels, elsewhere -1."""
    presence = torch.zeros(len(drawn), h, w)
    kind, colour = torch.full((2, len(drawn), h, w), -1)
    for b, one in enumerate(drawn):
        for thing in one.things:
            i, j = int(thing.y * h), int(thing.x * w)
            around = b, slice(max(i - 1, 0), i + 2), slice(max(j - 1, 0), j + 2)
            presence[around], kind[around], colour[around] = 0.5, list(KINDS).index(thing.kind), list(COLOURS).index(thing.colour)
            presence[b, i, j] = 1
    background = torch.tensor([list(BACKGROUNDS).index(one.background) for one in drawn])
    return Maps(presence, kind, colour, background)


def _spoiled(pictures: Tensor, generator: Generator) -> Tensor:
    """Each picture blurred, tinted and speckled by its own random amount, some not at all."""

    def amount(*shape: int) -> Tensor:
        return torch.rand(len(pictures), *shape, generator=generator)

    small = F.interpolate(pictures, scale_factor=float(0.25 + 0.5 * torch.rand((), generator=generator)), mode="area")
    blurred = F.interpolate(small, pictures.shape[2:], mode="bilinear")
    spoiled = pictures.lerp(blurred, amount(1, 1, 1).mul(2).clamp(max=1).sub(0.3).clamp(min=0) / 0.7)
    spoiled = spoiled * (0.9 + 0.2 * amount(3, 1, 1)) + 0.16 * (amount(3, 1, 1) - 0.5)
    cells = torch.randn(len(pictures), 3, 32, 32, generator=generator)  # blotches of 4 pixels, as a decoder makes them
    speckle = F.interpolate(cells, pictures.shape[2:], mode="bilinear") + torch.randn(pictures.shape, generator=generator)
    return (spoiled + 0.08 * amount(1, 1, 1) * speckle).clamp(-1, 1)


@dataclass(frozen=True)
class CaptionAccuracy:
    """How much of what was asked for is in the pictures, each a share in [0, 1]."""

    kind: float  # of objects: their kind was found
    colour: float  # of objects: so was their colour, on the object that fits best
    thing: float  # of objects: kind and colour, on the same object
    background: float  # of pictures
    count: float  # of pictures: as many objects as asked for
    relation: float  # of pictures with a relation: both objects are there and stand so; nan if none has one
    recognised: float  # of pictures: every object is there, in its colour
    right: float  # of pictures: all of the above


def caption_accuracy(pictures: Tensor, asked: Sequence[Scene]) -> CaptionAccuracy:
    """Read pictures (B 3 H W) in [-1, 1] with the package's detector, and compare with the scenes that were asked for, one each.

    Positions count only through the relation. Sizes are not judged.
    """
    require(len(pictures) == len(asked) > 0, f"{len(pictures)} pictures for {len(asked)} scenes; they must be as many, and some")
    readings = [reading for chunk in pictures.float().cpu().split(64) for reading in detector().read(chunk)]
    judged = [_judge(reading, one) for reading, one in zip(readings, asked, strict=True)]
    fits = np.array([fit for one in judged for fit in one.fits])  # (things, 2)
    recognised = np.array([all(kind and colour for kind, colour in one.fits) for one in judged])
    background, count = np.array([one.background for one in judged]), np.array([one.number for one in judged])
    related = np.array([one.relation is not False for one in judged])
    relations = [one.relation for one in judged if one.relation is not None]
    return CaptionAccuracy(
        kind=float(fits[:, 0].mean()),
        colour=float(fits[:, 1].mean()),
        thing=float(fits.all(1).mean()),
        background=float(background.mean()),
        count=float(count.mean()),
        relation=float(np.mean(relations)) if relations else float("nan"),
        recognised=float(recognised.mean()),
        right=float((recognised & background & count & related).mean()),
    )


class _Judgement(NamedTuple):
    fits: list[tuple[bool, bool]]  # one a thing: kind, colour
    background: bool
    number: bool
    relation: bool | None


def _judge(reading: Reading, asked: Scene) -> _Judgement:
    """Pair the objects found with those asked for so that most fits, and say what does."""
    found: list[Found | None] = [*reading.things[:5], *[None] * len(asked.things)]

    def fit(thing: Thing, seen: Found | None) -> tuple[bool, bool]:
        return (False, False) if seen is None else (seen.kind == thing.kind, seen.colour == thing.colour)

    def fits(chosen: tuple[Found | None, ...]) -> list[tuple[bool, bool]]:
        return [fit(thing, seen) for thing, seen in zip(asked.things, chosen, strict=True)]

    best = max(permutations(found, len(asked.things)), key=lambda chosen: sum(3 * k * c + k + c for k, c in fits(chosen)))
    relation = None
    if asked.relation is not None:
        there = all(k and c for k, c in fits(best))
        relation = there and best[0] is not None and best[1] is not None and _stands(best[0], best[1]) == asked.relation
    return _Judgement(fits(best), reading.background == asked.background, len(reading.things) == len(asked.things), relation)


def _stands(first: Found, second: Found) -> str:
    """The relation of the first to the second, by the longer way between them."""
    across, down = second.x - first.x, second.y - first.y
    return ("left" if across > 0 else "right") if abs(across) > abs(down) else ("above" if down > 0 else "below")


def grid(pictures: Tensor, columns: int = 8) -> Image.Image:
    """Pictures (B 3 H W) in [-1, 1] as one, row by row; the last row is filled up with white."""
    require(pictures.ndim == 4 and len(pictures) > 0, f"needs pictures (B 3 H W), not {tuple(pictures.shape)}")
    _, _, height, width = pictures.shape
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    pixels = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # (B H W 3)
    for i, picture in enumerate(pixels):
        sheet.paste(Image.fromarray(picture), (i % columns * width, i // columns * height))
    return sheet
