"""What `python -m minisd3 evaluate` says of a whole model: how it draws captions, how its parts do, and what guidance does for it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from minisd3 import scenes
from minisd3.config import PRESETS, SkipLayers
from minisd3.evaluate import (
    TOWERS,
    CaptionAccuracy,
    Judgement,
    clip_score,
    frechet_distance,
    judge,
    loss_by_time,
    perceptual_distance,
    psnr,
    ssim,
    tally,
)
from minisd3.formats import replacing
from minisd3.pipeline import SD3, from_pil
from minisd3.scenes import HELD_OUT, Scene
from minisd3.types import Conditioning

BATCH = 8  # pictures at a time; with more, a CPU is hardly faster
LOSS_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)

# settings of SD3.generate -> pictures (b 3 H W) and what is right in each, some at a time
Draw = Callable[[Mapping[str, Any]], Iterator[tuple[Tensor, list[Judgement]]]]


def draw(
    sd3: SD3, asked: Sequence[Scene], prompts: Sequence[str], first: int, settings: Mapping[str, Any]
) -> Iterator[tuple[Tensor, list[Judgement]]]:
    """Draw each scene that is asked for by its prompt, with seeds from `first` on, and judge it."""
    for i in range(0, len(asked), BATCH):
        some = prompts[i : i + BATCH]
        drawn = sd3.generate(some, seed=range(first + i, first + i + len(some)), progress=False, **settings)
        pictures = torch.cat([from_pil(picture, picture.size[::-1]) for picture in drawn])
        yield pictures, judge(pictures, asked[i : i + BATCH])


def of_pictures(pictures: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Of drawn pictures (n 3 H W) and their prompts. Frechet's distance says nothing of fewer than the tower has features: it is left out."""
    scores = {f"CLIP score, {tower}": clip_score(pictures, prompts, tower) for tower in TOWERS}
    n, size = len(pictures), pictures.shape[2:]
    if n > PRESETS["tiny"].text.clip_l.width:
        rendered, others = (scenes.pictures(range(start, start + n), *size) for start in (HELD_OUT, HELD_OUT + 10**6))
        scores[f"Frechet distance of {n} pictures"] = frechet_distance(pictures, others)
        scores["the same of rendered scenes"] = frechet_distance(rendered, others)
    return scores


@torch.no_grad()
def of_model(sd3: SD3, image: Tensor, captions: Sequence[str], seed: int) -> dict[str, float]:
    """Of the VAE on held-out pictures (n 3 H W), and of the transformer on their latents."""
    like = next(sd3.vae.parameters())
    latents = torch.cat([sd3.vae.encode(some.to(like))[0] for some in image.split(BATCH)])  # (n C h w)
    again = torch.cat([sd3.vae.decode(some) for some in latents.split(BATCH)]).to(image).clamp(-1, 1)
    device = next(sd3.mmdit.parameters()).device
    cond = Conditioning(*(part.to(device) for part in sd3.encode_prompt(captions)[0]))
    latents = sd3.vae.normalize(latents).to(device, torch.float32)
    losses = loss_by_time(sd3.mmdit, latents, cond, torch.tensor(LOSS_TIMES), Generator().manual_seed(seed))
    return {
        "VAE: PSNR in dB": psnr(again, image).mean().item(),
        "VAE: SSIM": ssim(again, image).mean().item(),
        "VAE: perceptual distance": perceptual_distance(again, image).mean().item(),
        **{f"loss at t = {t}": loss for t, loss in zip(LOSS_TIMES, losses.tolist(), strict=True)},
    }


