"""Weight files: read their headers, tell what they hold, and turn one layout's names into the other's.

A checkpoint is one .safetensors file, or a folder with one, or a folder of shards with an index. Two layouts are in use: the
*released* one, whose names are this package's attribute names behind a prefix, and *diffusers'*, which splits q, k and v apart,
names every part anew and swaps some halves. The tables below are the whole difference. Nothing here knows a model class.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from errno import EIO
from functools import cache
from mmap import ACCESS_COPY, ALLOCATIONGRANULARITY, mmap
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Layout = Literal["released", "diffusers"]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "U8": torch.uint8,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


class WeightsError(ValueError):
    """A file or folder that cannot be what was asked for; says what it looks like and what to do."""


class Entry(NamedTuple):
    """What a header says about one tensor, and where its bytes are."""

    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    file: Path
    start: int  # bytes into the file

    def map(self) -> Tensor:
        """The tensor, mapped from its file: read when used, changed in memory only, and gone from memory when dropped."""
        dtype, count = DTYPES[self.dtype], math.prod(self.shape)
        if count == 0:
            return torch.empty(self.shape, dtype=dtype)
        inset = self.start % ALLOCATIONGRANULARITY  # maps begin at whole pages
        with self.file.open("rb") as opened:
            window = mmap(opened.fileno(), inset + count * dtype.itemsize, access=ACCESS_COPY, offset=self.start - inset)
        return torch.frombuffer(window, dtype=dtype, count=count, offset=inset).view(self.shape)


def read_header(path: str | Path) -> dict[str, Entry]:
    """Names, dtypes and shapes in a checkpoint, without reading any weights. Raises WeightsError for anything but whole safetensors."""
    entries = {}
    for file in _files(Path(path)):
        header, start = _header(file)
        for name, tensor in header.items():
            if tensor["dtype"] not in DTYPES:
                raise WeightsError(f"{file}: {name} is stored as {tensor['dtype']}; only {some(DTYPES, 12)} can be read")
            entries[name] = Entry(tensor["dtype"], tuple(tensor["shape"]), file, start + tensor["data_offsets"][0])
    return entries


def read_metadata(path: str | Path) -> dict[str, str]:
    """The free text beside the tensors, of all files of the checkpoint together."""
    metadata: dict[str, str] = {}
    for file in _files(Path(path)):
        with _checked(file) as opened:
            metadata |= opened.metadata() or {}
    return metadata


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a .safetensors file whole or not at all."""
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as beside:
            save_file(whole, beside, {"format": "pt", **(metadata or {})})
            beside.chmod(0o644)  # safetensors lets nobody but the owner read
    except SafetensorError as error:  # which hides the system's own error in its text
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else EIO, f"{path} cannot be written: {error}") from None


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write to. What is there in the end is moved to `path`; after an error `path` is as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the file itself, a folder's only one, or the shards that its index names."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise WeightsError(f"{path} does not exist; {_holds(path.parent)}")
    indexes = sorted(path.glob("*.safetensors.index.json"), key=lambda file: len(file.name))
    if indexes:
        shards = {path / name for name in read_json(indexes[0]).get("weight_map", {}).values()}
        missing = sorted(shard.name for shard in shards if not shard.is_file())
        if missing:
            raise WeightsError(f"{path} lacks {some(missing)}, named in its {indexes[0].name}; fetch the missing files")
        return sorted(shards)
    files = sorted(path.glob("*.safetensors"), key=lambda file: len(file.name))
    if not files or not all(file.name.startswith(files[0].stem) for file in files):  # not one model, perhaps in variants (.fp16)
        raise WeightsError(f"{path} is a folder without one .safetensors checkpoint; name a file in it: {_holds(path)}")
    return files[:1]


def read_json(path: Path) -> dict[str, Any]:
    """A config or an index of shards."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{path} is no JSON object ({error}); fetch it again") from None


def _holds(folder: Path) -> str:
    if not folder.is_dir():
        return f"nor does the folder {folder}"
    return f"{folder} holds {some(sorted(entry.name for entry in folder.iterdir()))}"


def some(names: Iterable[str], most: int = 10) -> str:
    """At most ten of them, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


def compare(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    """In words, which names are missing, unexpected or wrongly shaped, at most ten of each; empty if all is well."""
    both = sorted(found.keys() & wanted.keys())
    troubles = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "wrongly shaped": [f"{name} is {found[name]}, not {wanted[name]}" for name in both if found[name] != wanted[name]],
    }
    return "; ".join(f"{len(names)} {what}: {some(names)}" for what, names in troubles.items() if names)


