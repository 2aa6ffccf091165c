"""The transformer: equal to diffusers', shaped as the released files are, and true to itself in every variant."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from minisd3 import formats
from minisd3.config import PRESETS, MMDiTConfig
from minisd3.mmdit import MMDiT, PatchEmbed, timestep_embedding, unpatchify
from minisd3.vae import VAE

FACTS = Path(__file__).parent / "facts"
SD3 = MMDiTConfig(depth=4, head_dim=8, in_channels=4, pos_embed_max_size=9, context_dim=12, pooled_dim=10)
LARGE = replace(SD3, qk_norm="rms")
X = replace(LARGE, dual_attention_layers=(0, 1, 3))  # the last block, too
VARIANTS = [
    replace(X, qk_norm="layer"),
    replace(X, block_norm="rms"),
    replace(X, mlp="swiglu"),
    replace(LARGE, scale_mod_only=True),
    replace(X, registers=3),
    replace(X, dual_attention_dropout=0.5),
    replace(SD3, patch_size=1, mlp_ratio=2.5),
]


def filled(config: MMDiTConfig, seed: int = 0) -> MMDiT:
    """With random numbers everywhere, the position table too, so that nothing is right by being zero or regular."""
    model, generator = MMDiT(config), torch.Generator().manual_seed(seed)
    for tensor in [*model.parameters(), model.pos_embed]:
        nn.init.normal_(tensor, std=0.2, generator=generator)
    return model.requires_grad_(False)


def inputs(config: MMDiTConfig, size: tuple[int, int] = (6, 8), *, batch: int = 2, text: int = 5) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(config.in_channels, *size), (text, config.context_dim), (config.pooled_dim,)]
    x, context, pooled = (torch.randn(batch, *shape, generator=generator) for shape in shapes)
    return x, torch.rand(batch, generator=generator), context, pooled


def diffusers(model: MMDiT, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, **options: Any) -> Tensor:
    c = model.config
    theirs = SD3Transformer2DModel(
        sample_size=c.pos_embed_max_size, patch_size=c.patch_size, in_channels=c.in_channels, out_channels=c.in_channels,
        num_layers=c.depth, attention_head_dim=c.head_dim, num_attention_heads=c.num_heads, joint_attention_dim=c.context_dim,
        caption_projection_dim=c.hidden_size, pooled_projection_dim=c.pooled_dim, pos_embed_max_size=c.pos_embed_max_size,
        dual_attention_layers=c.dual_attention_layers, qk_norm="rms_norm" if c.qk_norm else None,
    )  # fmt: skip
    theirs.load_state_dict(formats.to_diffusers("transformer", model.state_dict()), strict=True)
    with torch.no_grad():
        return theirs(x, context, pooled, 1000 * t, return_dict=False, **options)[0]


def residuals(n: int) -> list[Tensor]:
    return list(torch.randn(n, 2, 12, SD3.hidden_size, generator=torch.Generator().manual_seed(2)))


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


# --- equality ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SD3, LARGE, X], ids=["sd3", "large", "mmdit-x"])
@pytest.mark.parametrize("size", [(6, 8), (18, 4), (2, 2)], ids=str)
def test_equals_diffusers(config: MMDiTConfig, size: tuple[int, int]) -> None:
    """At three shapes: a rectangle, one as high as the table and of an even width in the odd table, and a single patch."""
    model, given = filled(config), inputs(config, size)
    close(model(*given), diffusers(model, *given))


@pytest.mark.parametrize("skipped", [(0,), (1, 2), (3,)], ids=str)
def test_equals_diffusers_without_some_blocks(skipped: tuple[int, ...]) -> None:
    model, given = filled(X), inputs(X)
    close(model(*given, skip_layers=skipped), diffusers(model, *given, skip_layers=list(skipped)))


def test_control_differs_from_diffusers_in_the_last_block_and_in_skipped_ones_only() -> None:
    """The released code adds after the last block, too, and skips a block's residual with the block; diffusers does neither."""
    model, given, control = filled(LARGE), inputs(LARGE), residuals(4)
    none = torch.zeros_like(control[0])
    theirs = diffusers(model, *given, block_controlnet_hidden_states=control)
    close(model(*given, control=[*control[:3], none]), theirs)
    assert not torch.allclose(model(*given, control=control), theirs, atol=1e-2)

    theirs = diffusers(model, *given, block_controlnet_hidden_states=[control[0], none, *control[2:]], skip_layers=[1])
    close(model(*given, control=[*control[:3], none], skip_layers=(1,)), theirs)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_control_is_added_by_intervals(n: int) -> None:
    model, given, control = filled(LARGE), inputs(LARGE), residuals(n)
    stream = model.embed(*given)
    context, x = stream.context, stream.x
    for i, block in enumerate(model.joint_blocks):
        context, x = block(context, x, stream.c)
        x = x + control[i // (4 // n)]
    assert torch.equal(model(*given, control=control), model.final(stream._replace(x=x), given[0]))


# --- the released shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "file", "parameters", "tensors"),
    [
        ("sd3-medium", "sd3_medium", 2_028_328_000, 491),
        ("sd3.5-medium", "sd3.5_medium", 2_243_171_520, 665),
        ("sd3.5-large", "sd3.5_large", 8_056_627_520, 923),
    ],
)
def test_names_shapes_and_counts_of_the_released_files(preset: str, file: str, parameters: int, tensors: int) -> None:
    released = {name: torch.Size(shape) for name, shape in json.loads((FACTS / f"{file}.keys.json").read_text()).items()}
    with torch.device("meta"):
        model, vae = MMDiT(PRESETS[preset].mmdit), VAE(PRESETS[preset].vae)
    ours = {f"model.diffusion_model.{name}": tensor.shape for name, tensor in model.state_dict().items()}
    ours |= {f"first_stage_model.{name}": tensor.shape for name, tensor in vae.state_dict().items()}
    assert ours == released
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == (parameters, tensors)
    assert (sum(p.numel() for p in vae.parameters()), len(vae.state_dict())) == (83_819_683, 244)


