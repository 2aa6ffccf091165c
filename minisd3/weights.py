"""Models from files and back: load_mmdit, load_vae, load_controlnet; detect and describe; save_released, save_diffusers.

A model is built on the meta device, where it takes no memory, from the config that the file's own header implies; then its tensors are
read one by one and assigned, with every name and shape accounted for. `formats` knows the files and their two layouts.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from math import isqrt, prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from minisd3 import formats
from minisd3.config import PRESETS, ControlNetConfig, MMDiTConfig, VAEConfig, require
from minisd3.controlnet import KINDS, ControlNet
from minisd3.formats import Layout, Part, WeightsError, find_parts, read_header
from minisd3.mmdit import MMDiT
from minisd3.vae import VAE

Shapes = Mapping[str, tuple[int, ...]]
Config = MMDiTConfig | VAEConfig | ControlNetConfig
Model = TypeVar("Model", MMDiT, VAE, ControlNet)
Device = torch.device | str | None

# --- what the shapes say ----------------------------------------------------------------------------------------------------------


def _side(shapes: Shapes, name: str, axis: int) -> int:
    """How long a tensor is along one axis."""
    shape = shapes.get(name, ())
    require(axis < len(shape) and shape[axis] > 0, f"{name}, which tells its config, is {shape or 'missing'}; fetch the file again")
    return shape[axis]


def _count(shapes: Shapes, before: str) -> int:
    """How many blocks there are: one more than the highest number that follows `before`."""
    found = (re.match(re.escape(before) + r"(\d+)\.", name) for name in shapes)
    return max((1 + int(match[1]) for match in found if match), default=1)


def _mmdit_config(shapes: Shapes, given: dict[str, Any]) -> MMDiTConfig:
    side = partial(_side, shapes)
    width, depth = side("x_embedder.proj.weight", 0), _count(shapes, "joint_blocks.")
    nearest = min(PRESETS, key=lambda name: abs(PRESETS[name].mmdit.hidden_size - width))
    require(width % depth == 0, f"{depth} blocks do not go with a width of {width}; blocks are missing if this is to be {nearest}")
    block = "joint_blocks.0.x_block"
    gated = f"{block}.mlp.w1.weight" in shapes
    found = {
        "depth": depth,
        "head_dim": width // depth,
        "patch_size": side("x_embedder.proj.weight", 2),
        "in_channels": side("x_embedder.proj.weight", 1),
        "pos_embed_max_size": isqrt(side("pos_embed", 1)),
        "context_dim": side("context_embedder.weight", 1),
        "pooled_dim": side("y_embedder.mlp.0.weight", 1),
        "mlp": "swiglu" if gated else "gelu",
        "mlp_ratio": (side(f"{block}.mlp.w1.weight", 0) * 3 / 2 if gated else side(f"{block}.mlp.fc1.weight", 0)) / width,
        "qk_norm": "layer" if f"{block}.attn.ln_q.bias" in shapes else "rms" if f"{block}.attn.ln_q.weight" in shapes else None,
        "dual_attention_layers": tuple(i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes),
        "scale_mod_only": side(f"{block}.adaLN_modulation.1.weight", 0) == 4 * width,
        "registers": side("register", 1) if "register" in shapes else 0,
    }
    return MMDiTConfig(**{**found, **given})


def _vae_config(shapes: Shapes, given: dict[str, Any]) -> VAEConfig:
    side = partial(_side, shapes)
    width = side("encoder.conv_in.weight", 0)
    levels = [side(f"encoder.down.{i}.block.0.conv1.weight", 0) for i in range(_count(shapes, "encoder.down."))]
    require(all(n % width == 0 for n in levels), f"levels of {levels} channels are no multiples of the first layer's {width}")
    found = {
        "width": width,
        "multipliers": tuple(n // width for n in levels),
        "latent_channels": side("decoder.conv_in.weight", 1),
        "blocks": _count(shapes, "encoder.down.0.block."),
    }
    return VAEConfig(**{**found, **given})


def _controlnet_config(shapes: Shapes, given: dict[str, Any]) -> ControlNetConfig:
    side = partial(_side, shapes)
    width = side("pos_embed_input.proj.weight", 0)
    found = {
        "depth": _count(shapes, "transformer_blocks."),
        "num_heads": width // given.get("head_dim", ControlNetConfig.head_dim),
        "patch_size": side("pos_embed_input.proj.weight", 2),
        "in_channels": side("pos_embed_input.proj.weight", 1),
        "pooled_dim": side("time_text_embed.text_embedder.linear_1.weight", 1),
        "form": "2b" if "pos_embed.proj.weight" in shapes else "8b",
        "mlp_ratio": side("transformer_blocks.0.mlp.fc1.weight", 0) / width,
    }
    return ControlNetConfig(**{**found, **given})


@dataclass(frozen=True)
class _Kind:
    """What differs between the three kinds of model in how they are kept."""

    name: str
    folder: str  # in a diffusers pipeline
    config: Callable[[Shapes, dict[str, Any]], Any]
    traceless: tuple[str, ...]  # fields that no shape tells: kept in the file's metadata
    loader: str


_KINDS: dict[type, _Kind] = {
    MMDiT: _Kind("transformer", "transformer", _mmdit_config, ("block_norm", "dual_attention_dropout", "mlp_ratio"), "load_mmdit"),
    VAE: _Kind("VAE", "vae", _vae_config, ("groups", "scale", "shift"), "load_vae"),
    ControlNet: _Kind("ControlNet", "controlnet", _controlnet_config, ("head_dim",), "load_controlnet"),
}
_BY_NAME = {kind.name: kind for kind in _KINDS.values()}


def _noted(path: Path, part: Part) -> dict[str, Any]:
    """The fields that leave no trace in shapes, from our metadata or from the config.json beside weights in diffusers' layout."""
    noted = json.loads(formats.read_metadata(path).get(f"minisd3.{part.kind}", "{}"))
    beside = (path if path.is_dir() else path.parent) / "config.json"
    if part.layout == "diffusers" and beside.is_file():
        theirs = formats.read_json(beside)
        words = {"norm_num_groups": "groups", "scaling_factor": "scale", "shift_factor": "shift", "attention_head_dim": "head_dim"}
        read = {ours: theirs[word] for word, ours in words.items() if ours in _BY_NAME[part.kind].traceless and word in theirs}
        noted = read | noted
    return noted


