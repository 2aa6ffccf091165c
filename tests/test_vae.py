"""The autoencoder: equal to diffusers', and its numbers, tiles, samples and number types."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Generator, Tensor, nn

from minisd3 import formats
from minisd3.config import PRESETS, VAEConfig
from minisd3.vae import SD3_PREVIEW, VAE, fit_preview, preview

SMALL = VAEConfig(width=8, multipliers=(1, 2, 4, 4), latent_channels=4, blocks=1, groups=4)
SHALLOW = VAEConfig(width=16, multipliers=(1, 2), latent_channels=16, blocks=2, groups=2)


def filled(config: VAEConfig) -> VAE:
    """With random numbers everywhere, biases and norms too."""
    vae, generator = VAE(config), Generator().manual_seed(0)
    for parameter in vae.parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)
    return vae.requires_grad_(False)


def picture(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=Generator().manual_seed(1)) * 2 - 1


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("config", [SMALL, SHALLOW], ids=["f8", "f2"])
def test_equals_diffusers(config: VAEConfig) -> None:
    levels = len(config.multipliers)
    theirs = AutoencoderKL(
        block_out_channels=[config.width * m for m in config.multipliers], layers_per_block=config.blocks,
        latent_channels=config.latent_channels, norm_num_groups=config.groups, use_quant_conv=False, use_post_quant_conv=False,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
    ).eval()  # fmt: skip
    ours, image = filled(config), picture(2, 3, 16, 24)
    theirs.load_state_dict(formats.to_diffusers("VAE", ours.state_dict()), strict=True)
    with torch.no_grad():
        posterior = theirs.encode(image).latent_dist
        mean, logvar = ours.encode(image)
        close(mean, posterior.mean)
        close(logvar, posterior.logvar)
        close(ours.decode(mean), theirs.decode(mean, return_dict=False)[0])
    assert mean.shape == (2, config.latent_channels, 16 // config.factor, 24 // config.factor)


def test_log_variance_is_clamped() -> None:
    vae = filled(SMALL)
    vae.encoder.conv_out.bias[4:] = torch.tensor([-1e4, -5.0, 5.0, 1e4])
    vae.encoder.conv_out.weight.zero_()
    mean, logvar = vae.encode(picture(1, 3, 8, 8))
    assert logvar.flatten().tolist() == [-30, -5, 5, 20] and torch.equal(mean.flatten(), vae.encoder.conv_out.bias[:4])


def test_samples_are_the_mean_plus_scaled_noise() -> None:
    vae = VAE(SMALL)
    mean, logvar = torch.randn(2, 4, 50, 50, requires_grad=True), torch.linspace(-3, 1, 4).view(1, 4, 1, 1).repeat(2, 1, 50, 50)
    logvar.requires_grad_()
    drawn = vae.sample(mean, logvar, Generator().manual_seed(2))
    assert torch.equal(drawn, vae.sample(mean, logvar, Generator().manual_seed(2)))
    for_mean, for_logvar = torch.autograd.grad(drawn.sum(), (mean, logvar))
    assert (for_mean == 1).all()
    torch.testing.assert_close(for_logvar, (drawn - mean) / 2)  # d/dl exp(l / 2) e = exp(l / 2) e / 2
    spread = (drawn - mean).detach().transpose(0, 1).flatten(1).std(1)  # over 5000 draws
    torch.testing.assert_close(spread, torch.linspace(-3, 1, 4).div(2).exp(), rtol=0.05, atol=0)


def test_normalised_latents() -> None:
    vae, latent = VAE(SMALL), torch.randn(1, 4, 2, 2)
    torch.testing.assert_close(vae.normalize(latent), (latent - 0.0609) * 1.5305)
    torch.testing.assert_close(vae.denormalize(vae.normalize(latent)), latent)
    assert (VAEConfig().scale, VAEConfig().shift, VAEConfig().factor) == (1.5305, 0.0609, 8)


def test_sliced_decoding_is_decoding() -> None:
    vae, latent = filled(SMALL), torch.randn(3, 4, 3, 2)
    close(vae.decode_sliced(latent), vae.decode(latent))


@pytest.mark.parametrize("size", [(5, 7), (16, 16), (17, 40), (33, 20)], ids=str)
@pytest.mark.parametrize(("tile", "overlap"), [(16, 4), (8, 0), (16, 7)])
def test_tiles_cover_the_picture_and_add_up(
    size: tuple[int, int], tile: int, overlap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network, whose edges differ, tiles must join without a trace."""
    vae, latent = VAE(SMALL), torch.randn(2, 3, *size)
    sizes = set()

    def enlarge(part: Tensor) -> Tensor:
        sizes.add(tuple(part.shape[2:]))
        return F.interpolate(part, scale_factor=8)

    monkeypatch.setattr(vae, "decode", enlarge)
    torch.testing.assert_close(vae.decode_tiled(latent, tile=tile, overlap=overlap), F.interpolate(latent, scale_factor=8))
    assert sizes == {(min(size[0], tile), min(size[1], tile))}  # so memory is bounded


