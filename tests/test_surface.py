"""The public surface: names that notebooks, courses and other people's code lean on, with their parameters and defaults.

A function may gain keyword-only parameters; nothing here may be renamed, reordered or given another default.
"""

import inspect
import subprocess
import sys
from dataclasses import MISSING, fields
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

import pytest

import minisd3

FUNCTIONS = {
    "load": 'name_or_path="tiny", *, controlnet=None, text_encoders=None, device=None, dtype=None',
    "SD3.generate": 'self, prompt, *, negative="", size=None, seed=0, steps=None, cfg=None, slg=None, sampler=None, shift=None, image=None, '
    "strength=0.8, mask=None, control=None, control_strength=1.0, progress=True, callback=None",
    "SD3.encode_prompt": 'self, prompt, negative=""',
    "SD3.sample": "self, x, cond, uncond=None, *, steps=None, cfg=None, slg=None, sampler=None, shift=None",
    "vae.VAE.encode": "self, image",
    "vae.VAE.sample": "self, mean, logvar, generator=None",
    "vae.VAE.decode": "self, latent",
    "vae.VAE.normalize": "self, latent",
    "vae.VAE.denormalize": "self, latent",
    "mmdit.MMDiT.forward": "self, x, t, context, pooled, *, control=None, skip_layers=()",
    "controlnet.ControlNet.forward": "self, mmdit, x, hint, t, pooled",
    "flow.sd3_schedule": "steps, shift=3.0",
    "flow.uniform_schedule": "steps, shift=1.0",
    "flow.shift_time": "t, shift",
    "flow.interpolate": "x0, noise, t",
    "flow.logit_normal": "n, mean=0.0, std=1.0, generator=None",
    "guidance.conditional": "model, cond",
    "guidance.classifier_free": "model, cond, uncond, scale",
    "guidance.skip_layer": "model, cond, uncond, scale, slg, schedule",
    "sampling.euler": "velocity, x, schedule",
    "sampling.heun": "velocity, x, schedule",
    "sampling.dpmpp_2m": "velocity, x, schedule",
    "weights.load_mmdit": "path, *, device=None, dtype=None, **config",
    "weights.load_vae": "path, *, device=None, dtype=None, **config",
    "weights.load_controlnet": "path, *, device=None, dtype=None, **config",
    "introspect.AttentionRecorder": "model",
    "introspect.shape_table": "module, *inputs",
    "introspect.parameter_table": "module",
}
CLASSES = {
    "config.Preset": "mmdit, vae, text, controlnet, steps, cfg, sampler, shift, slg, size",
    "config.SkipLayers": "layers, scale, start, end",
    "types.Conditioning": "context, pooled",
    "SD3": "preset, mmdit, vae, text",
}
MMDIT_CONFIG = {
    "depth": 24, "head_dim": 64, "patch_size": 2, "in_channels": 16, "pos_embed_max_size": 192, "context_dim": 4096, "pooled_dim": 2048,
    "mlp_ratio": 4, "qk_norm": None, "dual_attention_layers": (), "block_norm": "layer", "mlp": "gelu", "scale_mod_only": False,
    "registers": 0, "dual_attention_dropout": 0.0,
}  # fmt: skip


def found(name: str) -> Any:
    """minisd3.load of "load", minisd3.vae.VAE.encode of "vae.VAE.encode"."""
    first, *rest = name.split(".")
    thing = getattr(minisd3, first) if first in minisd3.__all__ else import_module(f"minisd3.{first}")
    for part in rest:
        thing = getattr(thing, part)
    return thing


def kinds(of: inspect.Signature, *which: Any) -> list[tuple[str, Any]]:
    return [(p.name, p.default) for p in of.parameters.values() if p.kind in which]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_what_they_are_said_to_take(name: str) -> None:
    real, said = signature(found(name)), signature(eval(f"lambda {FUNCTIONS[name]}: None"))
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    assert kinds(real, *positional) == kinds(said, *positional)
    assert set(kinds(said, Parameter.KEYWORD_ONLY)) <= set(kinds(real, Parameter.KEYWORD_ONLY))
    starred = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    assert set(kinds(said, *starred)) <= set(kinds(real, *starred))


@pytest.mark.parametrize("name", CLASSES)
def test_classes_have_the_fields_they_are_said_to_have(name: str) -> None:
    cls = found(name)
    names = list(cls._fields) if hasattr(cls, "_fields") else [field.name for field in fields(cls)]
    assert [one for one in names if one in CLASSES[name].split(", ")] == CLASSES[name].split(", ")


def test_the_transformer_s_config() -> None:
    from minisd3.config import MMDiTConfig

    assert {f.name: f.default for f in fields(MMDiTConfig)} == MMDIT_CONFIG
    assert all(f.default_factory is MISSING for f in fields(MMDiTConfig))
    assert (MMDiTConfig(depth=38).hidden_size, MMDiTConfig(depth=38).num_heads) == (2432, 38)


def test_the_presets() -> None:
    assert list(minisd3.PRESETS) == ["tiny", "sd3-medium", "sd3.5-medium", "sd3.5-large", "sd3.5-large-turbo"]
    sampled = {name: (p.sampler, p.steps, p.cfg, p.shift, p.size) for name, p in minisd3.PRESETS.items() if name != "tiny"}
    assert sampled == {
        "sd3-medium": ("euler", 28, 5.0, 3.0, (1024, 1024)),
        "sd3.5-medium": ("dpmpp_2m", 50, 5.0, 3.0, (1024, 1024)),
        "sd3.5-large": ("dpmpp_2m", 40, 4.5, 3.0, (1024, 1024)),
        "sd3.5-large-turbo": ("euler", 4, 1.0, 3.0, (1024, 1024)),
    }
    assert minisd3.PRESETS["sd3.5-medium"].slg == minisd3.SkipLayers((7, 8, 9), 2.5, 0.01, 0.20)


def test_models_are_made_from_a_config_alone() -> None:
    import torch

    from minisd3.controlnet import ControlNet
    from minisd3.mmdit import MMDiT
    from minisd3.vae import VAE

    tiny = minisd3.PRESETS["tiny"]
    made: list[tuple[Any, Any]] = [(VAE, tiny.vae), (MMDiT, tiny.mmdit), (ControlNet, tiny.controlnet)]
    with torch.device("meta"):
        for cls, config in made:
            assert cls(config).config is config


def test_public_names_are_there_and_no_others() -> None:
    assert set(minisd3.__all__) <= set(dir(minisd3))
    for name in minisd3.__all__:
        assert getattr(minisd3, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'generate'; its parts are modules"):
        _ = minisd3.generate


def test_importing_the_package_takes_nothing_heavy() -> None:
    words = "import sys, minisd3; assert minisd3.PRESETS; print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_command_is_there() -> None:
    shown = subprocess.run([sys.executable, "-m", "minisd3", "--help"], capture_output=True, text=True, check=True).stdout
    for command in ("generate", "train", "evaluate", "inspect", "models"):
        assert f"    {command}" in shown
