"""A detector: what is where in a picture of the scenes' world, read from its pixels. `evaluate` judges drawn pictures with it.

A small convolutional network, trained on rendered scenes, that reads kind, colour, place and background as CenterNet does (Zhou et al.
2019, Objects as Points): one heat map whose peaks are objects.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Generator, Tensor, nn

from minisd3.scenes import BACKGROUNDS, COLOURS, HELD_OUT, KINDS, Scene, rendered, scene

STRIDE = 8  # pixels a cell of the detector's maps
SIDE = 128  # pixels of the pictures that it was trained on
DETECTOR_SEEDS = 2 * HELD_OUT  # scenes from this seed on train the detector: neither the generator's nor the tests'


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

    def features(self, picture: Tensor) -> list[Tensor]:
        """What each layer makes of pictures (B 3 H W): (B C h w) each, from half the picture's sides to an eighth of them."""
        maps = []
        for layer in [*self.stem, *self.body]:
            picture = layer(picture)
            maps.append(picture)
        return maps

    def forward(self, picture: Tensor) -> Maps:
        x = self.features(picture)[-1]  # (B width h w)
        presence, kind, colour = self.things(x).split((1, len(KINDS), len(COLOURS)), dim=1)
        return Maps(presence[:, 0], kind, colour, self.background(x.mean((2, 3))))

    @torch.no_grad()
    def read(self, pictures: Tensor, threshold: float = 0.5) -> list[Reading]:
        """What each of the pictures (B 3 H W) in [-1, 1] shows, of any size: they are read with their shorter side at SIDE pixels."""
        maps = self(_resized(pictures))
        peaks = maps.presence == F.max_pool2d(maps.presence, 5, 1, 2)  # no two objects' centres are within 2 cells
        chance = maps.presence.sigmoid() * peaks  # (B h w); the peaks are the logits', which do not all end at 1
        kinds, colours = maps.kind.argmax(1).tolist(), maps.colour.argmax(1).tolist()
        names = list(KINDS), list(COLOURS), list(BACKGROUNDS)
        h, w = chance.shape[1:]
        readings = []
        for b, background in enumerate(maps.background.argmax(1).tolist()):
            cells = [(chance[b, i, j].item(), i, j) for i, j in (chance[b] > threshold).nonzero().tolist()]
            things = [
                Found(names[0][kinds[b][i][j]], names[1][colours[b][i][j]], (j + 0.5) / w, (i + 0.5) / h, p)
                for p, i, j in sorted(cells, reverse=True)
            ]
            readings.append(Reading(names[2][background], tuple(things)))
        return readings


def _resized(pictures: Tensor) -> Tensor:
    """Objects are as large as the shorter side says, so with it at SIDE they are as the detector knows them; the longer in whole cells."""
    height, width = pictures.shape[2:]
    size = [round(side * SIDE / min(height, width) / STRIDE) * STRIDE for side in (height, width)]
    if size == [height, width]:
        return pictures
    return F.interpolate(pictures, size, mode="bilinear", antialias=True)


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
    maps: Maps = net(_spoiled(rendered(drawn), generator))
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
