"""Training on pictures of your own: from a folder or from tars, encoded once, and the run over what was encoded.

A folder holds name.txt beside name.jpg (.png, .webp), in subfolders too, or a metadata.jsonl with file_name and text in each line; a tar, as
webdataset packs them, holds both as members of one name. Before training, pictures become latents and captions what the text encoders make of
them, in shards that are then mapped from the disk: while a model is trained, no text encoder (T5-XXL: 9.5 GB) is in memory.
Nothing is left out silently: a picture that cannot be read or has no caption is an error that names it. But where there is a metadata.jsonl, or
are tars, only what they hold is looked at.
"""

import contextlib
import json
import math
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import ContainerIO, Image, ImageOps
from torch import Generator, Tensor, nn

from minisd3 import flow
from minisd3.config import require
from minisd3.distributed import share
from minisd3.formats import read_header, write
from minisd3.text import TextEncoders, TruncationWarning
from minisd3.training import OnlyAdamW, Progress, fit, flow_loss
from minisd3.types import Conditioning
from minisd3.vae import VAE

PICTURES = {".jpg", ".jpeg", ".png", ".webp"}

# --- what there is ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A picture, as a file or as a part of one, and its caption."""

    name: str  # below what was searched
    caption: str
    file: Path
    start: int  # of the picture's bytes in the file
    length: int

    def read(self, size: tuple[int, int]) -> Image.Image:
        """The picture, resized to cover size (height, width) and cropped to its middle. Raises ValueError if it cannot be read."""
        with self._open() as picture:
            whole = ImageOps.exif_transpose(picture).convert("RGB")
        return ImageOps.fit(whole, size[::-1], Image.Resampling.LANCZOS)

    def ratio(self) -> float:
        """Height by width, read from the picture's header alone."""
        with self._open() as picture:
            turned = picture.getexif().get(0x0112, 1) > 4  # Exif's orientation: lying on its side
            return picture.width / picture.height if turned else picture.height / picture.width

    @contextlib.contextmanager
    def _open(self) -> Iterator[Image.Image]:
        try:
            with self.file.open("rb") as file, Image.open(ContainerIO.ContainerIO(file, self.start, self.length)) as picture:
                yield picture
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self.name} of {self.file} cannot be read as a picture ({error}); mend it or take it out") from None


def find_examples(paths: Iterable[Path]) -> list[Example]:
    """Every captioned picture in these folders and tars; of a folder of tars, in those. Raises ValueError naming what has no caption."""
    found: list[Example] = []
    for path in paths:
        require(path.exists(), f"{path} does not exist; name a folder of pictures and captions, or tars of them")
        if path.is_file():
            found += _in_tar(path)
        elif (path / "metadata.jsonl").is_file():
            found += _in_table(path)
        elif tars := sorted(path.glob("*.tar")):
            found += [example for tar in tars for example in _in_tar(tar)]
        else:
            found += _in_folder(path)
    require(bool(found), f"there are no pictures ({', '.join(sorted(PICTURES))}) in {', '.join(map(str, paths))}")
    return found


def _in_folder(folder: Path) -> Iterator[Example]:
    for file in sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES):
        beside = file.with_suffix(".txt")
        require(beside.is_file(), f"{file} has no caption; write it to {beside.name} beside it")
        yield _of_file(folder, file, _text(beside.read_bytes(), beside))


def _in_table(folder: Path) -> Iterator[Example]:
    table = folder / "metadata.jsonl"
    lines = _text(table.read_bytes(), table).split("\n")  # splitlines would also split at what a text may hold, such as U+2028
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row: Any = None
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
        fits = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("file_name", "text"))
        require(fits, f"{table}, line {number}, is no object with file_name and text: {line[:80]}")
        require((folder / row["file_name"]).is_file(), f"{table}, line {number}, names {row['file_name']}, which is not there")
        yield _of_file(folder, folder / row["file_name"], row["text"])


