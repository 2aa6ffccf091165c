"""LoRA: matrices of low rank beside a transformer's own, trained in their place and kept in a small file (Hu et al. 2021).

A linear layer W becomes W x + scale * up(down(x)), with scale = alpha / rank; `up` begins at zero, so nothing changes at first. Files are
written under diffusers' names with the scale inside of `up`, since readers disagree on where alpha stands. Read are diffusers' and PEFT's
files, kohya's, and those under the released names; what they hold for q, k and v apart is put together for the released `qkv`.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from minisd3.config import require
from minisd3.formats import WeightsError, from_diffusers, read_header, read_metadata, some, to_diffusers, write
from minisd3.mmdit import MMDiT

ATTENTION = r"\.attn2?\.(qkv|proj)$"  # what is adapted by default: every projection of every attention


class Factors(NamedTuple):
    """What is added to a layer's weight: up @ down."""

    down: Tensor  # (R in)
    up: Tensor  # (out R)


class LoRALinear(nn.Linear):
    """A linear layer with a second path of low rank. Its weight and bias are those of the layer that it replaces, under their old names."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float, generator: Generator | None = None) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.scale = alpha / rank
        down = nn.init.kaiming_uniform_(torch.empty(rank, layer.in_features), a=math.sqrt(5), generator=generator)
        self.down = nn.Parameter(down.to(layer.weight.device))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        beside = F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return super().forward(x) + self.scale * beside


def add_lora(
    mmdit: MMDiT, rank: int, *, alpha: float | None = None, layers: str = ATTENTION, generator: Generator | None = None
) -> None:
    """Freeze the transformer and give its layers whose names match `layers`, a regular expression, something to train.

    alpha: by default the rank, so that scale is 1. Raises ValueError for a rank below 1, if no linear layer matches, and for a second one,
        which would lose the first.
    """
    require(rank >= 1, f"a LoRA's rank is {rank}; it must be at least 1")
    has_one = any(isinstance(layer, LoRALinear) for layer in _linear(mmdit).values())
    require(not has_one, "this transformer has a LoRA already; save_lora keeps it, and apply_lora adds the file to a new one")
    found = [name for name in _linear(mmdit) if re.search(layers, name)]
    require(bool(found), f"no linear layer's name matches {layers!r}; they are {some(_linear(mmdit))}")
    mmdit.requires_grad_(False)
    for name in found:
        parent, _, own = name.rpartition(".")
        layer = mmdit.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(mmdit.get_submodule(parent), own, LoRALinear(layer, rank, rank if alpha is None else alpha, generator))


def _linear(mmdit: MMDiT) -> dict[str, nn.Linear]:
    return {name: module for name, module in mmdit.named_modules() if isinstance(module, nn.Linear)}


# --- files ------------------------------------------------------------------------------------------------------------------------


def save_lora(path: str | Path, mmdit: MMDiT, *, dtype: torch.dtype | None = None) -> None:
    """Write what `add_lora` added, under diffusers' names: StableDiffusion3Pipeline.load_lora_weights reads it, and so does `apply_lora`."""
    tensors = {}
    for name, layer in _linear(mmdit).items():
        if isinstance(layer, LoRALinear):
            for theirs, up in _theirs(mmdit, name, layer.up.detach() * layer.scale).items():
                tensors[f"transformer.{theirs}.lora_A.weight"] = layer.down.detach().to("cpu", dtype).clone()  # q, k and v share it
                tensors[f"transformer.{theirs}.lora_B.weight"] = up.to("cpu", dtype)
    require(bool(tensors), "this transformer has no LoRA; add_lora gives it one")
    write(path, tensors)


def _theirs(mmdit: MMDiT, name: str, rows: Tensor) -> dict[str, Tensor]:
    """diffusers' layers that one of ours stands for, each with its rows."""
    last = f"joint_blocks.{mmdit.config.depth - 1}.x_block.attn.proj.bias"  # tells to_diffusers how many blocks there are
    made = to_diffusers("transformer", {last: rows[:0], f"{name}.weight": rows})
    return {theirs.removesuffix(".weight"): part for theirs, part in made.items() if theirs.endswith(".weight")}


_NAME = re.compile(
    r"(?:base_model\.model\.)?(?:transformer\.|diffusion_model\.|lora_unet_|lora_transformer_)?(?P<layer>.+?)"
    r"(?:(?P<down>\.lora_A|\.lora_down|\.lora\.down)(?:\.default)?\.weight|(?P<up>\.lora_B|\.lora_up|\.lora\.up)(?:\.default)?\.weight|\.alpha)"
)


