"""ControlNet: a second network reads a hint (edges, a blurred picture, depth) and adds to what the base's blocks make of the picture.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models", in the shape of Stability AI's ControlNets for
SD3.5 (dit_embedder.py: ControlNetEmbedder): blocks that see the picture's tokens only, each followed by a linear map that starts
at zero, whose outputs, the residuals, are added to the picture's stream in the base. Attribute names are those of the released files.

A hint is a picture (B 3 H W) in [-1, 1] like any other; `canny`, `blur` and `depth` make hints. It travels as the VAE's latent of it.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from minisd3.config import ControlNetConfig, MMDiTConfig, require
from minisd3.mmdit import Block, MMDiT, PatchEmbed, initialize, timestep_embedding
from minisd3.vae import VAE

# --- the network ------------------------------------------------------------------------------------------------------------------


class BasePatches(nn.Module):
    """Form "8b": takes the base's tokens, positions included, and the pooled text; each block goes on from the one before.

    Has no weights, so the released files hold nothing under its name.
    """

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size

    def tokens(self, mmdit: MMDiT, x: Tensor) -> Tensor:
        positions = mmdit.cropped_positions(*(side // self.patch_size for side in x.shape[2:]))  # (1 L D)
        return mmdit.x_embedder(x) + positions.to(x)  # (B L D)

    def text(self, mmdit: MMDiT, pooled: Tensor) -> Tensor:
        return pooled

    def states(self, blocks: nn.ModuleList, x: Tensor, c: Tensor) -> Iterator[Tensor]:
        for block in blocks:
            x = block(x, c)
            yield x


class OwnPatches(PatchEmbed):
    """Form "2b": cuts patches of its own, without positions, and takes the text that the base has embedded; every block reads the same."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config.patch_size, config.in_channels, config.hidden_size)

    def tokens(self, mmdit: MMDiT, x: Tensor) -> Tensor:
        return self(x)  # (B L D)

    def text(self, mmdit: MMDiT, pooled: Tensor) -> Tensor:
        return mmdit.y_embedder(pooled)  # (B D)

    def states(self, blocks: nn.ModuleList, x: Tensor, c: Tensor) -> Iterator[Tensor]:
        return (block(x, c) for block in blocks)


class Embedder(nn.Module):
    """mmdit.VectorEmbedder under the names of the ControlNets' files: (B P) -> (B D)."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class TimeTextEmbed(nn.Module):
    """Time (B,) in [0, 1] and text (B P) -> the vector (B D) that every block's modulation reads."""

    def __init__(self, pooled_dim: int, width: int) -> None:
        super().__init__()
        self.timestep_embedder = Embedder(256, width)
        self.text_embedder = Embedder(pooled_dim, width)

    def forward(self, t: Tensor, text: Tensor) -> Tensor:
        return self.timestep_embedder(timestep_embedding(t)) + self.text_embedder(text)


# what the number in a file's `control_type` says of its hints; the first three are the released ones, 3 is this package's own
KINDS = ("blur", "canny", "depth", "canny")
RELEASED_CANNY, PLAIN_CANNY = 1, 3