def test_tiled_decoding_of_what_fits_in_one_tile_is_decoding() -> None:
    vae, latent = filled(SMALL), torch.randn(1, 4, 6, 9)
    close(vae.decode_tiled(latent), vae.decode(latent))


def test_the_fade_hides_the_seam() -> None:
    """With group norms and attention left out, which see the whole tile, a decoder is wrong only near the tiles' edges inside the
    picture. There the error must not jump from one pixel to the next, as it does between tiles that only touch."""
    vae = filled(VAEConfig(width=8, multipliers=(1, 1), latent_channels=4, blocks=1, groups=4))
    for name, module in list(vae.decoder.named_modules()):
        if isinstance(module, nn.GroupNorm):
            vae.decoder.set_submodule(name, nn.Identity())
    vae.decoder.mid.attn_1.proj_out.weight.zero_()
    latent = torch.randn(1, 4, 24, 48, generator=Generator().manual_seed(3))  # two tiles that touch, or three
    whole = vae.decode(latent)

    def jump(overlap: int) -> float:
        error = vae.decode_tiled(latent, tile=24, overlap=overlap) - whole
        assert error[..., :24].abs().max() < 1e-5 * whole.abs().max()  # a quarter of the picture, far from any seam
        return float(error.diff(dim=3).abs().mean((0, 1, 2)).max())

    assert jump(8) < 0.2 * jump(0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    vae, image = filled(SMALL), picture(1, 3, 16, 16)
    mean, _ = vae.encode(image)
    exact = vae.decode(mean)
    vae.to(dtype)
    half_mean, half_logvar = vae.encode(image.to(dtype))
    decoded = vae.decode(mean.to(dtype))
    drawn = vae.sample(half_mean, half_logvar, Generator().manual_seed(0))
    assert {half_mean.dtype, decoded.dtype, drawn.dtype, vae.normalize(half_mean).dtype} == {dtype}
    assert (half_mean - mean).norm() / mean.norm() < tolerance and (decoded - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: VAE(SMALL).encode(torch.zeros(1, 3, 20, 16)), r"multiples of 8, not \(1, 3, 20, 16\); crop or resize"),
        (lambda: VAE(SMALL).encode(torch.zeros(1, 1, 16, 16)), r"not \(1, 1, 16, 16\)"),
        (lambda: VAE(SMALL).decode(torch.zeros(1, 16, 2, 2)), r"latents \(B 4 h w\), not \(1, 16, 2, 2\)"),
        (
            lambda: VAE(SMALL).decode_tiled(torch.zeros(1, 4, 2, 2), tile=8, overlap=4),
            "tile 8 must be more than twice the overlap 4",
        ),
        (lambda: VAEConfig(width=100), "100 channels cannot be split into groups=32"),
        (lambda: VAEConfig(blocks=0), "blocks is 0"),
    ],
)
def test_mistakes_are_named(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


def test_the_tiny_preset_halves_three_times() -> None:
    vae = VAE(PRESETS["tiny"].vae)
    mean, logvar = vae.encode(torch.zeros(1, 3, 32, 48))
    assert mean.shape == logvar.shape == (1, 16, 4, 6) and vae.decode(mean).shape == (1, 3, 32, 48)


def test_preview_is_linear_and_fitting_finds_it_again() -> None:
    latent = torch.randn(2, 16, 6, 8, generator=Generator().manual_seed(2))
    small = preview(latent)
    torch.testing.assert_close(small[1, :, 2, 3], latent[1, :, 2, 3] @ torch.tensor(SD3_PREVIEW))
    image = F.interpolate(small, scale_factor=8, mode="nearest")  # cells of one colour, as the preview sees them
    torch.testing.assert_close(fit_preview(latent, image), torch.tensor(SD3_PREVIEW))
    with pytest.raises(ValueError, match="16 preview factors do not fit latents of 4 channels"):
        preview(latent[:, :4])