def _text(content: bytes, where: Path | str) -> str:
    try:
        return content.decode("utf-8-sig")  # without the mark that some editors begin a file with
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no UTF-8 text ({error}); save it as such") from None


def _of_file(folder: Path, file: Path, caption: str) -> Example:
    return Example(str(file.relative_to(folder)), caption.strip(), file, 0, file.stat().st_size)


def _in_tar(path: Path) -> Iterator[Example]:
    """A tar's pictures stay in it: their places are noted, so only an uncompressed tar will do, as webdataset's are."""
    pictures: dict[str, tarfile.TarInfo] = {}
    captions: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                kind = PurePath(member.name).suffix.lower()
                if kind in PICTURES:
                    pictures[member.name] = member
                elif kind == ".txt" and (text := tar.extractfile(member)):
                    captions[_stem(member.name)] = _text(text.read(), f"{member.name} in {path}")
    except tarfile.ReadError as error:
        raise ValueError(f"{path} is no uncompressed tar ({error}); unpack it, or pack it again without compression") from None
    for name, member in pictures.items():
        key = _stem(name)
        require(key in captions, f"{name} in {path} has no caption; add {PurePath(key).name}.txt to the tar")
        yield Example(name, captions[key].strip(), path, member.offset_data, member.size)


def _stem(name: str) -> str:
    """What a picture and its caption have in common, folders included."""
    return name.removesuffix(PurePath(name).suffix)


# --- what is made of it -----------------------------------------------------------------------------------------------------------


