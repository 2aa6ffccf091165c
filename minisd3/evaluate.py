"""Measures: a picture against a reference, against its caption, against its hint; many against many; a transformer's loss by time.

They depend on their inputs alone, so the same pictures, or the same generator, give the same scores.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from pathlib import Path
from statistics import NormalDist
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Generator, Tensor

from minisd3 import flow
from minisd3.config import PRESETS, require
from minisd3.detector import Found, Reading, detector
from minisd3.mmdit import MMDiT
from minisd3.scenes import Scene
from minisd3.text import ImageTower, TextEncoders
from minisd3.types import Conditioning

# --- against a reference ----------------------------------------------------------------------------------------------------------


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


def perceptual_distance(image: Tensor, reference: Tensor) -> Tensor:
    """How unlike two pictures are to the detector's eye, one number for each pair: (B 3 H W) in [-1, 1] twice -> (B), 0 for equals.

    Zhang et al. 2018 (LPIPS), equation 1, all channels weighted alike: in every layer each cell's vector of channels is brought to length
    1; then the squared distance, averaged over cells and layers. This network knows scenes only: its numbers are not those of LPIPS.
    """
    _same_shape(image, reference)
    layers = zip(*(detector().features(x.float().cpu()) for x in (image, reference)), strict=True)  # (B C h w) twice, each
    distances = [(F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean((1, 2)) for x, y in layers]
    return torch.stack(distances).mean(0)


def _same_shape(image: Tensor, reference: Tensor) -> None:
    shapes = tuple(image.shape), tuple(reference.shape)
    require(image.ndim == 4 and shapes[0] == shapes[1], f"needs two equal shapes (B C H W), not {shapes[0]} and {shapes[1]}")


# --- against a caption ------------------------------------------------------------------------------------------------------------


class Rate(NamedTuple):
    """How many were right, of how many."""

    right: int
    of: int

    @property
    def share(self) -> float:
        """In [0, 1]; nan of none."""
        return self.right / self.of if self.of else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Where the share of ever more would come to lie, with 95% confidence (Wilson 1927); nan of none.

        It takes each as right or wrong by itself; objects of one picture are not quite so, and for them the interval is a little too narrow.
        """
        if not self.of:
            return math.nan, math.nan
        z2 = NormalDist().inv_cdf(0.975) ** 2 / self.of
        half = math.sqrt(z2 * (self.share * (1 - self.share) + z2 / 4))
        return (self.share + z2 / 2 - half) / (1 + z2), (self.share + z2 / 2 + half) / (1 + z2)

    def numbers(self) -> dict[str, int | float | list[float] | None]:
        """As JSON, which knows no nan."""
        between = list(self.interval) if self.of else None
        return {"right": self.right, "of": self.of, "share": self.share if self.of else None, "interval": between}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:.1%} ({100 * low:.0f} to {100 * high:.0f}) of {self.of}" if self.of else "of 0"


@dataclass(frozen=True)
class CaptionAccuracy:
    """How much of what was asked for is in the pictures."""

    kind: Rate  # of objects: there is one of this kind, another one for each that was asked for
    colour: Rate  # of objects: that one has the colour asked for; where the kind is missing, one that is left over has it
    thing: Rate  # of objects: kind and colour, on the same one
    relation: Rate  # of pictures with a relation: both objects are there, in their colours, and stand so
    placed: Rate  # of those of them in which both objects are there, in their colours: they stand so
    background: Rate  # of pictures
    count: Rate  # of pictures: as many objects as asked for
    recognised: Rate  # of pictures: every object is there, in its colour
    right: Rate  # of pictures: recognised, background, count, and relation if there is one


@dataclass(frozen=True)
class Judgement:
    """What is right in one picture, in CaptionAccuracy's sense."""

    kinds: tuple[bool, ...]  # one for each object asked for
    colours: tuple[bool, ...]
    relation: bool | None  # None: there is none
    background: bool
    count: bool

    @property
    def recognised(self) -> bool:
        return all(self.kinds) and all(self.colours)

    @property
    def right(self) -> bool:
        return self.recognised and self.background and self.count and self.relation is not False


def caption_accuracy(pictures: Tensor, asked: Sequence[Scene]) -> CaptionAccuracy:
    """Read pictures (B 3 H W) in [-1, 1] with the package's detector, and compare with the scenes that were asked for, one each."""
    return tally(judge(pictures, asked))


def judge(pictures: Tensor, asked: Sequence[Scene]) -> list[Judgement]:
    """What is right in each of the pictures (B 3 H W) in [-1, 1].

    Where things stand counts through the relation only, and how large they are not at all, even where the caption says so.
    The detector itself makes no mistake in 500 held-out scenes as rendered at 128 x 128, nor in the same at eight other sizes from 96 x 96
    over 96 x 192 to 192 x 192. How right it is where a drawing lies between two kinds or colours, renderings cannot tell.
    """
    require(len(pictures) == len(asked) > 0, f"{len(pictures)} pictures for {len(asked)} scenes; they must be as many, and some")
    readings = [reading for chunk in pictures.float().cpu().split(64) for reading in detector().read(chunk)]
    return [_judge(reading, one) for reading, one in zip(readings, asked, strict=True)]