def accuracy_table(columns: Mapping[str, CaptionAccuracy]) -> str:
    """A line for each number, with the interval that its truth is in with 95% confidence."""
    rows = [["right (95% interval)", *columns]]
    rows += [[field.name, *(str(getattr(one, field.name)) for one in columns.values())] for field in fields(CaptionAccuracy)]
    return "\n".join(f"{name:22}{''.join(f'{cell:26}' for cell in cells)}".rstrip() for name, *cells in rows)


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As they are once they have been through JSON."""
    return json.loads(json.dumps(settings, default=asdict))


def fingerprint(module: nn.Module) -> str:
    """Tells weights apart."""
    digest = sha256()
    for p in module.parameters():
        digest.update(p.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- tables of guidances ----------------------------------------------------------------------------------------------------------

CFG_SCALES = (1.0, 2.0, 3.0, 4.0, 6.0, 10.0, 16.0)
CFG_INTERVALS = ((0.0, 0.5), (0.5, 1.0), (0.2, 0.8))
SLG_SCALES = (0.75, 1.5, 3.0)
SLG_WINDOWS = ((0.01, 0.2), (0.01, 0.5))


class Guidance(NamedTuple):
    """One way to guide, named as SD3.generate names it."""

    cfg: float
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    slg: SkipLayers | None = None

    def cells(self) -> list[str]:
        """Of a table with the columns COLUMNS."""
        slg = self.slg
        skip = [", ".join(map(str, slg.layers)), f"{slg.scale:g}", f"{slg.start:g} to {slg.end:g}"] if slg else ["none", "", ""]
        return [f"{self.cfg:g}", "{:g} to {:g}".format(*self.cfg_interval), *skip]


COLUMNS = ("CFG", "at times", "without layers", "scale", "steps")


class Drawn(NamedTuple):
    """What came of one guidance: a judgement of each caption's picture, and `of_pictures` of them all."""

    judged: list[Judgement]
    scores: dict[str, float]


def cfg_choices(cfg: float) -> list[Guidance]:
    """First this scale, with which the others are compared; then other scales, and this one and a larger one at some of the times only."""
    scales = [cfg, *(scale for scale in CFG_SCALES if scale != cfg)]
    part = [Guidance(scale, interval) for scale in dict.fromkeys((cfg, 10.0)) for interval in CFG_INTERVALS]
    return [*map(Guidance, scales), *part]


def slg_choices(
    cfg: float,
    depth: int,
    *,
    layers: tuple[int, ...] | None = None,
    scale: float | None = None,
    start: float | None = None,
    end: float | None = None,
) -> list[Guidance]:
    """First none; then each block and each two neighbours, at each scale, in each window. What is given stays as it is."""
    blocks = [layers] if layers else [*((i,) for i in range(depth)), *((i, i + 1) for i in range(depth - 1))]
    scales = SLG_SCALES if scale is None else (scale,)
    windows = dict.fromkeys((a if start is None else start, b if end is None else end) for a, b in SLG_WINDOWS)
    skips = [SkipLayers(some, size, *window) for some in blocks for size in scales for window in windows]
    return [Guidance(cfg), *(Guidance(cfg, slg=slg) for slg in skips)]


def read_table(path: Path) -> tuple[dict[str, Any], dict[Guidance, Drawn]]:
    """What a table was made with, and its rows, as `write_table` left them."""
    made, *rows = map(json.loads, path.read_text().splitlines())
    return made, dict(map(_row, rows))


def write_table(path: Path, made: Mapping[str, Any], rows: Mapping[Guidance, Drawn]) -> None:
    """A line of JSON with what the table was made with, then one for each row."""
    lines = [made, *({"guidance": one, "judged": [list(vars(each).values()) for each in drawn.judged], "scores": drawn.scores}
                     for one, drawn in rows.items())]  # fmt: skip
    with replacing(path) as beside:
        beside.write_text("".join(json.dumps(line, default=asdict) + "\n" for line in lines))


def _row(row: Mapping[str, Any]) -> tuple[Guidance, Drawn]:
    cfg, (low, high), slg = row["guidance"]
    skip = SkipLayers(**slg | {"layers": tuple(slg["layers"])}) if slg else None
    judged = [Judgement(tuple(kinds), tuple(colours), *rest) for kinds, colours, *rest in row["judged"]]
    return Guidance(cfg, (low, high), skip), Drawn(judged, row["scores"])


def table_markdown(rows: Mapping[Guidance, Drawn]) -> str:
    """A line for each guidance. Gained: captions that are all right with it and were not with the first; lost: the other way round."""
    first = next(iter(rows.values()))
    heads = [*COLUMNS, *(field.name for field in fields(CaptionAccuracy)), "gained", "lost", *first.scores]
    lines = [heads, ["---"] * len(heads)]
    for one, (judged, said) in rows.items():
        shares = [f"{rate.share:.1%}" if rate.of else "of 0" for rate in vars(tally(judged)).values()]
        changes = [(after.right, before.right) for after, before in zip(judged, first.judged, strict=True)]
        counts = [str(changes.count((True, False))), str(changes.count((False, True)))]
        lines.append([*one.cells(), *shares, *counts, *(f"{score:.3f}" for score in said.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
