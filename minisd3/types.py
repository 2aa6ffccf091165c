"""The two shapes of things that travel between the parts: what a prompt becomes, and what a sampler integrates."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Conditioning(NamedTuple):
    """What the text encoders make of a prompt, and all that the transformer sees of it."""

    context: Tensor  # (B L D): one vector a token, CLIP's tokens first, then T5's; read by attention
    pooled: Tensor  # (B P): one vector a prompt, CLIP-L then CLIP-G; read by every modulation


# velocity(x, t) -> v, like x: x (B C H W) latents, t in [0, 1] a scalar tensor or (B,). Guidance makes it, a sampler integrates it.
Velocity = Callable[[Tensor, Tensor], Tensor]
