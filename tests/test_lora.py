"""LoRA: nothing at first, the same merged and beside, the same as diffusers makes of it, and files of every common layout."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from minisd3 import weights
from minisd3.config import MMDiTConfig
from minisd3.formats import WeightsError
from minisd3.lora import ATTENTION, LoRALinear, add_lora, apply_lora, read_lora, save_lora
from minisd3.mmdit import MMDiT
from minisd3.training import OnlyAdamW, averaged, fit

CONFIG = MMDiTConfig(
    depth=2, head_dim=8, pos_embed_max_size=4, context_dim=12, pooled_dim=6, qk_norm="rms", dual_attention_layers=(0,)
)
EVERY = r"attn|mlp\.|adaLN|linear|context_embedder"  # layers of every kind of name


def base() -> MMDiT:
    generator = Generator().manual_seed(0)
    mmdit = MMDiT(CONFIG)
    for p in mmdit.parameters():
        nn.init.normal_(p, std=0.2, generator=generator)
    return mmdit.eval()


def inputs() -> tuple[Tensor, ...]:
    g = Generator().manual_seed(1)
    return (
        torch.randn(2, 16, 8, 8, generator=g),
        torch.rand(2, generator=g),
        *(torch.randn(2, *s, generator=g) for s in ((5, 12), (6,))),
    )


def adapted(layers: str = ATTENTION, *, rank: int = 3, alpha: float = 6.0) -> MMDiT:
    """With a LoRA that is not zero."""
    mmdit, generator = base(), Generator().manual_seed(2)
    add_lora(mmdit, rank, alpha=alpha, layers=layers, generator=generator)
    for module in mmdit.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.up, std=0.1, generator=generator)
    return mmdit


@torch.no_grad()
def output(mmdit: nn.Module) -> Tensor:
    return mmdit(*inputs())


def test_a_fresh_one_changes_nothing_and_trains_only_itself() -> None:
    mmdit = base()
    add_lora(mmdit, 3)
    assert torch.equal(output(mmdit), output(base()))
    trained = {name for name, p in mmdit.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in mmdit.named_parameters() if name.endswith((".down", ".up"))}
    assert (
        len(trained) == 2 * 9
    )  # qkv and proj of 2 picture blocks, 1 second attention and 1 text block; qkv of the last text block
    assert set(base().state_dict()) == {name for name in mmdit.state_dict() if name not in trained}


@pytest.mark.parametrize("layers", [ATTENTION, EVERY])
def test_merged_is_the_same_as_beside(tmp_path: Path, layers: str) -> None:
    mmdit, merged = adapted(layers), base()
    save_lora(tmp_path / "lora.safetensors", mmdit)
    apply_lora(merged, tmp_path / "lora.safetensors")
    assert (output(mmdit) - output(base())).abs().max() > 0.1
    torch.testing.assert_close(output(merged), output(mmdit), rtol=0, atol=2e-5)
    apply_lora(merged, tmp_path / "lora.safetensors", strength=-1.0)
    torch.testing.assert_close(output(merged), output(base()), rtol=0, atol=2e-5)


def test_a_file_comes_back_to_the_bit(tmp_path: Path) -> None:
    mmdit = adapted(EVERY)
    save_lora(tmp_path / "lora.safetensors", mmdit)
    found = read_lora(tmp_path / "lora.safetensors", base())
    own = {name: module for name, module in mmdit.named_modules() if isinstance(module, LoRALinear)}
    assert found.keys() == own.keys()
    for name, (down, up) in found.items():
        assert torch.equal(down, own[name].down) and torch.equal(up, 2 * own[name].up)  # 2: alpha / rank
    again = base()
    add_lora(again, 3, layers=EVERY)
    again.load_state_dict({f"{name}.{kind}": x for name, pair in found.items() for kind, x in pair._asdict().items()}, strict=False)
    save_lora(tmp_path / "again.safetensors", again)
    a, b = load_file(tmp_path / "lora.safetensors"), load_file(tmp_path / "again.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def theirs(tmp_path: Path) -> Any:
    """diffusers' transformer with the weights of base()."""
    weights.save_diffusers(tmp_path / "transformer", base())
    return diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")


@torch.no_grad()
def their_output(theirs: Any) -> Tensor:
    x, t, context, pooled = inputs()
    return theirs(x, context, pooled, 1000 * t, return_dict=False)[0]


