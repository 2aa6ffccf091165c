"""ControlNet against diffusers, against by-hand versions of both forms, and its hints against OpenCV's Canny."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor
from torch.testing import assert_close

from minisd3.config import PRESETS, ControlNetConfig, MMDiTConfig, SkipLayers, VAEConfig
from minisd3.controlnet import HINTS, PLAIN_CANNY, RELEASED_CANNY, Control, ControlNet, blur, canny, controlled, depth
from minisd3.flow import sd3_schedule
from minisd3.guidance import classifier_free, skip_layer
from minisd3.mmdit import MMDiT
from minisd3.scenes import scene
from minisd3.types import Conditioning
from minisd3.vae import VAE

FACTS = Path(__file__).parent / "facts"
BASE = MMDiTConfig(depth=4, head_dim=8, in_channels=4, pos_embed_max_size=8, context_dim=16, pooled_dim=12)  # 32 wide
EIGHT = ControlNetConfig(depth=2, num_heads=4, head_dim=8, in_channels=4, pooled_dim=12)
TWO = replace(EIGHT, form="2b", pooled_dim=32)


def random(module: Any, seed: int) -> Any:
    """The module with every weight drawn anew, so that nothing is silent."""
    generator = Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.15, generator=generator)
    return module.eval()


def inputs(batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    g = Generator().manual_seed(seed)
    shapes = {"x": (batch, 4, 8, 12), "context": (batch, 5, 16), "pooled": (batch, 12)}
    return {k: torch.randn(s, generator=g) for k, s in shapes.items()} | {"t": torch.full((batch,), 0.7)}


def hint(batch: int = 1, seed: int = 9) -> Tensor:
    return torch.randn(batch, 4, 8, 12, generator=Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def base() -> MMDiT:
    return random(MMDiT(BASE), 1)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


# --- the network ------------------------------------------------------------------------------------------------------------------


def test_the_released_names_shapes_and_count():
    with torch.device("meta"):
        net = ControlNet(ControlNetConfig())
    facts = json.loads((FACTS / "sd3.5_large_controlnet.keys.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in net.state_dict().items()} == facts
    assert sum(p.numel() for p in net.parameters()) == sum(int(np.prod(s)) for n, s in facts.items() if n != "control_type")
    assert net.control_type is not None and net.control_type.dtype == torch.int32


@pytest.mark.parametrize("config", [EIGHT, TWO], ids=["8b", "2b"])
def test_a_fresh_one_changes_nothing(base: MMDiT, config: ControlNetConfig):
    given = inputs()
    for net in (ControlNet(config), ControlNet.from_base(base, config, "depth")):
        assert torch.equal(controlled(base, [Control(net, hint())])(**given), base(**given))


def diffusers_weights(net: ControlNet, blocks: range) -> dict[str, Tensor]:
    """The weights of some of our blocks, and of all else, under diffusers' names."""
    own = {name: tensor for name, tensor in net.state_dict().items() if "_blocks." not in name and name != "control_type"}
    for new, i in enumerate(blocks):
        own |= {f"controlnet_blocks.{new}.{k}": v for k, v in net.controlnet_blocks[i].state_dict().items()}
        block = net.transformer_blocks[i].state_dict()
        for kind in ("weight", "bias"):
            q, k, v = block[f"attn.qkv.{kind}"].chunk(3)
            parts = {"attn.to_q": q, "attn.to_k": k, "attn.to_v": v, "attn.to_out.0": block[f"attn.proj.{kind}"]}
            parts |= {"ff.net.0.proj": block[f"mlp.fc1.{kind}"], "ff.net.2": block[f"mlp.fc2.{kind}"]}
            parts |= {"norm1.linear": block[f"adaLN_modulation.1.{kind}"]}
            own |= {f"transformer_blocks.{new}.{name}.{kind}": tensor for name, tensor in parts.items()}
    return own


def reference(net: ControlNet, blocks: range) -> Callable[..., Any]:
    from diffusers import SD3ControlNetModel

    c = net.config
    model: Any = SD3ControlNetModel(
        sample_size=8, in_channels=c.in_channels, num_layers=len(blocks), attention_head_dim=c.head_dim,
        num_attention_heads=c.num_heads, joint_attention_dim=None, pooled_projection_dim=c.pooled_dim,
        use_pos_embed=c.form == "2b", pos_embed_type=None,
    )  # fmt: skip
    model.load_state_dict(diffusers_weights(net, blocks))
    return model