def _checked(file: Path) -> Any:
    """An open file, once safetensors has found its header and its size in order."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} {_diagnose(file)} ({error})") from None


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """What the header says about each tensor, and where the tensors' bytes begin."""
    with _checked(file), file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _diagnose(file: Path) -> str:
    """What a file is that safetensors refuses, and what to do about it."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(128)
        if head[8:9] == b"{":  # eight bytes of length, then JSON: it does begin as safetensors
            opened.seek(8)
            length = int.from_bytes(head[:8], "little")
            return _cut_short(opened.read(min(length, size)), length, size)
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights it points to; run `git lfs pull` in its folder"
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
        return "is a pickle (.ckpt, .pt, .bin), which can run any code when opened, so it is never read; get the .safetensors"
    if head.startswith(b"GGUF"):
        return "is a GGUF file; get the .safetensors of the same model"
    if head.lstrip().startswith(b"<"):
        return "is a web page, perhaps of a log-in, saved under this name; download the file itself"
    return f"is not a safetensors file ({size:,} bytes); check where it came from"


def _cut_short(header: bytes, length: int, size: int) -> str:
    try:
        ends = [tensor["data_offsets"][1] for name, tensor in json.loads(header).items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"is cut short or damaged inside its header: {size:,} bytes of at least {8 + length:,}; fetch it again"
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        return f"is cut short: {size:,} bytes of {whole:,}; fetch it again"
    return f"is damaged: its header accounts for {whole:,} bytes of {size:,}; fetch it again"


# Names. A `*` is any word or part of one, the same on both sides; `.weight` or `.bias` may follow.
#   join   q, k and v are one tensor in the released layout, three in diffusers'
#   swap   (shift, scale) in the released layout, (scale, shift) in diffusers'; `swap-last`: in the last block only
#   conv   a 1x1 convolution in the released layout, a linear map in diffusers'
#   flip   diffusers numbers the decoder's levels from the coarsest

_TRANSFORMER = """
pos_embed                                           pos_embed.pos_embed
x_embedder.proj                                     pos_embed.proj
t_embedder.mlp.0                                    time_text_embed.timestep_embedder.linear_1
t_embedder.mlp.2                                    time_text_embed.timestep_embedder.linear_2
y_embedder.mlp.0                                    time_text_embed.text_embedder.linear_1
y_embedder.mlp.2                                    time_text_embed.text_embedder.linear_2
context_embedder                                    context_embedder
joint_blocks.*.x_block.adaLN_modulation.1           transformer_blocks.*.norm1.linear
joint_blocks.*.x_block.*.qkv                        transformer_blocks.*.*.to_{q,k,v}                join
joint_blocks.*.x_block.*.proj                       transformer_blocks.*.*.to_out.0
joint_blocks.*.x_block.*.ln_q                       transformer_blocks.*.*.norm_q
joint_blocks.*.x_block.*.ln_k                       transformer_blocks.*.*.norm_k
joint_blocks.*.x_block.mlp.fc1                      transformer_blocks.*.ff.net.0.proj
joint_blocks.*.x_block.mlp.fc2                      transformer_blocks.*.ff.net.2
joint_blocks.*.context_block.adaLN_modulation.1     transformer_blocks.*.norm1_context.linear        swap-last
joint_blocks.*.context_block.attn.qkv               transformer_blocks.*.attn.add_{q,k,v}_proj       join
joint_blocks.*.context_block.attn.proj              transformer_blocks.*.attn.to_add_out
joint_blocks.*.context_block.attn.ln_q              transformer_blocks.*.attn.norm_added_q
joint_blocks.*.context_block.attn.ln_k              transformer_blocks.*.attn.norm_added_k
joint_blocks.*.context_block.mlp.fc1                transformer_blocks.*.ff_context.net.0.proj
joint_blocks.*.context_block.mlp.fc2                transformer_blocks.*.ff_context.net.2
final_layer.adaLN_modulation.1                      norm_out.linear                                  swap
final_layer.linear                                  proj_out
"""

_VAE = """
*.conv_in                                           *.conv_in
*.conv_out                                          *.conv_out
*.norm_out                                          *.conv_norm_out
*.mid.block_1.*                                     *.mid_block.resnets.0.*
*.mid.block_2.*                                     *.mid_block.resnets.1.*
*.mid.attn_1.norm                                   *.mid_block.attentions.0.group_norm
*.mid.attn_1.q                                      *.mid_block.attentions.0.to_q                    conv
*.mid.attn_1.k                                      *.mid_block.attentions.0.to_k                    conv
*.mid.attn_1.v                                      *.mid_block.attentions.0.to_v                    conv
*.mid.attn_1.proj_out                               *.mid_block.attentions.0.to_out.0                conv
encoder.down.*.block.*.nin_shortcut                 encoder.down_blocks.*.resnets.*.conv_shortcut
encoder.down.*.block.*.*1                           encoder.down_blocks.*.resnets.*.*1
encoder.down.*.block.*.*2                           encoder.down_blocks.*.resnets.*.*2
encoder.down.*.downsample.conv                      encoder.down_blocks.*.downsamplers.0.conv
decoder.up.*.block.*.nin_shortcut                   decoder.up_blocks.*.resnets.*.conv_shortcut      flip
decoder.up.*.block.*.*1                             decoder.up_blocks.*.resnets.*.*1                 flip
decoder.up.*.block.*.*2                             decoder.up_blocks.*.resnets.*.*2                 flip
decoder.up.*.upsample.conv                          decoder.up_blocks.*.upsamplers.0.conv            flip
"""

_CONTROLNET = """
transformer_blocks.*.adaLN_modulation.1             transformer_blocks.*.norm1.linear
transformer_blocks.*.attn.qkv                       transformer_blocks.*.attn.to_{q,k,v}             join
transformer_blocks.*.attn.proj                      transformer_blocks.*.attn.to_out.0
transformer_blocks.*.mlp.fc1                        transformer_blocks.*.ff.net.0.proj
transformer_blocks.*.mlp.fc2                        transformer_blocks.*.ff.net.2
time_text_embed.*.*                                 time_text_embed.*.*
controlnet_blocks.*                                 controlnet_blocks.*
pos_embed_input.proj                                pos_embed_input.proj
"""


@dataclass(frozen=True)
class Source:
    """Where one of our tensors comes from: its names in the file, and what is done to them."""

    names: tuple[str, ...]  # three for q, k and v, to be joined
    op: str = ""

    def shape(self, header: Mapping[str, Entry]) -> tuple[int, ...]:
        shape = header[self.names[0]].shape
        if self.op == "join":
            shapes = {name: header[name].shape for name in self.names}
            if len(shapes) != 3 or len(set(shapes.values())) > 1 or not shape:
                raise WeightsError(
                    f"queries, keys and values must be three tensors of one shape, not {shapes}; fetch the file again"
                )
            return (3 * shape[0], *shape[1:])
        return (*shape, 1, 1) if self.op == "conv" and len(shape) == 2 else shape

    def build(self, parts: list[Tensor]) -> Tensor:
        if self.op == "join":
            return torch.cat(parts)
        if self.op == "swap":
            return torch.cat(parts[0].chunk(2)[::-1])
        return parts[0][..., None, None] if self.op == "conv" and parts[0].ndim == 2 else parts[0]


@dataclass(frozen=True)
class _Line:
    """One line of a table; a `join` line stands for three."""

    released: str
    diffusers: str
    op: str = ""
    part: int = 0  # of a `join`: 0 q, 1 k, 2 v

    def rename(self, name: str, to: Layout, last: int) -> tuple[str, str] | None:
        """The name in the other layout and what is done on the way, if `name` fits; `last` is the number of the last block."""
        old, new = (self.released, self.diffusers) if to == "diffusers" else (self.diffusers, self.released)
        match = _pattern(old).fullmatch(name)
        if not match:
            return None
        *words, leaf = match.groups()
        op = self.op
        if op == "flip":
            words[0] = str(last - int(words[0]))
        if op == "swap-last":
            op = "swap" if words[0] == str(last) else ""
        return new.replace("*", "{}").format(*words) + leaf, op


@cache
def _pattern(name: str) -> re.Pattern[str]:
    """What fits a name of a table: its words, in place of *, then what the tensor is to its module."""
    return re.compile(re.escape(name).replace(r"\*", r"(\w+)") + r"(\.weight|\.bias|)")


def _table(text: str) -> list[_Line]:
    lines = []
    for line in text.strip().splitlines():
        released, diffusers, *op = line.split()
        if op == ["join"]:
            lines += [_Line(released, diffusers.replace("{q,k,v}", "qkv"[part]), "join", part) for part in range(3)]
        else:
            lines.append(_Line(released, diffusers, "".join(op)))
    return lines


TABLES = {"transformer": _table(_TRANSFORMER), "VAE": _table(_VAE), "ControlNet": _table(_CONTROLNET)}


def _last(names: Iterable[str]) -> int:
    """The highest number of a transformer's block or of a decoder's level."""
    matches = (re.match(r"(?:joint_blocks|transformer_blocks|decoder\.up|decoder\.up_blocks)\.(\d+)\.", name) for name in names)
    return max((int(match[1]) for match in matches if match), default=0)


def from_diffusers(kind: str, names: Iterable[str]) -> dict[str, Source]:
    """Our names, each with where it comes from. A name that no line of the table fits stays as it is."""
    names = list(names)
    last = _last(names)
    parts: dict[str, dict[int, str]] = {}
    ops: dict[str, str] = {}
    for name in names:
        fits = [(*found, line.part) for line in TABLES[kind] if (found := line.rename(name, "released", last))]
        ours, op, part = fits[0] if fits else (name, "", 0)
        parts.setdefault(ours, {})[part] = name
        ops[ours] = op
    return {ours: Source(tuple(found[part] for part in sorted(found)), ops[ours]) for ours, found in parts.items()}


def to_diffusers(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under diffusers' names, cut, swapped and flattened to suit."""
    last = _last(tensors)
    theirs = {}
    for name, tensor in tensors.items():
        fits = [(*found, line.part) for line in TABLES[kind] if (found := line.rename(name, "diffusers", last))]
        if not fits:
            raise WeightsError(f"diffusers has no name for the {kind}'s {name}; save it in the released layout")
        for new, op, part in fits:
            cut = tensor.chunk(3)[part] if op == "join" else tensor
            cut = torch.cat(cut.chunk(2)[::-1]) if op == "swap" else cut
            theirs[new] = cut[..., 0, 0] if op == "conv" and cut.ndim == 4 else cut
    return theirs