def tally(judged: Sequence[Judgement]) -> CaptionAccuracy:
    """What judgements come to together."""
    things = [pair for one in judged for pair in zip(one.kinds, one.colours, strict=True)]
    pairs = [one for one in judged if one.relation is not None]
    return CaptionAccuracy(
        kind=_rate(kind for kind, _ in things),
        colour=_rate(colour for _, colour in things),
        thing=_rate(kind and colour for kind, colour in things),
        relation=_rate(bool(one.relation) for one in pairs),
        placed=_rate(bool(one.relation) for one in pairs if one.recognised),
        background=_rate(one.background for one in judged),
        count=_rate(one.count for one in judged),
        recognised=_rate(one.recognised for one in judged),
        right=_rate(one.right for one in judged),
    )


def tally_by_number(judged: Sequence[Judgement]) -> dict[int, CaptionAccuracy]:
    """The same, apart for scenes of one, two and three objects; what is not among them is left out."""
    numbers = sorted({len(one.kinds) for one in judged})
    return {n: tally([one for one in judged if len(one.kinds) == n]) for n in numbers}


def _rate(flags: Iterable[bool]) -> Rate:
    every = list(flags)
    return Rate(sum(every), len(every))


def _judge(reading: Reading, asked: Scene) -> Judgement:
    """Pair the objects found with those asked for: so that most kinds are right, then most kinds and colours together, then most colours."""
    found: list[Found | None] = [*reading.things[:5], *[None] * len(asked.things)]

    def fits(chosen: Sequence[Found | None]) -> list[tuple[bool, bool]]:
        pairs = zip(asked.things, chosen, strict=True)
        return [(seen.kind == thing.kind, seen.colour == thing.colour) if seen else (False, False) for thing, seen in pairs]

    def closeness(chosen: Sequence[Found | None]) -> tuple[int, ...]:
        return tuple(map(sum, zip(*((kind, kind and colour, colour) for kind, colour in fits(chosen)), strict=True)))

    best = max(permutations(found, len(asked.things)), key=closeness)
    kinds, colours = zip(*fits(best), strict=True)
    relation = None
    if asked.relation is not None:
        first, second = best
        relation = all(kinds + colours) and first is not None and second is not None and _stands(first, second) == asked.relation
    return Judgement(kinds, colours, relation, reading.background == asked.background, len(reading.things) == len(asked.things))


def _stands(first: Found, second: Found) -> str:
    """The relation of the first to the second, by the longer way between them."""
    across, down = second.x - first.x, second.y - first.y
    return ("left" if across > 0 else "right") if abs(across) > abs(down) else ("above" if down > 0 else "below")


# --- in the features of the towers that CLIP was trained with ----------------------------------------------------------------------

Tower = Literal["clip_l", "clip_g"]
TOWERS: tuple[Tower, ...] = ("clip_l", "clip_g")
SHIPPED = Path(__file__).parent / "models/tiny/text_encoders"


@lru_cache(maxsize=1)
def _text_towers() -> TextEncoders:
    return TextEncoders.load(SHIPPED, PRESETS["tiny"].text, without=("t5",), dtype=torch.float32)


@lru_cache(maxsize=2)
def _image_tower(name: Tower) -> ImageTower:
    """The one that the CLIP text tower of this name was trained against, as it comes with the package (fp16)."""
    tower = ImageTower(getattr(PRESETS["tiny"].text, name).width)
    tower.load_state_dict(load_file(SHIPPED / f"image_{name[-1]}.safetensors"))
    return tower.eval().requires_grad_(False)


def image_features(pictures: Tensor, tower: Tower = "clip_l") -> Tensor:
    """What an image tower makes of pictures (B 3 H W) in [-1, 1]: (B 96) for clip_l, (B 128) for clip_g."""
    return torch.cat([_image_tower(tower)(chunk) for chunk in pictures.float().cpu().split(64)])


def clip_similarity(pictures: Tensor, captions: Sequence[str], tower: Tower = "clip_l") -> Tensor:
    """The cosine of every picture (B 3 H W) in [-1, 1] with every caption, in [-1, 1]: (B C). Radford et al. 2021."""
    config = PRESETS["tiny"].text
    pooled_l, pooled_g = _text_towers().encode(captions).pooled.split((config.clip_l.width, config.clip_g.width), dim=-1)
    pooled = pooled_l if tower == "clip_l" else pooled_g
    return F.normalize(image_features(pictures, tower), dim=-1) @ F.normalize(pooled, dim=-1).T