def test_form_8b_equals_diffusers(base: MMDiT):
    net, given = random(ControlNet(EIGHT), 2), inputs()
    tokens = base.x_embedder(given["x"]) + base.cropped_positions(4, 6)
    theirs = reference(net, range(2))(
        hidden_states=tokens, controlnet_cond=hint(2), pooled_projections=given["pooled"], timestep=1000 * given["t"]
    )
    ours = net(base, given["x"], hint(2), given["t"], given["pooled"])
    assert_close(ours, list(theirs.controlnet_block_samples), rtol=1e-5, atol=1e-5)


def test_form_2b_equals_diffusers_block_by_block(base: MMDiT):
    """diffusers chains the blocks and does not embed the text twice, so each block is compared alone, on text that is embedded."""
    net, given = random(ControlNet(TWO), 3), inputs()
    ours = net(base, given["x"], hint(2), given["t"], given["pooled"])
    for i, residual in enumerate(ours):
        theirs = reference(net, range(i, i + 1))(
            hidden_states=given["x"],
            controlnet_cond=hint(2),
            pooled_projections=base.y_embedder(given["pooled"]),
            timestep=1000 * given["t"],
        )
        assert_close(residual, theirs.controlnet_block_samples[0], rtol=1e-5, atol=1e-5)


def test_both_forms_by_hand(base: MMDiT):
    x, _, pooled, t = inputs().values()
    net = random(ControlNet(EIGHT), 4)
    state = base.x_embedder(x) + base.cropped_positions(4, 6) + net.pos_embed_input(hint(2))
    c = net.time_text_embed(t, pooled)
    expected = []
    for block, linear in zip(net.transformer_blocks, net.controlnet_blocks, strict=True):
        state = block(state, c)
        expected.append(linear(state))
    assert_close(net(base, x, hint(2), t, pooled), expected, rtol=0, atol=0)

    net = random(ControlNet(TWO), 5)
    tokens = net.pos_embed(x) + net.pos_embed_input(hint(2))
    c = net.time_text_embed(t, base.y_embedder(pooled))
    expected = [linear(block(tokens, c)) for block, linear in zip(net.transformer_blocks, net.controlnet_blocks, strict=True)]
    assert_close(net(base, x, hint(2), t, pooled), expected, rtol=0, atol=0)
    assert not any("control_type" in name for name in net.state_dict()) and net.kind is None


def test_a_scalar_time_and_one_hint_serve_the_whole_batch(base: MMDiT):
    net, given = random(ControlNet(EIGHT), 2), inputs(4)
    spread = net(base, given["x"], torch.cat([hint(2)] * 2), given["t"], given["pooled"])
    assert_close(net(base, given["x"], hint(2), torch.tensor(0.7), given["pooled"]), spread, rtol=0, atol=0)


def test_from_base_copies_what_fits():
    base = random(MMDiT(replace(BASE, qk_norm="rms", dual_attention_layers=(0,))), 1)
    net = ControlNet.from_base(base, EIGHT, "canny")
    copied = {"transformer_blocks.1.attn.qkv.weight": "joint_blocks.1.x_block.attn.qkv.weight",
              "transformer_blocks.0.mlp.fc2.bias": "joint_blocks.0.x_block.mlp.fc2.bias",
              "time_text_embed.timestep_embedder.linear_2.weight": "t_embedder.mlp.2.weight",
              "time_text_embed.text_embedder.linear_1.weight": "y_embedder.mlp.0.weight"}  # fmt: skip
    for own, its in copied.items():
        assert torch.equal(net.get_parameter(own), base.get_parameter(its)), own
    nine = base.get_parameter("joint_blocks.0.x_block.adaLN_modulation.1.weight")
    assert torch.equal(net.get_parameter("transformer_blocks.0.adaLN_modulation.1.weight"), nine[: 6 * 32])
    assert net.kind == "canny" and net.control_type is not None and int(net.control_type) == PLAIN_CANNY
    plain = random(MMDiT(BASE), 1)  # without QK norm and second attention, a ControlNet's block starts as the base's, alone
    net, x, c = ControlNet.from_base(plain, TWO, "depth"), hint().view(1, 12, 32), hint().flatten()[None, :32]
    assert torch.equal(net.transformer_blocks[1](x, c), plain.get_submodule("joint_blocks.1.x_block")(x, c))
    assert torch.equal(net.get_parameter("pos_embed.proj.weight"), plain.x_embedder.proj.weight)
    assert ControlNet.from_base(base.bfloat16(), EIGHT, "blur").pos_embed_input.proj.weight.dtype == torch.bfloat16