class ControlNet(nn.Module):
    """Noisy latents, hint, time and pooled text -> residuals for its base. See ControlNetConfig for the two forms.

    A new one changes nothing: the maps after the blocks are zero, and so is the one that lets the hint in.
    """

    control_type: Tensor | None  # int32 (1,), an index of KINDS; None in form "2b", whose files do not say

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        block = MMDiTConfig(config.num_heads, config.head_dim, mlp_ratio=config.mlp_ratio)  # as wide, and without QK norm
        self.pos_embed: BasePatches | OwnPatches = (BasePatches if config.form == "8b" else OwnPatches)(config)
        self.pos_embed_input = PatchEmbed(config.patch_size, config.in_channels, width)
        self.time_text_embed = TimeTextEmbed(config.pooled_dim, width)
        self.transformer_blocks = nn.ModuleList(Block(block) for _ in range(config.depth))
        self.controlnet_blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(config.depth))
        self.register_buffer("control_type", torch.zeros(1, dtype=torch.int32) if config.form == "8b" else None)
        initialize(self)
        for silent in (*self.pos_embed_input.parameters(), *self.controlnet_blocks.parameters()):
            nn.init.zeros_(silent)

    @classmethod
    def from_base(cls, mmdit: MMDiT, config: ControlNetConfig, kind: str) -> "ControlNet":
        """A ControlNet to be trained: copies of the base's first picture blocks and of its embedders (Zhang et al. 2023, section 3.1).

        What the ControlNet has no place for stays behind: QK norms, and of a dual-attention block the second attention with its 3
        modulations. In form "2b" the text embedder, which reads what the base has embedded, begins anew.
        kind: "blur", "canny" (edges in [-1, 1]) or "depth". Raises ValueError if config and base do not fit.
        """
        require(kind in KINDS, f"kind is {kind!r}; choose 'blur', 'canny' or 'depth'")
        check_fit(config, mmdit.config)
        net = cls(config).to(mmdit.context_embedder.weight)
        _copy(mmdit.t_embedder, net.time_text_embed.timestep_embedder)
        if isinstance(net.pos_embed, OwnPatches):
            _copy(mmdit.x_embedder, net.pos_embed)
        else:
            _copy(mmdit.y_embedder, net.time_text_embed.text_embedder)
        for joint, block in zip(mmdit.joint_blocks, net.transformer_blocks, strict=False):
            _copy_block(joint, block)
        if net.control_type is not None:
            net.control_type.fill_(PLAIN_CANNY if kind == "canny" else KINDS.index(kind))
        return net

    @property
    def kind(self) -> str | None:
        """ "blur", "canny" or "depth": the hints it was trained on, as far as its file says."""
        return None if self.control_type is None else KINDS[int(self.control_type)]

    def encode_hint(self, vae: VAE, hint: Tensor, generator: Generator | None = None) -> Tensor:
        """A hint (B 3 H W) in [-1, 1] -> what `forward` takes (B C H/8 W/8), normalised: the mean, or with a generator a sample.

        The released code samples, unseeded. It also hands pictures of edges to the VAE as x * 255 * 0.5 + 0.5 for x in [0, 1], far
        outside of what a VAE knows, so that is what the released canny files were used with (sd3_infer.py: vae_encode).
        """
        if self.control_type is not None and int(self.control_type) == RELEASED_CANNY:
            hint = (hint + 1) / 2 * 255 * 0.5 + 0.5
        mean, logvar = vae.encode(hint)
        return vae.normalize(mean if generator is None else vae.sample(mean, logvar, generator))

    def forward(self, mmdit: MMDiT, x: Tensor, hint: Tensor, t: Tensor, pooled: Tensor) -> list[Tensor]:
        """The residuals (B L D), one a block; `mmdit(..., control=residuals)` adds each to base.depth / depth blocks in a row.

        mmdit: the base; x (B C H W), t (B,) or scalar, and pooled (B P) are those it is called with
        hint (b C H W): from `encode_hint`, of the latents' size; repeated as guidance repeats the batch, so B is a multiple of b
        """
        require(
            hint.shape[1:] == x.shape[1:] and len(x) % len(hint) == 0,
            f"the hint is {tuple(hint.shape)} and the latents are {tuple(x.shape)}; make it from a picture of the size that is drawn",
        )
        like = self.pos_embed_input.proj.weight
        x, t = x.to(like.dtype), torch.as_tensor(t, device=x.device).expand(len(x))
        seen = self.pos_embed_input(hint.to(like)).repeat(len(x) // len(hint), 1, 1)  # (B L D), and no positions
        tokens = self.pos_embed.tokens(mmdit, x) + seen
        c = self.time_text_embed(t, self.pos_embed.text(mmdit, pooled))  # (B D)
        states = self.pos_embed.states(self.transformer_blocks, tokens, c)
        return [linear(state) for linear, state in zip(self.controlnet_blocks, states, strict=True)]


def _copy(source: nn.Module, target: nn.Module) -> None:
    """Weights of a module with the same parts in the same order."""
    target.load_state_dict(dict(zip(target.state_dict(), source.state_dict().values(), strict=True)))


@torch.no_grad()
def _copy_block(joint: nn.Module, target: nn.Module) -> None:
    """What the picture's side of a joint block and a ControlNet's block both have; of 9 modulations the first 6."""
    weights = dict(joint.named_parameters())
    for name, own in target.named_parameters():
        weight = weights.get(f"x_block.{name}", own)[: len(own)]
        if weight.shape == own.shape:
            own.copy_(weight)


def check_fit(config: ControlNetConfig, base: MMDiTConfig) -> None:
    """Raise ValueError with all that keeps a ControlNet from working with this base, if anything does."""
    text = base.pooled_dim if config.form == "8b" else base.hidden_size
    pairs = {
        "width": (config.hidden_size, base.hidden_size),
        "patch size": (config.patch_size, base.patch_size),
        "latent channels": (config.in_channels, base.in_channels),
        "text vector": (config.pooled_dim, text),
    }
    wrong = [f"{what} {own} where the base has {its}" for what, (own, its) in pairs.items() if own != its]
    if base.depth % config.depth:
        wrong.append(f"{config.depth} blocks, which do not divide the base's {base.depth} evenly")
    require(not wrong, f"this ControlNet does not fit its base: it has {'; '.join(wrong)}. Load the base that it was trained for")


# --- the base under control -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Control:
    """One ControlNet with its hint, how strongly it acts, and during which part of the steps."""

    net: ControlNet
    hint: Tensor  # (b C H W), from net.encode_hint
    strength: float = 1.0  # its residuals are multiplied by this; the released code knows only 1
    start: float = 0.0  # fractions of all steps; step i of n (from 0) is controlled if start <= i / n and (i + 1) / n <= end
    end: float = 1.0

    def __post_init__(self) -> None:
        require(0 <= self.start < self.end <= 1, f"Control: start {self.start} and end {self.end} must satisfy 0 <= start < end <= 1")

    def window(self, schedule: Tensor | None) -> tuple[float, float]:
        """The first and last times at which it acts, as (low, high); low > high if no step lies within start and end."""
        if (self.start, self.end) == (0, 1):
            return 0.0, 1.0
        if schedule is None:
            raise ValueError(f"a control from {self.start} to {self.end} of the steps needs the schedule; give it to controlled()")
        steps = len(schedule) - 1
        times = [float(t) for i, t in enumerate(schedule[:-1]) if self.start <= i / steps and (i + 1) / steps <= self.end]
        return min(times, default=1.0), max(times, default=0.0)


def controlled(mmdit: MMDiT, controls: Sequence[Control], schedule: Tensor | None = None) -> "Controlled":
    """The base with these ControlNets at work, for guidance to call in the base's place.

    schedule: all times of the sampling, also when it starts in their middle; needed where a control has a start or end.
    Raises ValueError for a ControlNet that does not fit the base.
    """
    dtype = mmdit.context_embedder.weight.dtype
    for control in controls:
        check_fit(control.net.config, mmdit.config)
        own = control.net.pos_embed_input.proj.weight.dtype
        require(own == dtype, f"the ControlNet is in {own} and its base in {dtype}; bring both to one with .to(...)")
    return Controlled(mmdit, controls, [control.window(schedule) for control in controls])


class Controlled:
    """Called like MMDiT; made by `controlled`. The residuals of several ControlNets are added up."""

    def __init__(self, mmdit: MMDiT, controls: Sequence[Control], windows: Sequence[tuple[float, float]]) -> None:
        self.mmdit, self.controls, self.windows = mmdit, controls, windows

    def __call__(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, *, skip_layers: Collection[int] = ()) -> Tensor:
        """As MMDiT.forward. A skipped block takes no residual either."""
        return self.mmdit(x, t, context, pooled, control=self.residuals(x, t, pooled), skip_layers=skip_layers)

    def forward_branched(
        self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, *, skip_layers: Collection[int], rows: int
    ) -> tuple[Tensor, Tensor]:
        """As MMDiT.forward_branched. The copies without skip_layers go without control too (sd3_impls.py: SkipLayerCFGDenoiser)."""
        control = self.residuals(x, t, pooled)
        return self.mmdit.forward_branched(x, t, context, pooled, skip_layers=skip_layers, rows=rows, control=control)

    def residuals(self, x: Tensor, t: Tensor, pooled: Tensor) -> list[Tensor] | None:
        """What all ControlNets at work at time t add, (B L D) each; None if there are none."""
        now = float(t.max())
        made = [
            [control.strength * residual for residual in control.net(self.mmdit, x, control.hint, t, pooled)]
            for control, (low, high) in zip(self.controls, self.windows, strict=True)
            if control.strength != 0 and low <= now <= high
        ]
        if not made:
            return None
        n = math.lcm(*map(len, made))  # nets of different depths: repeat their residuals until they are equally many
        return [reduce(torch.add, (residuals[i * len(residuals) // n] for residuals in made)) for i in range(n)]


# --- hints from pictures ----------------------------------------------------------------------------------------------------------


def blur(image: Tensor, sigma: float | None = None) -> Tensor:
    """image (B 3 H W) in [-1, 1], blurred by a Gaussian of deviation `sigma` in pixels; if not given, 1/32 of the shorter side."""
    sigma = min(image.shape[2:]) / 32 if sigma is None else sigma
    require(sigma > 0, f"blur's sigma is {sigma}; it must be positive")
    reach = math.ceil(3 * sigma)
    bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=image.dtype, device=image.device) / sigma) ** 2)
    return _filter(image, bell / bell.sum(), bell / bell.sum())


def depth(nearness: Tensor) -> Tensor:
    """How near each pixel is, (B 1 H W) in [0, 1] with 1 the nearest, -> a hint (B 3 H W). Scene.depth gives it exactly."""
    require(nearness.ndim == 4 and nearness.shape[1] == 1, f"depth takes (B 1 H W), not {tuple(nearness.shape)}")
    return (2 * nearness - 1).expand(-1, 3, -1, -1)


def canny(image: Tensor, low: float = 100, high: float = 200, sigma: float = 0) -> Tensor:
    """The edges of image (B 3 H W) in [-1, 1], one pixel thin: (B 3 H W), 1 on edges and -1 elsewhere (Canny 1986).

    low, high: an edge begins where the slope |dx| + |dy| is above `high` and goes on while it is above `low`, dx and dy being
        Sobel's of grey levels from 0 to 255: the units of OpenCV's Canny, whose output this equals
    sigma: blur by so many pixels first, against noise
    """
    require(0 <= low <= high, f"canny's thresholds are low {low} and high {high}; 0 <= low <= high is needed")
    image = blur(image, sigma) if sigma else image
    levels = ((image.clamp(-1, 1) + 1) * 127.5).round()
    grey = (levels * levels.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True).round()  # (B 1 H W)
    smooth, slope = grey.new_tensor([1, 2, 1]), grey.new_tensor([-1, 0, 1])
    dx, dy = _filter(grey, smooth, slope), _filter(grey, slope, smooth)  # (B 1 H W)
    size = dx.abs() + dy.abs()
    candidates = _ridge(size, dx, dy) & (size > low)
    edges = _connected(candidates, candidates & (size > high))
    return (2 * edges.to(image) - 1).expand(-1, 3, -1, -1)


# which hints can be made of any picture; depth has to be known
HINTS: dict[str, Callable[[Tensor], Tensor]] = {"blur": blur, "canny": canny}


def _filter(image: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """image (B C H W) under two odd lines of weights, edge pixels repeated outwards."""
    channels, a, b = image.shape[1], len(down), len(across)
    padded = F.pad(image, (b // 2, b // 2, a // 2, a // 2), mode="replicate")
    padded = F.conv2d(padded, down.view(1, 1, a, 1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(padded, across.view(1, 1, 1, b).expand(channels, -1, -1, -1), groups=channels)


def _ridge(size: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Where the slope is larger than at the two neighbours up and down the slope, in the nearest of four directions: (B 1 H W)."""
    h, w = size.shape[2:]
    padded = F.pad(size, (1, 1, 1, 1))

    def neighbour(down: int, right: int) -> Tensor:
        return padded[:, :, 1 + down : 1 + down + h, 1 + right : 1 + right + w]

    tangent = math.tan(math.pi / 8)
    flat, steep = dy.abs() < tangent * dx.abs(), dx.abs() < tangent * dy.abs()
    falling = dx * dy >= 0  # the slope runs from the upper left to the lower right
    diagonal = torch.where(falling, neighbour(-1, -1), neighbour(-1, 1)), torch.where(falling, neighbour(1, 1), neighbour(1, -1))
    before = torch.where(flat, neighbour(0, -1), torch.where(steep, neighbour(-1, 0), diagonal[0]))
    after = torch.where(flat, neighbour(0, 1), torch.where(steep, neighbour(1, 0), diagonal[1]))
    return (size > before) & torch.where(flat | steep, size >= after, size > after)  # of two equal neighbours, one


def _connected(candidates: Tensor, edges: Tensor) -> Tensor:
    """The candidates that a chain of candidates, corner to corner, connects to an edge: bool (B 1 H W)."""
    while True:
        grown = (F.max_pool2d(edges.float(), 3, stride=1, padding=1) > 0) & candidates
        if torch.equal(grown, edges):
            return edges
        edges = grown