def _config(path: Path, part: Part, given: Mapping[str, Any]) -> Any:
    """The config that the shapes imply, what leaves no trace filled in, what is given in place of what was read."""
    kind = _BY_NAME[part.kind]
    try:
        noted = _noted(path, part)
        return kind.config(part.shapes, {name: noted[name] for name in kind.traceless if name in noted} | dict(given))
    except ValueError as error:
        raise WeightsError(f"{path} looks like a {part.kind}, but {error}") from None


# --- loading ----------------------------------------------------------------------------------------------------------------------


def load_mmdit(path: str | Path, *, device: Device = None, dtype: torch.dtype | None = None, **config: Any) -> MMDiT:
    """The transformer in a released single file, in a folder in diffusers' layout, or in a whole pipeline's folder; in eval mode.

    dtype None keeps the file's (that of most of its numbers; fp8 becomes bf16). Fields of MMDiTConfig given by name override what
    the header says; block_norm and dual_attention_dropout leave no trace in it. Raises WeightsError.
    """
    return _build(MMDiT, *_find(Path(path), MMDiT), device, dtype, config, {})


def load_vae(path: str | Path, *, device: Device = None, dtype: torch.dtype | None = None, **config: Any) -> VAE:
    """The autoencoder, as load_mmdit loads the transformer. groups, scale and shift leave no trace in shapes (see VAEConfig)."""
    return _build(VAE, *_find(Path(path), VAE), device, dtype, config, {})


def load_controlnet(
    path: str | Path, *, device: Device = None, dtype: torch.dtype | None = None, control_type: int | None = None, **config: Any
) -> ControlNet:
    """A ControlNet, as load_mmdit loads the transformer. head_dim leaves no trace (64 in every released one).

    control_type: 0 blur, 1 canny, 2 depth; only needed where neither the file says so, as in diffusers' layout, nor its name or a
        folder near it has one of these words in it, as the released ids on the hub have.
    """
    file, part = _find(Path(path), ControlNet)
    used = {name: source for name, source in part.sources.items() if not name.startswith("context_embedder.")}  # read by nothing
    if control_type is None and not used.keys() & {"control_type", "pos_embed.proj.weight"}:  # form 2b has no control_type
        near = reversed(file.parts[-4:])  # the file first; three folders above it the hub's cache has the id
        named = (number for place in near for number, kind in enumerate(KINDS[:3]) if kind in place.lower())
        control_type = _noted(file, part).get("control_type", next(named, None))
        if control_type is None:
            choices = ", ".join(f"{number} ({name})" for number, name in enumerate(KINDS[:3]))
            raise WeightsError(f"{file} does not say which hints its ControlNet takes; have blur, canny or depth in its folder's name, "
                               f"or pass load_controlnet control_type: {choices}")  # fmt: skip
    extra = {} if control_type is None else {"control_type": torch.tensor([control_type], dtype=torch.int32, device=device)}
    part = replace(part, sources={name: source for name, source in used.items() if name not in extra})
    return _build(ControlNet, file, part, device, dtype, config, extra)