# What files hold. The first pattern that fits any name of a group tells the kind.
_KINDS: list[tuple[str, str, Layout | None]] = [
    (r"\blora_|\.lora\.|_lora\b", "LoRA", None),
    (r"^(single_transformer_blocks|double_blocks)\.", "FLUX transformer", None),
    (r"^transformer_blocks\.\d+\.attn\.qkv\.", "ControlNet", "released"),
    (r"^controlnet_blocks\.", "ControlNet", "diffusers"),
    (r"^joint_blocks\.", "transformer", "released"),
    (r"^transformer_blocks\.\d+\.attn\.(to|add)_[qkv]", "transformer", "diffusers"),
    (r"^(encoder\.down|decoder\.up)\.\d", "VAE", "released"),
    (r"^(encoder\.down|decoder\.up)_blocks\.", "VAE", "diffusers"),
    (r"^(input|down)_blocks\.", "UNet of Stable Diffusion 1, 2 or XL", None),
    (r"vision_model\.", "CLIP with its image tower", None),
    (r"text_model\.encoder\.", "CLIP text encoder", None),
    (r"^encoder\.block\.\d+\.layer\.", "T5 text encoder", None),
]
PREFIXES = {"transformer": "model.diffusion_model.", "VAE": "first_stage_model.", "ControlNet": ""}
_PREFIX = re.compile(r"model\.diffusion_model\.|first_stage_model\.|text_encoders\.\w+\.transformer\.|")