@pytest.mark.parametrize("layers", [ATTENTION, EVERY])
def test_diffusers_reads_ours_and_draws_the_same(tmp_path: Path, theirs: Any, layers: str) -> None:
    save_lora(tmp_path / "lora.safetensors", adapted(layers))
    pipeline = diffusers.StableDiffusion3Pipeline
    pipeline.load_lora_into_transformer(pipeline.lora_state_dict(str(tmp_path / "lora.safetensors")), theirs)
    torch.testing.assert_close(output(adapted(layers)), their_output(theirs), rtol=0, atol=5e-5)


def test_one_made_by_diffusers_draws_the_same_here(tmp_path: Path, theirs: Any) -> None:
    before = their_output(theirs)
    layers = ["to_q", "to_v", "to_out.0", "add_k_proj", "norm_out.linear", "norm1_context.linear", "ff.net.2", "context_embedder"]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        theirs.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, target_modules=layers))
    theirs.save_lora_adapter(tmp_path / "made", weight_name="lora.safetensors")
    mmdit, expected = base(), their_output(theirs)
    apply_lora(mmdit, tmp_path / "made" / "lora.safetensors")
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(output(mmdit), expected, rtol=0, atol=5e-5)


# --- layouts ----------------------------------------------------------------------------------------------------------------------

