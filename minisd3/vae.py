"""The autoencoder: pictures (B 3 H W) in [-1, 1] <-> latents (B C H/8 W/8), where the transformer works.

A convolutional encoder halves the sides three times and predicts a mean and a log-variance for every latent cell; the decoder
mirrors it. Rombach et al. 2022, section 3.1; SD3 widens the latent from 4 to 16 channels (Esser et al. 2024, section 5.2.1).
Attribute names are those of the released files, under `first_stage_model.`; the released VAE has no quant convolutions.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from minisd3.attention import attention
from minisd3.config import VAEConfig, require


class ResnetBlock(nn.Module):
    """Two rounds of norm, SiLU, 3x3 convolution, around a shortcut. (B C H W) -> (B C' H W)"""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, eps=1e-6)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels_out, eps=1e-6)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        # the width of a level changes here, in its first block, and not in the resampling between levels
        self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # in one expression, so that nothing on the way has a name that keeps it in memory
        return self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x)))))) + self.nin_shortcut(x)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution, which is the same linear map in each cell, of cells in a row: (B L C) -> (B L C)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 1)

    def forward(self, cells: Tensor) -> Tensor:
        return F.linear(cells, self.weight.flatten(1), self.bias)


class AttnBlock(nn.Module):
    """Self-attention of one head between all cells of the coarsest level. (B C H W) -> the same"""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (Pointwise(channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        cells = self.norm(x).flatten(2).transpose(1, 2)  # (B L C): each cell's numbers side by side, else attention takes L x L memory
        h = self.proj_out(attention(*(part(cells)[:, :, None] for part in (self.q, self.k, self.v))))  # (B L 1 C) each -> (B L C)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """Halves the sides: a 3x3 convolution of stride 2 that pads on the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B C H/2 W/2)


class Upsample(nn.Module):
    """Doubles the sides: every cell four times, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B C 2H 2W)


class Middle(nn.Module):
    """The coarsest level: residual block, attention, residual block. (B C H W) -> the same"""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, and the resampling to the next one if there is one."""

    def __init__(self, channels_in: int, channels_out: int, blocks: int, groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *(ResnetBlock(channels_in if i == 0 else channels_out, channels_out, groups) for i in range(blocks))
        )


class DownLevel(Level):
    def __init__(self, channels_in: int, channels_out: int, blocks: int, groups: int, *, last: bool) -> None:
        super().__init__(channels_in, channels_out, blocks, groups)
        self.downsample = nn.Identity() if last else Downsample(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.block(x))


class UpLevel(Level):
    def __init__(self, channels_in: int, channels_out: int, blocks: int, groups: int, *, last: bool) -> None:
        super().__init__(channels_in, channels_out, blocks, groups)
        self.upsample = nn.Identity() if last else Upsample(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(self.block(x))


class Encoder(nn.Module):
    """(B 3 H W) -> (B 2C H/8 W/8): the mean's channels, then the log-variance's."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.width, 3, padding=1)
        self.down = nn.Sequential(
            *(
                DownLevel(before, width, config.blocks, config.groups, last=i == last)
                for i, (before, width) in enumerate(zip([config.width, *widths], widths, strict=False))
            )
        )
        self.mid = Middle(widths[-1], config.groups)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        h = self.conv_in(image)  # (B width H W)
        h = self.mid(self.down(h))  # (B 4*width H/8 W/8) with the released multipliers
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """(B C H/8 W/8) -> (B 3 H W). Levels are numbered from the finest, as in the released files, and run from the coarsest."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.groups)
        self.up = nn.ModuleList(
            UpLevel(before, width, config.blocks + 1, config.groups, last=i == 0)
            for i, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = nn.GroupNorm(config.groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        h = self.mid(self.conv_in(latent))  # (B 4*width H/8 W/8)
        for level in reversed(self.up):
            h = level(h)  # doubles the sides, but for the finest level
        return self.conv_out(F.silu(self.norm_out(h)))


class VAE(nn.Module):
    """Encoder, decoder and the numbers that bring latents to a spread near 1. See VAEConfig for the shape of it."""

    def __init__(self, config: VAEConfig = VAEConfig()) -> None:  # noqa: B008 (frozen)
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B 3 H W) in [-1, 1], sides multiples of 8 -> mean and log-variance, each (B C H/8 W/8), the latter in [-30, 20]."""
        factor = self.config.factor
        require(
            image.ndim == 4 and image.shape[1] == 3 and image.shape[2] % factor == 0 and image.shape[3] % factor == 0,
            f"encode takes pictures (B 3 H W) with sides that are multiples of {factor}, not {tuple(image.shape)}; crop or resize first",
        )
        mean, logvar = self.encoder(image).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def sample(self, mean: Tensor, logvar: Tensor, generator: Generator | None = None) -> Tensor:
        """A latent drawn from N(mean, exp(logvar)), differentiable in both (Kingma & Welling 2014, section 2.4)."""
        noise = torch.randn(mean.shape, generator=generator, device=generator.device if generator else mean.device)
        return mean + (0.5 * logvar).exp() * noise.to(mean)

    def decode(self, latent: Tensor) -> Tensor:
        """latent (B C h w), not normalised -> image (B 3 8h 8w), near [-1, 1] and not clamped."""
        channels = self.config.latent_channels
        require(
            latent.ndim == 4 and latent.shape[1] == channels,
            f"decode takes latents (B {channels} h w), not {tuple(latent.shape)}",
        )
        return self.decoder(latent)

    def decode_sliced(self, latent: Tensor) -> Tensor:
        """decode, one picture of the batch at a time: the memory of one picture, the same numbers."""
        return torch.cat([self.decode(one) for one in latent.split(1)])

    def decode_tiled(self, latent: Tensor, *, tile: int = 64, overlap: int = 16) -> Tensor:
        """decode in square tiles of `tile` cells that overlap and are faded into each other: bounded memory for any size.

        A group norm that sees one tile takes other statistics than one that sees the picture, which would colour each tile
        differently. So the tiles are decoded twice: once to measure every norm's statistics over all of them, then with those.
        """
        require(0 <= 2 * overlap < tile, f"tile {tile} must be more than twice the overlap {overlap}")
        factor, (h, w) = self.config.factor, latent.shape[2:]
        corners = [(top, left) for top in _tile_starts(h, tile, overlap) for left in _tile_starts(w, tile, overlap)]
        parts = [latent[:, :, top : top + tile, left : left + tile] for top, left in corners]
        if len(parts) == 1:
            return self.decode(latent)
        moments: dict[nn.Module, Tensor] = {}  # (2 B G) of each norm: its mean and its mean square, summed over tiles

        def measure(norm: nn.GroupNorm, args: tuple[Tensor], _out: Tensor) -> None:
            x = args[0].unflatten(1, (norm.num_groups, -1)).flatten(2).float()  # (B G n)
            moments[norm] = moments.get(norm, 0) + torch.stack([x.mean(-1), x.square().mean(-1)])

        def share(norm: nn.GroupNorm, args: tuple[Tensor], _out: Tensor) -> Tensor:
            mean, square = (moments[norm] / len(parts)).repeat_interleave(norm.num_channels // norm.num_groups, dim=-1)  # (B C) each
            scale = norm.weight * (square - mean.square() + norm.eps).rsqrt()
            return (args[0] * scale[..., None, None] + (norm.bias - mean * scale)[..., None, None]).to(args[0].dtype)

        with _on_norms(self.decoder, measure):
            for part in parts:
                self.decode(part)
        picture = latent.new_zeros(len(latent), 3, h * factor, w * factor)
        weight = latent.new_zeros(1, 1, h * factor, w * factor)
        with _on_norms(self.decoder, share):
            for (top, left), part in zip(corners, parts, strict=True):
                decoded = self.decode(part)  # (B 3 8*tile 8*tile)
                fade = (_fade(decoded.shape[2], overlap * factor)[:, None] * _fade(decoded.shape[3], overlap * factor)).to(decoded)
                place = [slice(s * factor, s * factor + n) for s, n in zip((top, left), decoded.shape[2:], strict=True)]
                picture[:, :, *place] += decoded * fade
                weight[:, :, *place] += fade
        return picture / weight

    def normalize(self, latent: Tensor) -> Tensor:
        """From the VAE's latents to the transformer's: (latent - shift) * scale."""
        return (latent - self.config.shift) * self.config.scale

    def denormalize(self, latent: Tensor) -> Tensor:
        """From the transformer's latents to the VAE's: latent / scale + shift."""
        return latent / self.config.scale + self.config.shift


# RGB of one unit of each normalised latent channel of the released VAE (sd3_impls.py: decode_latent_to_preview)
SD3_PREVIEW = (
    (-0.0645, 0.0177, 0.1052), (0.0028, 0.0312, 0.0650), (0.1848, 0.0762, 0.0360), (0.0944, 0.0360, 0.0889),
    (0.0897, 0.0506, -0.0364), (-0.0020, 0.1203, 0.0284), (0.0855, 0.0118, 0.0283), (-0.0539, 0.0658, 0.1047),
    (-0.0057, 0.0116, 0.0700), (-0.0412, 0.0281, -0.0039), (0.1106, 0.1171, 0.1220), (-0.0248, 0.0682, -0.0481),
    (0.0815, 0.0846, 0.1207), (-0.0120, -0.0055, -0.0867), (-0.0749, -0.0634, -0.0456), (-0.1418, -0.1457, -0.1259),
)  # fmt: skip


def preview(latent: Tensor, factors: Tensor | None = None) -> Tensor:
    """A rough picture without the decoder: normalised latents (B C h w) -> (B 3 h w) near [-1, 1], one pixel a cell.

    factors (C 3): the released VAE's by default; fit_preview finds those of another.
    """
    factors = torch.tensor(SD3_PREVIEW) if factors is None else factors
    require(latent.shape[1] == len(factors), f"{len(factors)} preview factors do not fit latents of {latent.shape[1]} channels")
    return torch.einsum("bchw,cr->brhw", latent, factors.to(latent))


def fit_preview(latent: Tensor, image: Tensor) -> Tensor:
    """The (C 3) factors for `preview` that come closest to pictures (B 3 H W), by least squares over their normalised latents (B C h w)."""
    small = F.adaptive_avg_pool2d(image, (latent.shape[2], latent.shape[3]))  # (B 3 h w)
    cells, colours = (x.transpose(0, 1).flatten(1).T.double() for x in (latent, small))  # (B*h*w C) and (B*h*w 3)
    return torch.linalg.lstsq(cells, colours).solution.to(latent)


@contextlib.contextmanager
def _on_norms(module: nn.Module, hook: Callable[..., Tensor | None]) -> Iterator[None]:
    """While open, the hook follows every group norm."""
    handles = [norm.register_forward_hook(hook) for norm in module.modules() if isinstance(norm, nn.GroupNorm)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin so that they cover `length` cells, the last one flush with the end."""
    last = max(length - tile, 0)
    return [*range(0, last, tile - overlap), last]


def _fade(length: int, overlap: int) -> Tensor:
    """(length,) weights that rise from near 0 over `overlap` pixels, stay at 1, and fall again."""
    ramp = (torch.arange(length) + 0.5) / max(overlap, 0.5)
    return torch.minimum(ramp, ramp.flip(0)).clamp(max=1)