def _build(
    cls: type[Model],
    path: Path,
    part: Part,
    device: Device,
    dtype: torch.dtype | None,
    given: dict[str, Any],
    extra: dict[str, Tensor],
) -> Model:
    """The model of this part, with `extra` tensors that the part lacks."""
    config = _config(path, part, given)
    with torch.device("meta"):
        model = cls(config)
    found = part.shapes | {name: tuple(t.shape) for name, t in extra.items()}
    if wrong := formats.compare(found, {name: tuple(t.shape) for name, t in model.state_dict().items()}):
        near = _nearest(config)
        raise WeightsError(f"{path} is not a whole {part.kind} (nearest preset {near}): {wrong}; fetch it again")
    tensors = dict(part.read(device=device, dtype=dtype or _main_dtype(part)))
    model.load_state_dict(tensors | extra, strict=True, assign=True)
    return model.eval()


def _find(path: Path, cls: type) -> tuple[Path, Part]:
    """The part of this kind, and the folder or file it is in."""
    kind = _KINDS[cls]
    path = path / kind.folder if (path / kind.folder).is_dir() else path
    parts = find_parts(read_header(path))
    for part in parts:
        if part.kind == kind.name:
            return path, part
    looks = formats.some(f"a {part.kind}" for part in parts)
    others = [_BY_NAME[part.kind].loader for part in parts if part.kind in _BY_NAME]
    todo = f"load that with {formats.some(others)}" if others else f"{kind.loader} takes SD3 or SD3.5 weights"
    raise WeightsError(f"{path} holds no {kind.name}; it looks like {looks or 'an empty file'}: {todo}")


def _main_dtype(part: Part) -> torch.dtype:
    """The floating-point type that most of the numbers are stored in; fp8, in which nothing is computed, becomes bf16."""
    counts: dict[torch.dtype, int] = {}
    for entry in part.header.values():
        counts[formats.DTYPES[entry.dtype]] = counts.get(formats.DTYPES[entry.dtype], 0) + prod(entry.shape)
    main = max((dtype for dtype in counts if dtype.is_floating_point), key=lambda dtype: counts[dtype], default=torch.float32)
    return main if main.itemsize > 1 else torch.bfloat16


# --- telling ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Detected:
    """One model found in a checkpoint."""

    kind: str  # "transformer", "VAE", "ControlNet", or in words what else it is
    layout: Layout | None
    config: Config | None  # None for what this package does not build itself
    presets: tuple[str, ...]  # that have exactly this config
    parameters: int
    dtypes: tuple[str, ...]
    trouble: str = ""  # why there is no config


def detect(path: str | Path) -> list[Detected]:
    """What a checkpoint holds, from its header alone: a released single file has a transformer and a VAE. Raises WeightsError."""
    path = Path(path)
    return [_detected(path, part) for part in find_parts(read_header(path))]


def _detected(path: Path, part: Part) -> Detected:
    kind, config, trouble = part.kind, None, ""
    presets: tuple[str, ...] = ()
    if kind in _BY_NAME:
        try:
            config = _config(path, part, {})
            presets = _presets(config)
        except WeightsError as error:
            trouble = str(error)
    elif kind.endswith("text encoder"):
        kind, presets = _tower(part)
    parameters = sum(prod(shape) for name, shape in part.shapes.items() if name not in ("pos_embed", "control_type"))
    dtypes = sorted({entry.dtype for entry in part.header.values()})
    return Detected(kind, part.layout, config, presets, parameters, tuple(dtypes), trouble)


def _tower(part: Part) -> tuple[str, tuple[str, ...]]:
    """Which text encoder this is, and the presets that use it: those with the same vocabulary and width."""
    sizes = {shape for name, shape in part.shapes.items() if name.endswith(("token_embedding.weight", "shared.weight"))}
    for tower in ("clip_l", "clip_g", "t5"):
        configs = {name: getattr(preset.text, tower) for name, preset in PRESETS.items()}
        if names := tuple(name for name, config in configs.items() if (config.vocab, config.width) in sizes):
            return f"{part.kind} ({tower})", names
    return part.kind, ()


def _of_preset(config: Config, name: str) -> Config | None:
    preset = PRESETS[name]
    return next((c for c in (preset.mmdit, preset.vae, preset.controlnet) if type(c) is type(config)), None)


def _presets(config: Config) -> tuple[str, ...]:
    return tuple(name for name in PRESETS if _of_preset(config, name) == config)


def _nearest(config: Config) -> str:
    """The preset with the most fields in common."""
    return max(
        (name for name in PRESETS if _of_preset(config, name)),
        key=lambda name: sum(getattr(_of_preset(config, name), f.name) == getattr(config, f.name) for f in fields(config)),
    )