@dataclass(frozen=True)
class Part:
    """One model in a checkpoint, under this package's names."""

    kind: str  # "transformer", "VAE", "ControlNet", or in words what else it looks like
    layout: Layout | None  # None where this package has no names for the kind
    header: dict[str, Entry]  # of the file
    sources: dict[str, Source]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: source.shape(self.header) for name, source in self.sources.items()}

    def read(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """The tensors one by one, so that memory holds the result and one tensor more; dtype is for floating-point tensors only."""
        for name, source in self.sources.items():
            mapped = (self.header[part].map() for part in source.names)
            yield name, source.build([part.to(device, dtype if part.is_floating_point() else None) for part in mapped])


def find_parts(header: Mapping[str, Entry]) -> list[Part]:
    """The models that a checkpoint holds: a released single file has a transformer and a VAE, some have text encoders too."""
    groups: dict[str, dict[str, Entry]] = {}
    for name, entry in header.items():
        match = _PREFIX.match(name)
        groups.setdefault(match[0] if match else "", {})[name] = entry
    return [_part(prefix, group) for prefix, group in groups.items()]


def _part(prefix: str, group: dict[str, Entry]) -> Part:
    names = {name.removeprefix(prefix): name for name in group}
    unknown = f"model that is not known here (its names begin with {some(sorted(names), 3)})", None
    kind, layout = next(((kind, layout) for pattern, kind, layout in _KINDS if any(re.search(pattern, n) for n in names)), unknown)
    if layout == "diffusers":
        found = from_diffusers(kind, names)
        return Part(kind, layout, group, {ours: Source(tuple(names[n] for n in s.names), s.op) for ours, s in found.items()})
    return Part(kind, layout, group, {ours: Source((name,)) for ours, name in names.items()})