def test_turbo_is_large() -> None:
    assert PRESETS["sd3.5-large-turbo"].mmdit == PRESETS["sd3.5-large"].mmdit


# --- parts ------------------------------------------------------------------------------------------------------------------------


def test_patch_embedding_is_a_linear_map_on_patches_and_unpatchify_its_inverse() -> None:
    x, embed = torch.randn(2, 4, 6, 8), PatchEmbed(2, 4, 16)
    patches = F.unfold(x, 2, stride=2).transpose(1, 2)  # (B L C*p*p)
    torch.testing.assert_close(embed(x), F.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias))
    channel_fastest = patches.unflatten(2, (4, 4)).transpose(2, 3).flatten(2)
    assert torch.equal(unpatchify(channel_fastest, 3, 4, 2), x)


def test_time_embedding_is_all_cosines_then_all_sines_of_1000_t() -> None:
    made = timestep_embedding(torch.tensor([0.25]))[0]
    assert made.shape == (256,)
    for i in (0, 1, 77, 127):
        angle = torch.tensor(250 * 10000 ** (-i / 128))
        torch.testing.assert_close(made[[i, 128 + i]], torch.stack([angle.cos(), angle.sin()]), rtol=0, atol=1e-4)


def test_position_table_is_cropped_in_its_middle() -> None:
    model = filled(SD3)
    table = model.pos_embed.view(9, 9, -1)
    assert torch.equal(model.cropped_positions(3, 6).view(3, 6, -1), table[3:6, 1:7])
    assert torch.equal(model.cropped_positions(9, 9), model.pos_embed)


def test_fresh_table_has_the_column_first() -> None:
    table = MMDiT(SD3).pos_embed.view(9, 9, 2, -1)  # row, column, half
    assert (table[:1, :, 0] == table[:, :, 0]).all() and (table[:, :1, 1] == table[:, :, 1]).all()
    assert torch.equal(table[4, 7, 0], table[7, 4, 1]) and not torch.equal(table[4, 7, 0], table[4, 7, 1])


