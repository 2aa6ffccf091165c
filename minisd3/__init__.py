"""minisd3: Stable Diffusion 3 and 3.5 in compact PyTorch, with a small family of models that runs anywhere.

    import minisd3
    minisd3.load().generate("a red house beside a tree")[0]

The parts are modules: minisd3.vae, mmdit, text, flow, guidance, sampling, controlnet, weights, introspect, training, evaluate.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minisd3.config import PRESETS, Preset, SkipLayers

if TYPE_CHECKING:
    from minisd3.pipeline import SD3, load
    from minisd3.text import Prompts

__all__ = ["PRESETS", "SD3", "Preset", "Prompts", "SkipLayers", "load"]

_HOME = {"load": "pipeline", "SD3": "pipeline", "Prompts": "text"}  # fetched when asked for: `transformers` takes seconds to import


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'minisd3' has no attribute {name!r}; its parts are modules: import minisd3.{name}")
    return getattr(import_module(f"minisd3.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