def describe(path: str | Path) -> str:
    """A few lines for people: what is this checkpoint?"""
    header = read_header(path)
    size = sum(file.stat().st_size for file in {entry.file for entry in header.values()})
    lines = [f"{path}: {len(header)} tensors, {size / 1e6:,.1f} MB"]
    for found in detect(path):
        layout = f", {found.layout} layout" if found.layout else ""
        lines.append(f"  a {found.kind}{layout}: {found.parameters:,} parameters in {', '.join(found.dtypes)}")
        if found.presets:
            lines.append(f"    as in {', '.join(found.presets)}")
        elif found.config:
            lines.append(f"    no preset; nearest {_nearest(found.config)}")
        lines += [f"    {text}" for text in (found.config, found.trouble) if text]
    return "\n".join(lines)


# --- saving -----------------------------------------------------------------------------------------------------------------------


def _tensors(model: MMDiT | VAE | ControlNet, dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {name: t.to("cpu", dtype if t.is_floating_point() else None) for name, t in model.state_dict().items()}


def _note(model: MMDiT | VAE | ControlNet) -> dict[str, str]:
    """Metadata: the fields that leave no trace in shapes or, in diffusers' layout, in names."""
    kind = _KINDS[type(model)]
    note: dict[str, Any] = {name: getattr(model.config, name) for name in kind.traceless}
    if isinstance(model, ControlNet) and model.control_type is not None:
        note["control_type"] = int(model.control_type)
    return {f"minisd3.{kind.name}": json.dumps(note)}


def save_released(
    path: str | Path, *models: MMDiT | VAE | ControlNet, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write models into one file under the released names: a transformer and a VAE together are the released single file.

    dtype (None: as they are) is for floating-point tensors. The file appears whole or not at all.
    """
    tensors = {formats.PREFIXES[_KINDS[type(m)].name] + name: t for m in models for name, t in _tensors(m, dtype).items()}
    notes = {key: note for m in models for key, note in _note(m).items()}
    formats.write(path, tensors, notes | dict(metadata or {}))


def save_diffusers(folder: str | Path, model: MMDiT | VAE | ControlNet, *, dtype: torch.dtype | None = None) -> None:
    """Write a folder that diffusers' from_pretrained reads: SD3Transformer2DModel, AutoencoderKL or SD3ControlNetModel."""
    config = _diffusers_config(model.config)
    tensors = _tensors(model, dtype)
    tensors.pop("control_type", None)  # diffusers has no place for it but the metadata
    tensors = formats.to_diffusers(_KINDS[type(model)].name, tensors)
    formats.write(Path(folder) / "diffusion_pytorch_model.safetensors", tensors, _note(model))
    (Path(folder) / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _diffusers_config(config: Config) -> dict[str, Any]:
    """config.json as diffusers writes it."""
    if isinstance(config, VAEConfig):
        return _diffusers_vae(config)
    shared = {
        "patch_size": config.patch_size, "in_channels": config.in_channels, "out_channels": config.in_channels,
        "num_layers": config.depth, "attention_head_dim": config.head_dim, "num_attention_heads": config.num_heads,
        "pooled_projection_dim": config.pooled_dim, "caption_projection_dim": config.hidden_size, "sample_size": _sample_size(config),
    }  # fmt: skip
    if isinstance(config, ControlNetConfig):
        plain = config.form == "8b" and config.mlp_ratio == 4
        require(plain, f"diffusers has no ControlNet like {config}; save it in the released layout")
        return shared | {
            "_class_name": "SD3ControlNetModel", "joint_attention_dim": None, "use_pos_embed": False, "pos_embed_type": None,
            "force_zeros_for_pooled_projection": False,
        }  # fmt: skip
    plain = config == replace(config, mlp="gelu", mlp_ratio=4, block_norm="layer", scale_mod_only=False, registers=0)
    require(plain, f"diffusers has no transformer like {config}; save it in the released layout")
    return shared | {
        "_class_name": "SD3Transformer2DModel", "joint_attention_dim": config.context_dim,
        "pos_embed_max_size": config.pos_embed_max_size, "dual_attention_layers": config.dual_attention_layers,
        "qk_norm": {None: None, "rms": "rms_norm", "layer": "layer_norm"}[config.qk_norm],
    }  # fmt: skip


def _diffusers_vae(config: VAEConfig) -> dict[str, Any]:
    require(
        config.multipliers[0] == 1,
        f"diffusers has no VAE whose first level is {config.multipliers[0]} times as wide as its first layer",
    )
    levels = len(config.multipliers)
    return {
        "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": config.latent_channels,
        "block_out_channels": [config.width * m for m in config.multipliers], "layers_per_block": config.blocks,
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": config.groups, "scaling_factor": config.scale, "shift_factor": config.shift,
        "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024,
    }  # fmt: skip


def _sample_size(config: MMDiTConfig | ControlNetConfig) -> int:
    """Latent cells a side of the pictures that diffusers draws by default: the preset's, or the released models' 128."""
    return next((PRESETS[name].size[0] // PRESETS[name].vae.factor for name in _presets(config)), 128)