# --- properties -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SD3, X, *VARIANTS], ids=range(9))
def test_a_new_model_predicts_zero_and_learns(config: MMDiTConfig) -> None:
    given = inputs(config)
    assert (MMDiT(config)(*given) == 0).all()
    model = filled(config).requires_grad_(True).eval()
    v = model(*given)
    assert v.shape == given[0].shape and v.isfinite().all()
    v.square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(name.startswith("joint_blocks.3.context_block.attn.ln_q") for name in silent), silent  # nothing reads these queries


@pytest.mark.parametrize("config", [SD3, X, VARIANTS[4]], ids=range(3))
def test_a_batch_is_its_samples_one_by_one(config: MMDiTConfig) -> None:
    model, given = filled(config), inputs(config, batch=3)
    close(model(*given), torch.cat([model(*(part[i : i + 1] for part in given)) for i in range(3)]))
    x, _, context, pooled = given
    assert torch.equal(model(x, torch.tensor(0.3), context, pooled), model(x, torch.full((3,), 0.3), context, pooled))


def test_image_tokens_know_their_place_and_text_tokens_do_not() -> None:
    model, (x, t, context, pooled) = filled(X), inputs(X)
    close(model(x, t, context.flip(1), pooled), model(x, t, context, pooled))
    assert not torch.allclose(model(x.flip(3), t, context, pooled).flip(3), model(x, t, context, pooled), atol=1e-2)


@pytest.mark.parametrize("skipped", [(0,), (1, 2), (1, 3)], ids=str)
def test_branched_equals_two_passes(skipped: tuple[int, ...]) -> None:
    model, given = filled(X), inputs(X, batch=3)
    v, v_skipped = model.forward_branched(*given, skip_layers=skipped, rows=2)
    close(v, model(*given))
    close(v_skipped, model(*(part[:2] for part in given), skip_layers=skipped))


def test_branched_leaves_control_out_of_the_copies() -> None:
    model, given, control = filled(X), inputs(X), residuals(2)
    v, v_skipped = model.forward_branched(*given, skip_layers=(2,), rows=1, control=control)
    close(v, model(*given, control=control))
    close(v_skipped, model(*(part[:1] for part in given), skip_layers=(2,)))


@pytest.mark.parametrize("change", [{"dual_attention_layers": (0,), "registers": 3}, {"scale_mod_only": True}], ids=str)
def test_compiles_as_one_graph(change: dict[str, Any]) -> None:
    config = replace(LARGE, depth=2, **change)
    model, given = filled(config), inputs(config)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*given), model(*given))