def test_training_wakes_the_zero_maps_one_after_the_other(base: MMDiT):
    net, given = ControlNet.from_base(base, EIGHT, "depth"), inputs()
    outlet, inlet = net.get_parameter("controlnet_blocks.1.weight"), net.get_parameter("pos_embed_input.proj.weight")
    for step in range(2):
        with torch.enable_grad():
            residuals = net(base, given["x"], hint(), given["t"], given["pooled"])
            gradients = torch.autograd.grad(base(**given, control=residuals).square().mean(), [outlet, inlet])
        assert gradients[0].abs().sum() > 0 and (gradients[1].abs().sum() > 0) == (step == 1)
        for weight, gradient in zip((outlet, inlet), gradients, strict=True):
            weight.sub_(0.1 * gradient)
    assert not torch.equal(controlled(base, [Control(net, hint())])(**given), base(**given))


# --- the base under control -------------------------------------------------------------------------------------------------------


def test_each_residual_follows_its_blocks_the_last_one_included(base: MMDiT):
    given, net = inputs(), random(ControlNet(EIGHT), 2)
    residuals = net(base, given["x"], hint(), given["t"], given["pooled"])
    stream = base.embed(**given)
    context, x = stream.context, stream.x
    for i, block in enumerate(base.joint_blocks):
        context, x = block(context, x, stream.c)
        x = x + residuals[i // 2]
    expected = base.final(stream._replace(x=x), given["x"])
    model = controlled(base, [Control(net, hint())])
    assert_close(model(**given), expected, rtol=0, atol=0)
    skipped = model(**given, skip_layers=(1, 3))
    assert_close(skipped, base(**given, control=residuals, skip_layers=(1, 3)), rtol=0, atol=0)
    assert not torch.equal(skipped, expected)


def test_strength_scales_the_residuals(base: MMDiT):
    given, net = inputs(), random(ControlNet(EIGHT), 2)
    residuals = net(base, given["x"], hint(), given["t"], given["pooled"])
    half = controlled(base, [Control(net, hint(), strength=0.5)])(**given)
    assert_close(half, base(**given, control=[0.5 * r for r in residuals]), rtol=0, atol=0)
    assert torch.equal(controlled(base, [Control(net, hint(), strength=0)])(**given), base(**given))
    assert torch.equal(controlled(base, [])(**given), base(**given))


@pytest.mark.parametrize(("start", "end", "steps"), [(0, 0.5, range(5)), (0.2, 1, range(2, 10)), (0.7, 0.95, range(7, 9)), (0.41, 0.49, [])])
def test_it_acts_from_start_to_end(base: MMDiT, start: float, end: float, steps: range):
    schedule, given = sd3_schedule(10), inputs()
    model = controlled(base, [Control(random(ControlNet(EIGHT), 2), hint(), start=start, end=end)], schedule)
    acts = [i for i in range(10) if model.residuals(given["x"], schedule[i], given["pooled"]) is not None]
    assert acts == list(steps)


def test_two_at_once_are_the_sum_also_of_different_depths():
    base = random(MMDiT(replace(BASE, depth=6)), 1)  # 48 wide
    configs = [replace(EIGHT, num_heads=6, depth=2), replace(EIGHT, num_heads=6, depth=3), replace(TWO, num_heads=6, depth=1, pooled_dim=48)]
    controls = [Control(random(ControlNet(c), i), hint(seed=i), strength=0.5 + i) for i, c in enumerate(configs)]
    given = inputs()
    expected = []
    for block in range(6):
        made = [c.net(base, given["x"], c.hint, given["t"], given["pooled"]) for c in controls]
        expected.append(sum(c.strength * r[block * len(r) // 6] for c, r in zip(controls, made, strict=True)))
    assert_close(controlled(base, controls)(**given), base(**given, control=expected), rtol=1e-5, atol=1e-6)
    twice = controlled(base, [controls[0], replace(controls[0], strength=0.25)])
    assert_close(twice(**given), controlled(base, [replace(controls[0], strength=0.75)])(**given), rtol=1e-5, atol=1e-6)


def test_guidance_controls_both_of_its_passes(base: MMDiT):
    x, context, pooled, _ = inputs().values()
    cond, uncond, t = Conditioning(context, pooled), Conditioning(-context, -pooled), torch.tensor(0.7)
    model = controlled(base, [Control(random(ControlNet(EIGHT), 2), hint())])
    guided = classifier_free(model, cond, uncond, 3.0)(x, t)
    v, v_uncond = model(x, t, *cond), model(x, t, *uncond)
    assert_close(guided, v_uncond + 3 * (v - v_uncond), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [(0,), (1, 2), (3,)])
def test_skip_layer_guidance_equals_three_passes_the_third_without_control(base: MMDiT, layers: tuple[int, ...]):
    x, context, pooled, _ = inputs().values()
    cond, uncond, schedule = Conditioning(context, pooled), Conditioning(-context, -pooled), sd3_schedule(10)
    model = controlled(base, [Control(random(ControlNet(EIGHT), 2), hint(2))])
    slg, t = SkipLayers(layers, scale=2.5, start=0.0, end=0.5), schedule[3]
    guided = skip_layer(model, cond, uncond, 4.0, slg, schedule)(x, t)
    v, v_uncond, v_skipped = model(x, t, *cond), model(x, t, *uncond), base(x, t, *cond, skip_layers=layers)
    assert_close(guided, v_uncond + 4 * (v - v_uncond) + 2.5 * (v - v_skipped), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "width 24 where the base has 32"),
        ({"pooled_dim": 13}, "text vector 13 where the base has 12"),
        ({"form": "2b"}, "text vector 12 where the base has 32"),
        ({"in_channels": 16}, "latent channels 16 where the base has 4"),
        ({"depth": 3}, "3 blocks, which do not divide the base's 4"),
    ],
)
def test_a_controlnet_of_another_base_is_one_clear_error(base: MMDiT, change: dict[str, Any], message: str):
    config = replace(EIGHT, **change)
    with pytest.raises(ValueError, match=f"does not fit its base.*{message}"):
        controlled(base, [Control(ControlNet(config), hint())])
    with pytest.raises(ValueError, match=message):
        ControlNet.from_base(base, config, "blur")


def test_other_mistakes_are_clear_errors_too(base: MMDiT):
    net = ControlNet(EIGHT)
    with pytest.raises(ValueError, match="float16 and its base in torch.float32"):
        controlled(base, [Control(ControlNet(EIGHT).half(), hint())])
    with pytest.raises(ValueError, match="of the size that is drawn"):
        controlled(base, [Control(net, hint()[..., :4])])(**inputs())
    with pytest.raises(ValueError, match=r"start 0.5 and end 0.2"):
        Control(net, hint(), start=0.5, end=0.2)
    with pytest.raises(ValueError, match="needs the schedule"):
        controlled(base, [Control(net, hint(), end=0.5)])
    with pytest.raises(ValueError, match="kind is 'pose'"):
        ControlNet.from_base(base, EIGHT, "pose")


def test_the_presets_controlnets_fit_their_bases():
    for preset in PRESETS.values():
        if preset.controlnet:
            with torch.device("meta"):
                controlled(MMDiT(preset.mmdit), [Control(ControlNet(preset.controlnet), torch.empty(1))])


# --- hints ------------------------------------------------------------------------------------------------------------------------


def grey(levels: Any) -> Tensor:
    """Levels from 0 to 255 (H W) as a picture."""
    return (torch.as_tensor(levels, dtype=torch.float32) / 127.5 - 1).expand(1, 3, -1, -1)


def test_canny_draws_a_squares_outline():
    square = torch.zeros(32, 40)
    square[8:24, 10:30] = 255
    edges = canny(grey(square))
    assert edges.shape == (1, 3, 32, 40) and set(edges.unique().tolist()) == {-1, 1}
    on = edges[0, 0] > 0
    rim = torch.zeros_like(on)
    rim[7:25, 9:31] = True
    rim[9:23, 11:29] = False
    assert not (on & ~rim).any()  # nothing but within a pixel of the boundary
    assert on[16].sum() == 2 and on[:, 20].sum() == 2  # one pixel thin, on both sides
    assert on[10:22].any(1).all() and on[:, 12:28].any(0).all()  # and without gaps
    assert not (canny(grey(torch.full((16, 16), 90))) > 0).any()


def test_canny_equals_opencv():
    noise = np.random.default_rng(0).integers(0, 256, (12, 32), dtype=np.uint8)
    opencv = """5c6721b3 44186308 c4238405 10c01401 e9303448 8e206248
                4a18aa48 99a048c0 01120410 00d214d0 e1401fa0 01431938"""  # OpenCV 4.14: Canny(noise, 400, 700), a row a number
    rows = (canny(grey(noise), 400, 700)[0, 0] > 0).int().tolist()
    assert [f"{int(''.join(map(str, row)), 2):08x}" for row in rows] == opencv.split()


def test_a_faint_edge_counts_where_it_goes_on_from_a_strong_one():
    faint, mixed = torch.zeros(20, 20), torch.zeros(20, 20)
    faint[:, 10:] = 40  # a slope of 160, between the two thresholds
    mixed[:, 10:] = 40
    mixed[:5, 10:] = 60  # of 240, above both
    assert not (canny(grey(faint)) > 0).any()
    assert (canny(grey(mixed))[0, 0, 8:] > 0).any(1).all()
    assert (canny(grey(faint), 50, 100)[0, 0] > 0).any(1).all()
    assert not (canny(grey(mixed), sigma=2) > 0).any()  # blurred, even the strong one is too soft


def test_blur_is_a_gaussian():
    point = torch.zeros(1, 3, 41, 41)
    point[..., 20, 20] = 1
    bell = blur(point, 3)[0, 0]
    across = torch.arange(41.0) - 20
    assert_close(bell.sum(), torch.tensor(1.0))
    assert_close((bell.sum(0) * across**2).sum().sqrt(), torch.tensor(3.0), rtol=0.02, atol=0)
    assert_close(bell, bell.T)
    assert_close(blur(point), blur(point, 41 / 32))
    flat = torch.full((2, 3, 16, 24), 0.3)
    assert_close(blur(flat, 8), flat)
    with pytest.raises(ValueError, match="sigma is -1"):
        blur(flat, -1)


def test_depth_is_as_bright_as_near():
    nearness = scene(3).depth()[None]
    made = depth(nearness)
    assert made.shape == (1, 3, 128, 128) and made.min() == -1 and made.max() <= 1
    assert_close((made[:, :1] + 1) / 2, nearness)
    with pytest.raises(ValueError, match=r"\(B 1 H W\)"):
        depth(nearness[0])
    assert set(HINTS) == {"blur", "canny"}


def test_hints_become_normalised_latents_as_each_net_was_trained():
    vae = random(VAE(VAEConfig(width=8, multipliers=(1, 2), latent_channels=4, blocks=1, groups=4)), 0)
    picture = canny(grey(torch.eye(16) * 255))
    net = ControlNet(EIGHT)
    assert net.control_type is not None
    for code, kind in enumerate(["blur", "canny", "depth", "canny"]):
        net.control_type.fill_(code)
        assert net.kind == kind
        given = picture if code != RELEASED_CANNY else torch.where(picture > 0, 128.0, 0.5)
        assert_close(net.encode_hint(vae, picture), vae.normalize(vae.encode(given)[0]))
    sample = net.encode_hint(vae, picture, Generator().manual_seed(3))
    assert_close(sample, vae.normalize(vae.sample(*vae.encode(picture), Generator().manual_seed(3))))
    assert_close(ControlNet(TWO).encode_hint(vae, picture), vae.normalize(vae.encode(picture)[0]))