def read_lora(path: str | Path, mmdit: MMDiT) -> dict[str, Factors]:
    """What a LoRA file adds to this transformer's layers, by their names, in float32. Raises WeightsError for anything else."""
    path, layers = Path(path), _linear(mmdit)
    theirs = [other for name, layer in layers.items() for other in _theirs(mmdit, name, layer.weight.detach())]
    alpha = _noted_alpha(path)
    factors = {name: _factors(path, name, own, alpha) for name, own in _tensors(path, [*layers, *theirs]).items()}
    found = {name: own for name, own in factors.items() if name in layers}
    for weight, source in from_diffusers("transformer", [f"{name}.weight" for name in theirs]).items():
        name, parts = weight.removesuffix(".weight"), [factors.get(part.removesuffix(".weight")) for part in source.names]
        if any(parts):
            down, up = _joined(parts, layers[name].out_features // len(parts))
            found[name] = Factors(down, source.build([up]) if source.op == "swap" else up)
    for name, (down, up) in found.items():
        own, wanted = (len(up), down.shape[1]), tuple(layers[name].weight.shape)
        if own != wanted:
            raise WeightsError(f"{path} is of another transformer: its {name} is {own}, and this one's {wanted}")
    return found


def _tensors(path: Path, names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """A file's down, up and alpha for each of these layers, which in kohya's files have _ in the place of dots."""
    known = {name.replace(".", "_"): name for name in names}
    parts: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name, entry in read_header(path).items():
        match = _NAME.fullmatch(name)
        layer = known.get(match["layer"].replace(".", "_")) if match else None
        if match and layer:
            kind = "down" if match["down"] else "up" if match["up"] else "alpha"
            parts.setdefault(layer, {})[kind] = entry.map().float()
        else:
            strange.append(name)
    if strange or not parts:
        raise WeightsError(f"{path} is no LoRA of this transformer's linear layers: it holds {some(strange)}")
    return parts


def _noted_alpha(path: Path) -> float | None:
    """alpha as PEFT notes it beside the tensors, the same for all layers."""
    noted = json.loads(read_metadata(path).get("lora_adapter_metadata", "{}"))
    noted = {name.removeprefix("transformer."): value for name, value in noted.items()}
    other = [name for name in ("alpha_pattern", "use_dora", "use_rslora", "lora_bias") if noted.get(name)]
    if other:
        raise WeightsError(f"{path} is a LoRA of a kind that is not read here: it sets {some(other)}")
    return noted.get("lora_alpha")


def _factors(path: Path, layer: str, own: Mapping[str, Tensor], alpha: float | None) -> Factors:
    if not own.keys() >= {"down", "up"} or own["down"].ndim != 2 or own["up"].shape[1:] != own["down"].shape[:1]:
        shapes = {kind: tuple(x.shape) for kind, x in own.items()}
        raise WeightsError(f"{path}: {layer} needs down (R in) and up (out R), and has {shapes}; get the file again")
    rank = len(own["down"])
    scale = float(own["alpha"]) / rank if "alpha" in own else 1.0 if alpha is None else alpha / rank
    return Factors(own["down"], own["up"] * scale)


def _joined(parts: list[Factors | None], rows: int) -> Factors:
    """Factors of a layer out of those of its parts, each of `rows` rows: side by side in blocks, or as one if they share `down`."""
    there = [part for part in parts if part is not None]
    if len(there) == len(parts) and all(torch.equal(part.down, there[0].down) for part in there):
        return Factors(there[0].down, torch.cat([part.up for part in there]))
    ups = [torch.zeros(rows, 0) if part is None else part.up for part in parts]
    return Factors(torch.cat([part.down for part in there]), torch.block_diag(*ups))


@torch.no_grad()
def apply_lora(mmdit: MMDiT, path: str | Path, strength: float = 1.0) -> None:
    """Add a LoRA file, times `strength`, to the transformer's weights; several may follow each other. Raises WeightsError."""
    for name, (down, up) in read_lora(path, mmdit).items():
        weight = mmdit.get_parameter(f"{name}.weight")
        change = strength * up.to(weight.device) @ down.to(weight.device)
        weight.copy_(weight.float() + change)