QKV, TO = "joint_blocks.0.x_block.attn.qkv", "transformer_blocks.0.attn.to_"
G = Generator().manual_seed(3)
DOWN, UP = [torch.randn(3, 16, generator=G) for _ in "qkv"], [torch.randn(16, 3, generator=G) for _ in "qkv"]
APART = torch.cat([up @ down for down, up in zip(DOWN, UP, strict=True)])
FUSED_UP = torch.cat(UP)
LAYOUTS: dict[str, tuple[dict[str, Tensor], Tensor]] = {
    "diffusers": (
        {f"transformer.{TO}{p}.lora_{ab}.weight": x for p, d, u in zip("qkv", DOWN, UP, strict=True) for ab, x in (("A", d), ("B", u))},
        APART,
    ),
    "diffusers, old, without v": (
        {f"transformer.{TO}{p}.lora.{w}.weight": x for p, d, u in zip("qk", DOWN, UP, strict=False) for w, x in (("down", d), ("up", u))},
        torch.cat([APART[:32], torch.zeros(16, 16)]),
    ),
    "PEFT": (
        {f"base_model.model.{TO}v.lora_A.default.weight": DOWN[2], f"base_model.model.{TO}v.lora_B.default.weight": UP[2]},
        torch.cat([torch.zeros(32, 16), APART[32:]]),
    ),
    "kohya": (
        {f"lora_unet_{QKV.replace('.', '_')}.{name}": x
         for name, x in (("lora_down.weight", DOWN[0]), ("lora_up.weight", FUSED_UP), ("alpha", torch.tensor(1.5)))},
        0.5 * FUSED_UP @ DOWN[0],
    ),
    "ComfyUI": (
        {f"diffusion_model.{QKV}.lora_A.weight": DOWN[0], f"diffusion_model.{QKV}.lora_B.weight": FUSED_UP},
        FUSED_UP @ DOWN[0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_common_layout_is_read(tmp_path: Path, layout: str) -> None:
    tensors, expected = LAYOUTS[layout]
    save_file(tensors, tmp_path / "lora.safetensors")
    mmdit = base()
    assert read_lora(tmp_path / "lora.safetensors", mmdit).keys() == {QKV}
    apply_lora(mmdit, tmp_path / "lora.safetensors", strength=0.7)
    change = mmdit.get_parameter(f"{QKV}.weight") - base().get_parameter(f"{QKV}.weight")
    torch.testing.assert_close(change.detach(), 0.7 * expected, rtol=0, atol=1e-5)


def test_alpha_may_stand_in_the_metadata(tmp_path: Path) -> None:
    tensors, expected = LAYOUTS["diffusers"]
    save_file(
        tensors,
        tmp_path / "lora.safetensors",
        {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6, "transformer.r": 3})},
    )
    [(down, up)] = read_lora(tmp_path / "lora.safetensors", base()).values()
    torch.testing.assert_close(up @ down, 2 * expected)
    save_file(tensors, tmp_path / "dora.safetensors", {"lora_adapter_metadata": json.dumps({"transformer.use_dora": True})})
    with pytest.raises(WeightsError, match="is a LoRA of a kind that is not read here: it sets use_dora"):
        read_lora(tmp_path / "dora.safetensors", base())


def wrong(change: Callable[[dict[str, Tensor]], object]) -> dict[str, Tensor]:
    tensors = dict(LAYOUTS["ComfyUI"][0])
    change(tensors)
    return tensors


NAME = f"diffusion_model.{QKV}"
WRONG = [
    (wrong(lambda x: x.update({"text_encoder.layers.0.lora_A.weight": DOWN[1]})), "no LoRA of .* it holds text_encoder.layers.0.lora_A.weight"),
    (wrong(lambda x: x.update({f"{NAME}.dora_scale": DOWN[1]})), f"it holds {NAME}.dora_scale"),
    (wrong(lambda x: x.pop(f"{NAME}.lora_B.weight")), r"joint_blocks_0_x_block_attn_qkv|qkv needs down .* has {'down': \(3, 16\)}"),
    (wrong(lambda x: x.update({f"{NAME}.lora_A.weight": torch.ones(3, 8)})), r"another transformer: its .*qkv is \(48, 8\), and this one's \(48, 16\)"),
    ({"model.diffusion_model.pos_embed": DOWN[0]}, "it holds model.diffusion_model.pos_embed"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "message"), WRONG)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    save_file(tensors, tmp_path / "lora.safetensors")
    mmdit = base()
    with pytest.raises(WeightsError, match=message):
        apply_lora(mmdit, tmp_path / "lora.safetensors")
    assert torch.equal(output(mmdit), output(base()))


def test_wrong_requests_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank is 0; it must be at least 1"):
        add_lora(base(), 0)
    with pytest.raises(ValueError, match="no linear layer's name matches 'conv'; they are t_embedder"):
        add_lora(base(), 4, layers="conv")
    with pytest.raises(ValueError, match="has a LoRA already; save_lora keeps it"):
        add_lora(adapted(), 2)
    with pytest.raises(ValueError, match="has no LoRA; add_lora gives it one"):
        save_lora(tmp_path / "x.safetensors", base())


def test_layers_of_some_blocks_keep_their_swapped_halves(tmp_path: Path) -> None:
    """The last text block's modulation is (shift, scale) here and (scale, shift) in diffusers, the first's alike in both."""
    for layers in (r"joint_blocks\.0\.context_block\.adaLN", r"joint_blocks\.1\.context_block\.adaLN"):
        mmdit, merged = adapted(layers), base()
        save_lora(tmp_path / "lora.safetensors", mmdit)
        apply_lora(merged, tmp_path / "lora.safetensors")
        torch.testing.assert_close(output(merged), output(mmdit), rtol=0, atol=2e-5)


def test_it_is_trained_by_the_same_loop(tmp_path: Path) -> None:
    mmdit, target = base(), output(adapted())

    def loss(module: nn.Module, step: int, generator: Generator) -> Tensor:
        return (module(*inputs()) - target).square().mean()

    add_lora(mmdit, 3, generator=Generator().manual_seed(0))
    losses = [p.loss for p in fit(mmdit, loss, tmp_path, steps=40, lr=0.3, optimizer=OnlyAdamW)]
    assert losses[-1] < 0.5 * losses[0]
    assert all(name.endswith((".down", ".up")) for name in averaged(tmp_path))
    assert (tmp_path / "checkpoint.safetensors").stat().st_size < 200_000
    frozen = base().state_dict()
    assert all(torch.equal(x, frozen[name]) for name, x in mmdit.state_dict().items() if name in frozen)


def test_half_precision_weights_stay_so(tmp_path: Path) -> None:
    save_lora(tmp_path / "lora.safetensors", adapted(), dtype=torch.float16)
    mmdit = base().bfloat16()
    apply_lora(mmdit, tmp_path / "lora.safetensors")
    assert mmdit.get_parameter(f"{QKV}.weight").dtype == torch.bfloat16
    fresh = base().bfloat16()
    add_lora(fresh, 2)
    assert output(fresh).dtype == torch.float32