def buckets(side: int, multiple: int) -> list[tuple[int, int]]:
    """Heights and widths of about side * side pixels, from 1 : 2 to 2 : 1, in multiples of `multiple` (Podell et al. 2023, section 2.3)."""
    step = max(multiple, side // 16 // multiple * multiple)
    first, last = math.ceil(side / math.sqrt(2) / step), math.floor(side * math.sqrt(2) / step)
    return [(i * step, side**2 // (i * step**2) * step) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Shard:
    """Examples that are prepared together, in one size (height, width), and the file that this makes."""

    path: Path
    size: tuple[int, int]
    examples: tuple[Example, ...]


def plan(
    examples: Sequence[Example], folder: Path, sizes: Sequence[tuple[int, int]], *, made_with: str = "", most: int = 256
) -> list[Shard]:
    """Which examples go into which file of `folder`: each to the size of the nearest proportions, at most `most` to a file.

    A file is named by what is in it, captions, the pictures' lengths in bytes and `made_with` included, so that one that is there need not
    be made again.
    """
    groups: dict[tuple[int, int], list[Example]] = {size: [] for size in sizes}
    for example in examples:
        ratio = example.ratio() if len(sizes) > 1 else 1.0
        groups[min(sizes, key=lambda size: abs(math.log(size[0] / size[1] / ratio)))].append(example)
    shards = []
    for size, group in groups.items():
        for own in (tuple(group[i : i + most]) for i in range(0, len(group), most)):
            about = [made_with, size, [(example.name, example.length, example.caption) for example in own]]
            shards.append(Shard(folder / f"{sha256(json.dumps(about).encode()).hexdigest()[:16]}.safetensors", size, own))
    return shards


def prepare(shards: Iterable[Shard], vae: VAE, text: TextEncoders, *, batch: int = 4) -> Iterator[Path]:
    """Make the shards' files, whole or not at all: normalised latents (n C h w), context (n L D) and pooled (n P), all in fp16, and
    what an empty prompt gives: empty_context (1 L D), empty_pooled (1 P).

    text: with config.t5_limit set, so that every caption has as many tokens. Raises ValueError for a picture that cannot be read.
    """
    empty = {f"empty_{name}": part for name, part in encode_captions(text, [""])._asdict().items()}
    for shard in shards:
        parts = [shard.examples[i : i + batch] for i in range(0, len(shard.examples), batch)]
        latents = torch.cat([_latents(vae, part, shard.size) for part in parts])
        context, pooled = zip(*(encode_captions(text, [example.caption for example in part]) for part in parts), strict=True)
        write(shard.path, {"latents": latents, "context": torch.cat(context), "pooled": torch.cat(pooled)} | empty)
        yield shard.path


@torch.no_grad()
def _latents(vae: VAE, examples: Sequence[Example], size: tuple[int, int]) -> Tensor:
    pixels = torch.from_numpy(np.stack([np.asarray(example.read(size)) for example in examples]))  # (B H W 3)
    image = pixels.permute(0, 3, 1, 2).to(vae.decoder.conv_in.weight) / 127.5 - 1
    return vae.normalize(vae.encode(image)[0]).half().cpu()


def encode_captions(text: TextEncoders, captions: Sequence[str]) -> Conditioning:
    """What the text encoders make of the captions, in fp16 and in main memory. What is too long is cut without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        return Conditioning(*(part.half().cpu() for part in text.encode(captions)))


# --- training on it ---------------------------------------------------------------------------------------------------------------


class Prepared:
    """Prepared shards, mapped from the disk: a row is read when it is drawn."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.groups: dict[tuple[int, ...], list[tuple[dict[str, Tensor], int]]] = {}  # by the shape of latents: shard and row
        for path in paths:
            shard = {name: entry.map() for name, entry in read_header(path).items()}
            rows = [(shard, row) for row in range(len(shard["latents"]))]
            self.groups.setdefault(tuple(shard["latents"].shape[1:]), []).extend(rows)
        self.empty = Conditioning(shard["empty_context"].float(), shard["empty_pooled"].float())  # the same in all

    def draw(self, batch: int, generator: Generator, *, empty: float = 0.1) -> tuple[Tensor, Conditioning]:
        """This process's share of a batch of one size: latents (B C h w) and their conditioning, in fp32.

        empty: the share of captions in whose place is the empty prompt, for classifier-free guidance (Ho & Salimans 2022).
        """
        groups = list(self.groups.values())
        weights = torch.tensor([float(len(group)) for group in groups])
        group = groups[int(torch.multinomial(weights, 1, generator=generator))]
        index = share(torch.randint(len(group), (batch,), generator=generator))
        dropped = share(torch.rand(batch, generator=generator) < empty)
        latents, cond = _rows([group[i] for i in index.tolist()])
        context = torch.where(dropped[:, None, None], self.empty.context, cond.context)
        return latents, Conditioning(context, torch.where(dropped[:, None], self.empty.pooled, cond.pooled))

    def first(self, n: int) -> tuple[Tensor, Conditioning]:
        """The first n, or fewer, of one size, for pictures to watch."""
        return _rows(next(iter(self.groups.values()))[:n])


def _rows(rows: Sequence[tuple[dict[str, Tensor], int]]) -> tuple[Tensor, Conditioning]:
    parts = (torch.stack([shard[name][row] for shard, row in rows]).float() for name in ("latents", "context", "pooled"))
    latents, context, pooled = parts
    return latents, Conditioning(context, pooled)


def train_on(
    data: Prepared,
    module: nn.Module,
    run: Path,
    *,
    steps: int,
    batch: int,
    lr: float,
    shift: float,
    **options: Any,
) -> Iterator[Progress]:
    """Train a transformer, whole or its LoRA, with AdamW. shift: of times, as the model's preset has it for its size (section 5.3.2).

    batch: of all processes together, in each of the `accumulate` parts of a step
    options: further ones of training.fit
    """
    times, device = flow.shifted(flow.logit_normal, shift), next(module.parameters()).device

    def loss(module: nn.Module, step: int, generator: Generator) -> Tensor:
        x0, cond = data.draw(batch, generator)
        return flow_loss(module, x0.to(device), Conditioning(*(part.to(device) for part in cond)), generator, times=times)

    return fit(module, loss, run, steps=steps, lr=lr, optimizer=OnlyAdamW, **options)