def clip_score(pictures: Tensor, captions: Sequence[str], tower: Tower = "clip_l") -> float:
    """The mean cosine of pictures (B 3 H W) with their captions, one each (CLIPScore, Hessel et al. 2021, without its factor of 2.5).

    Held-out scenes as rendered have 0.93 with either tower, pictures of other scenes less than 0.01. A low score is a sure sign, a high one
    is not: the towers do not tell who is left and who is right, nor whose is which colour; caption_accuracy does.
    """
    require(
        len(pictures) == len(captions) > 0, f"{len(pictures)} pictures for {len(captions)} captions; they must be as many, and some"
    )
    return clip_similarity(pictures, captions, tower).diagonal().mean().item()


def frechet_distance(pictures: Tensor, reference: Tensor, tower: Tower = "clip_l") -> float:
    """How far the distribution of pictures (n 3 H W) is from that of reference pictures (m 3 H W), in an image tower's features.

    Heusel et al. 2017 (FID), with a small tower in place of Inception: no number of another network compares. Nor does one of another n:
    few pictures are far from anything. Between rendered scenes and as many others it is 92 for 32, 26 for 100, 6.4 for 500, 1.3 for 2000.
    """
    return gaussian_distance(image_features(pictures, tower), image_features(reference, tower))


def gaussian_distance(x: Tensor, y: Tensor) -> float:
    """|mean_x - mean_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of the Gaussians with the means and covariances of x (n D) and y (m D).

    Frechet's distance, squared (Dowson & Landau 1982). In float64; C_x C_y has the eigenvalues of C_x^(1/2) C_y C_x^(1/2), which is symmetric.
    """
    for name, rows in ("x", x), ("y", y):
        require(len(rows) >= 2, f"{name} has {len(rows)} rows; a covariance needs 2 or more, and some hundred to mean much")
    x, y = x.double(), y.double()
    cov_x, cov_y = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    both = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * both).item()


# --- against a hint ---------------------------------------------------------------------------------------------------------------


class EdgeScore(NamedTuple):
    """How well edges agree, each (B) in [0, 1]."""

    precision: Tensor  # of the picture's edges: the hint has one nearby
    recall: Tensor  # of the hint's edges: the picture has one nearby
    f1: Tensor  # their harmonic mean


def edge_f1(edges: Tensor, hint: Tensor, within: int = 8) -> EdgeScore:
    """How closely a picture's edges follow its hint's; both (B C H W) as controlnet.canny makes them, above 0 on an edge.

    An edge is matched if the other has one at most `within` pixels (a latent cell) away, across and down. Where both have none they agree:
    all are 1; where one has none, all are 0. So wide a reach has a high floor: two unrelated scenes have an f1 of 0.49 (4 pixels: 0.34).
    """
    _same_shape(edges, hint)
    drawn, wanted = (x.amax(1, keepdim=True) > 0 for x in (edges, hint))  # (B 1 H W)

    def share(of: Tensor, near: Tensor) -> Tensor:
        rows = F.max_pool2d(near.float(), (2 * within + 1, 1), 1, (within, 0))
        reach = F.max_pool2d(rows, (1, 2 * within + 1), 1, (0, within))
        return (of * reach).sum((1, 2, 3)) / of.sum((1, 2, 3)).clamp(min=1)

    neither = ~(drawn | wanted).any(3).any(2)[:, 0]  # (B)
    precision, recall = (torch.where(neither, 1.0, share(*pair)) for pair in ((drawn, wanted), (wanted, drawn)))
    return EdgeScore(precision, recall, 2 * precision * recall / (precision + recall).clamp(min=1e-9))


# --- a transformer's loss ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def loss_by_time(
    mmdit: MMDiT, latents: Tensor, cond: Conditioning, times: Tensor, generator: Generator, *, batch: int = 32
) -> Tensor:
    """The mean squared error of the velocity at each of the times (T,) in [0, 1], with the same noise at all of them: (T,).

    latents (N C h w): normalised, of pictures that the transformer was not trained on; cond: of their captions, N rows.
    """
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    target = flow.velocity(latents, noise)

    def error(t: Tensor) -> Tensor:
        x = flow.interpolate(latents, noise, t)
        parts = zip(*(part.split(batch) for part in (x, cond.context, cond.pooled)), strict=True)
        v = torch.cat([mmdit(some, t, *rest) for some, *rest in parts])
        return F.mse_loss(v.float(), target.float())

    return torch.stack([error(t) for t in times.to(latents)])


# --- to look at -------------------------------------------------------------------------------------------------------------------


def grid(pictures: Tensor, columns: int = 8) -> Image.Image:
    """Pictures (B 3 H W) in [-1, 1] as one, row by row; the last row is filled up with white."""
    require(pictures.ndim == 4 and len(pictures) > 0, f"needs pictures (B 3 H W), not {tuple(pictures.shape)}")
    _, _, height, width = pictures.shape
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    pixels = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # (B H W 3)
    for i, picture in enumerate(pixels):
        sheet.paste(Image.fromarray(picture), (i % columns * width, i // columns * height))
    return sheet