def test_checkpointing_changes_no_gradient() -> None:
    model, given = filled(X).requires_grad_(True), inputs(X)

    def gradients() -> Sequence[Tensor]:
        return torch.autograd.grad(model(*given).square().sum(), list(model.parameters()))

    plain = gradients()
    model.checkpointing = True
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    with model.joint_blocks[1].register_forward_pre_hook(count):
        again = gradients()
    assert calls == 2 and all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_and_gives_what_it_is_given(dtype: torch.dtype) -> None:
    model, given = filled(X), inputs(X)
    exact = model(*given)
    halved = model.to(dtype)(*given)  # latents in fp32, as samplers keep them
    assert halved.dtype == torch.float32
    assert (halved - exact).norm() / exact.norm() < (0.1 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("config", [X, VARIANTS[0], VARIANTS[1]], ids=["rms", "layer", "rms-blocks"])
def test_autocast_goes_without_a_warning(config: MMDiTConfig) -> None:
    model, given = filled(config), inputs(config)
    exact = model(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v = model(*given)
    assert (v - exact).norm() / exact.norm() < 0.1


# --- variants, by hand ------------------------------------------------------------------------------------------------------------


def test_variants_by_hand() -> None:
    x, c = torch.randn(2, 5, 32), torch.randn(2, 32)
    block: Any = filled(VARIANTS[2]).joint_blocks[0].context_block  # swiglu
    w = block.mlp
    torch.testing.assert_close(w(x), (F.silu(x @ w.w1.weight.T) * (x @ w.w3.weight.T)) @ w.w2.weight.T)
    assert w.w1.weight.shape == (256, 32)  # two thirds of 128, rounded up to a multiple of 256

    block = filled(VARIANTS[1]).joint_blocks[0].context_block  # rms norm
    torch.testing.assert_close(block.norm1(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())

    block = filled(VARIANTS[3]).joint_blocks[0].context_block  # scale only
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block.modulation(c)
    made = block.adaLN_modulation[1](F.silu(c)).unsqueeze(1).chunk(4, dim=2)
    assert not shift.any() and not shift_mlp.any() and torch.equal(torch.cat([scale, gate, scale_mlp, gate_mlp]), torch.cat(made))
    assert block.adaLN_modulation[1].weight.shape == (4 * 32, 32)

    attn: Any = filled(VARIANTS[0]).joint_blocks[0].x_block.attn  # layer norm on queries and keys
    q, k, v = attn.qkv(x).view(2, 5, 3, 4, 8).unbind(2)
    made = attn.project(x)
    torch.testing.assert_close(made.q, F.layer_norm(q, (8,), attn.ln_q.weight, attn.ln_q.bias, 1e-6))
    assert torch.equal(made.v, v) and not torch.allclose(made.k, k)


def test_registers_are_context_tokens_before_the_text() -> None:
    config = VARIANTS[4]
    model, (x, t, context, pooled) = filled(config), inputs(config)
    stream = model.embed(x, t, context, pooled)
    assert stream.context.shape == (2, 3 + 5, 32)
    assert torch.equal(stream.context[:, :3], model.register.expand(2, -1, -1))
    assert torch.equal(stream.context[:, 3:], model.context_embedder(context))


def test_dual_dropout_drops_the_joint_attention_of_whole_samples_in_training_only() -> None:
    """What is left out, if anything, is the joint attention's part, and nothing is rescaled (mmditx.py: block_mixing)."""
    block: Any = filled(VARIANTS[5]).joint_blocks[0].x_block
    x, attended, c = torch.randn(1, 5, 32).expand(64, -1, -1), torch.randn(1, 5, 32).expand(64, -1, -1), torch.randn(1, 32)
    m = block.modulation(c)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trained = block.train().post_attention(x, attended, m)
    block.eval()
    kept = block.post_attention(x[:1], attended[:1], m)
    dropped = torch.isclose(trained, kept, atol=1e-5).all((1, 2)).logical_not()
    assert 16 < int(dropped.sum()) < 48
    own = m[8] * block.attn2(block.norm1(x[:1]) * (1 + m[7]) + m[6])
    torch.testing.assert_close(trained[dropped], block.feed_forward(x[:1] + own, m).expand(int(dropped.sum()), -1, -1))


# --- errors -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 6, 8)}, r"x is \(2, 5, 6, 8\); MMDiT takes latents \(B 4 H W\)"),
        ({"x": torch.zeros(2, 4, 6, 7)}, "multiples of 2"),
        ({"x": torch.zeros(2, 4, 20, 4)}, "10 x 2 patches do not fit the position table of 9 x 9"),
        ({"context": torch.zeros(2, 5, 13)}, r"context is \(2, 5, 13\)"),
        ({"pooled": torch.zeros(2, 9)}, r"pooled \(2, 9\)"),
        ({"control": residuals(3)}, "3 control residuals do not divide the 4 blocks evenly"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, Any], message: str) -> None:
    given = dict(zip(("x", "t", "context", "pooled"), inputs(SD3), strict=True))
    with pytest.raises(ValueError, match=message):
        MMDiT(SD3)(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth is 0"),
        ({"qk_norm": "ln"}, "qk_norm is 'ln'; choose None, 'rms' or 'layer'"),
        ({"block_norm": "batch"}, "block_norm is 'batch'"),
        ({"mlp": "relu"}, "mlp is 'relu'"),
        ({"registers": -1}, "registers is -1"),
        ({"dual_attention_dropout": 1.0}, r"dual_attention_dropout is 1.0; it must be in \[0, 1\)"),
        ({"dual_attention_layers": (0, 4)}, r"names \[4\]; the blocks are 0 to 3"),
        ({"depth": 1, "head_dim": 6}, "width 6"),
        ({"scale_mod_only": True, "dual_attention_layers": (0,)}, "scale_mod_only has no form with dual attention"),
    ],
)
def test_impossible_configs_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MMDiT(replace(SD3, **change))
