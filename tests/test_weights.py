"""Weight files: what is told from a header, both layouts there and back, what loading costs, and what is said of files that do not fit."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minisd3 import weights
from minisd3.config import PRESETS, ControlNetConfig, MMDiTConfig, VAEConfig
from minisd3.controlnet import ControlNet
from minisd3.formats import WeightsError, find_parts, read_header, read_metadata
from minisd3.mmdit import MMDiT
from minisd3.vae import VAE

FACTS = Path(__file__).parent / "facts"
SMALL = MMDiTConfig(
    depth=3, head_dim=16, pos_embed_max_size=8, context_dim=24, pooled_dim=20, qk_norm="rms", dual_attention_layers=(0, 1)
)
SMALL_VAE = VAEConfig(width=8, multipliers=(1, 2, 2), latent_channels=16, blocks=1, groups=4)
SMALL_CONTROL = ControlNetConfig(depth=2, num_heads=3, head_dim=16, pooled_dim=20)


def filled(model: Any) -> Any:
    """The model with random numbers everywhere, so that nothing is right by being zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.eval()


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether all tensors are equal to the bit, and of the same type."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def fake(path: Path, shapes: Mapping[str, tuple[int, ...] | list[int]], dtype: str = "F16", size: int = 2) -> Path:
    """A safetensors file of zeros that takes no room on the disk, whatever its size."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + size * int(torch.Size(shape).numel())
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + end)
    return path


def facts(name: str) -> dict[str, list[int]]:
    return json.loads((FACTS / f"{name}.keys.json").read_text())


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


@pytest.fixture(scope="module")
def mmdit() -> MMDiT:
    return filled(MMDiT(SMALL))


@pytest.fixture(scope="module")
def vae() -> VAE:
    return filled(VAE(SMALL_VAE))


@pytest.fixture(scope="module")
def controlnet() -> ControlNet:
    net = filled(ControlNet(SMALL_CONTROL))
    net.control_type.fill_(2)
    return net


@pytest.fixture
def single(tmp_path: Path, mmdit: MMDiT, vae: VAE) -> Path:
    """A released single file."""
    weights.save_released(tmp_path / "model.safetensors", mmdit, vae)
    return tmp_path / "model.safetensors"


# --- the released files, by their names and shapes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "presets", "parameters", "tensors"),
    [
        ("sd3_medium", ("sd3-medium",), 2_028_328_000, 491),
        ("sd3.5_medium", ("sd3.5-medium",), 2_243_171_520, 665),
        ("sd3.5_large", ("sd3.5-large", "sd3.5-large-turbo"), 8_056_627_520, 923),
    ],
)
def test_a_released_file_is_told_by_its_header(
    tmp_path: Path, name: str, presets: tuple[str, ...], parameters: int, tensors: int
) -> None:
    path = fake(tmp_path / "file.safetensors", facts(name))
    transformer, vae = weights.detect(path)
    assert (transformer.kind, transformer.presets, transformer.parameters) == ("transformer", presets, parameters)
    assert (vae.kind, vae.config, vae.parameters) == ("VAE", VAEConfig(), 83_819_683)
    parts = find_parts(read_header(path))
    models = on_meta(lambda: MMDiT(PRESETS[presets[0]].mmdit)), on_meta(VAE)
    assert [part.shapes for part in parts] == [shapes_of(model) for model in models]
    assert [len(model.state_dict()) for model in models] == [tensors, 244]
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [parameters, 83_819_683]


def test_a_released_controlnet_is_told_by_its_header(tmp_path: Path) -> None:
    path = fake(tmp_path / "file.safetensors", facts("sd3.5_large_controlnet"))
    (found,) = weights.detect(path)
    assert (found.kind, found.layout, found.config) == ("ControlNet", "released", PRESETS["sd3.5-large"].controlnet)
    assert find_parts(read_header(path))[0].shapes == shapes_of(on_meta(lambda: ControlNet(ControlNetConfig())))


def test_describe_names_every_part(tmp_path: Path) -> None:
    text = weights.describe(fake(tmp_path / "file.safetensors", facts("sd3.5_medium")))
    for expected in (
        "909 tensors",
        "5,107.1 MB",
        "transformer, released layout: 2,243,171,520 parameters in F16",
        "sd3.5-medium",
        "a VAE",
    ):
        assert expected in text


# --- there and back -----------------------------------------------------------------------------------------------------------------


def test_a_single_file_comes_back_to_the_bit(single: Path, mmdit: MMDiT, vae: VAE, tmp_path: Path) -> None:
    loaded, loaded_vae = weights.load_mmdit(single), weights.load_vae(single)
    assert same(loaded, mmdit) and loaded.config == SMALL
    assert same(loaded_vae, vae) and loaded_vae.config == SMALL_VAE  # groups too, from the metadata
    assert not loaded.training
    weights.save_released(tmp_path / "again.safetensors", loaded, loaded_vae)
    before, after = load_file(single), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert read_metadata(tmp_path / "again.safetensors") == read_metadata(single)


def test_the_diffusers_layout_comes_back_to_the_bit(tmp_path: Path, mmdit: MMDiT, vae: VAE, controlnet: ControlNet) -> None:
    models: list[Any] = [mmdit, vae, controlnet]
    loaders: list[Any] = [weights.load_mmdit, weights.load_vae, weights.load_controlnet]
    for folder, model in zip(("transformer", "vae", "controlnet"), models, strict=True):
        weights.save_diffusers(tmp_path / folder, model)
    for load, model in zip(loaders, models, strict=True):
        loaded = load(tmp_path)  # each finds its own folder in the pipeline's
        assert same(loaded, model) and loaded.config == model.config
    (found,) = weights.detect(tmp_path / "transformer")
    assert (found.kind, found.layout, found.config) == ("transformer", "diffusers", SMALL)


@pytest.mark.parametrize("form", ["8b", "2b"])
def test_a_controlnet_comes_back_to_the_bit(tmp_path: Path, form: Any) -> None:
    net = filled(ControlNet(replace(SMALL_CONTROL, form=form)))
    weights.save_released(tmp_path / "net.safetensors", net)
    loaded = weights.load_controlnet(tmp_path / "net.safetensors")
    assert same(loaded, net) and loaded.config == net.config
    assert loaded.control_type is None or loaded.control_type.dtype == torch.int32


VARIANTS = [
    replace(SMALL, qk_norm=None, dual_attention_layers=()),
    replace(SMALL, qk_norm="layer", mlp="swiglu", mlp_ratio=4),
    replace(SMALL, block_norm="rms", dual_attention_dropout=0.25),
    replace(SMALL, scale_mod_only=True, dual_attention_layers=(), registers=5),
    replace(SMALL, depth=1, dual_attention_layers=(), patch_size=4, in_channels=4, mlp_ratio=2),
]


@pytest.mark.parametrize("config", VARIANTS)
def test_every_variant_is_told_from_its_file(tmp_path: Path, config: MMDiTConfig) -> None:
    model = filled(MMDiT(config))
    weights.save_released(tmp_path / "model.safetensors", model)
    loaded = weights.load_mmdit(tmp_path / "model.safetensors")
    assert loaded.config == config and same(loaded, model)


def test_what_is_given_by_name_overrides_the_file(single: Path) -> None:
    assert weights.load_mmdit(single, block_norm="rms").config == replace(SMALL, block_norm="rms")
    assert weights.load_vae(single, scale=2.0, groups=2).config == replace(SMALL_VAE, scale=2.0, groups=2)


# --- diffusers reads ours and we read diffusers' --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, VARIANTS[0], replace(SMALL, qk_norm="layer")])
def test_diffusers_computes_the_same_from_our_transformer(tmp_path: Path, config: MMDiTConfig) -> None:
    ours = filled(MMDiT(config))
    weights.save_diffusers(tmp_path, ours)
    theirs = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path)
    x, t, context, pooled = torch.randn(2, 16, 8, 6), torch.tensor([0.3, 0.9]), torch.randn(2, 5, 24), torch.randn(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t, context, pooled), theirs(x, context, pooled, t * 1000).sample, rtol=1e-4, atol=1e-5)


def test_diffusers_computes_the_same_from_our_vae(tmp_path: Path, vae: VAE) -> None:
    weights.save_diffusers(tmp_path, vae)
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    assert (theirs.config.scaling_factor, theirs.config.shift_factor) == (1.5305, 0.0609)
    image, latent = torch.randn(1, 3, 16, 24), torch.randn(1, 16, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(vae.encode(image)[0], theirs.encode(image).latent_dist.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(vae.decode(latent), theirs.decode(latent).sample, rtol=1e-4, atol=1e-5)


def test_diffusers_computes_the_same_from_our_controlnet(tmp_path: Path, controlnet: ControlNet, mmdit: MMDiT) -> None:
    weights.save_diffusers(tmp_path, controlnet)
    theirs = diffusers.SD3ControlNetModel.from_pretrained(tmp_path)
    x, hint, t, pooled = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8), torch.tensor([0.3, 0.9]), torch.randn(2, 20)
    with torch.no_grad():
        tokens = mmdit.x_embedder(x) + mmdit.cropped_positions(4, 4)
        expected = theirs(tokens, hint, pooled_projections=pooled, timestep=t * 1000).controlnet_block_samples
        for one, other in zip(controlnet(mmdit, x, hint, t, pooled), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_sharded_folder_of_diffusers_is_read(tmp_path: Path) -> None:
    theirs: Any = diffusers.SD3Transformer2DModel(
        sample_size=8, num_layers=3, attention_head_dim=16, num_attention_heads=3, joint_attention_dim=24, caption_projection_dim=48,
        pooled_projection_dim=20, pos_embed_max_size=8, dual_attention_layers=(0, 1), qk_norm="rms_norm",
    )  # fmt: skip
    theirs.eval().save_pretrained(tmp_path / "transformer", max_shard_size="200KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    ours = weights.load_mmdit(tmp_path)
    assert ours.config == SMALL
    x, t, context, pooled = torch.randn(2, 16, 8, 8), torch.tensor([0.3, 0.9]), torch.randn(2, 5, 24), torch.randn(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t, context, pooled), theirs(x, context, pooled, t * 1000).sample, rtol=1e-4, atol=1e-5)
    next((tmp_path / "transformer").glob("*-00002-of-*")).unlink()
    with pytest.raises(WeightsError, match="lacks .*00002-of.*index.json"):
        weights.load_mmdit(tmp_path)


@pytest.mark.parametrize(
    "model", [lambda: MMDiT(VARIANTS[3]), lambda: MMDiT(VARIANTS[1]), lambda: ControlNet(replace(SMALL_CONTROL, form="2b"))]
)
def test_what_diffusers_has_no_form_of_is_not_saved_as_its_own(tmp_path: Path, model: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="diffusers has no .* save it in the released layout"):
        weights.save_diffusers(tmp_path, model())
    assert not list(tmp_path.iterdir())


def test_a_diffusers_controlnet_asks_for_its_kind_of_hint(tmp_path: Path, controlnet: ControlNet) -> None:
    weights.save_diffusers(tmp_path, controlnet)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path), path, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"pass load_controlnet control_type: 0 \(blur\), 1 \(canny\), 2 \(depth\)"):
        weights.load_controlnet(tmp_path)
    assert same(weights.load_controlnet(tmp_path, control_type=2), controlnet)
    named = tmp_path / "canny" / "models--someone--a-Depth-controlnet" / "snapshots" / "0123"  # as the hub's cache names it
    named.mkdir(parents=True)
    for file in tmp_path.glob("*.*"):
        file.rename(named / file.name)
    assert same(weights.load_controlnet(named), controlnet)


# --- number types, devices, memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_stored_types_become_the_type_asked_for(tmp_path: Path, mmdit: MMDiT, controlnet: ControlNet, stored: torch.dtype) -> None:
    weights.save_released(tmp_path / "model.safetensors", mmdit, dtype=stored)
    loaded = weights.load_mmdit(tmp_path / "model.safetensors", dtype=torch.float32)
    for name, tensor in loaded.state_dict().items():  # pos_embed, a buffer, among them
        assert torch.equal(tensor, mmdit.state_dict()[name].to(stored).float())
    kept = torch.bfloat16 if stored == torch.float8_e4m3fn else stored
    assert {t.dtype for t in weights.load_mmdit(tmp_path / "model.safetensors").state_dict().values()} == {kept}
    weights.save_released(tmp_path / "control.safetensors", controlnet, dtype=stored)
    kind = weights.load_controlnet(tmp_path / "control.safetensors", dtype=torch.float16).control_type
    assert kind is not None and kind.dtype == torch.int32 and kind.item() == 2


def test_a_file_of_mixed_types_gets_the_one_of_most_of_it(single: Path) -> None:
    tensors = {name: t if name.endswith("pos_embed") else t.half() for name, t in load_file(single).items()}
    save_file(tensors, single, {"format": "pt"})
    assert {t.dtype for t in weights.load_mmdit(single).state_dict().values()} == {torch.float16}


def test_changing_a_loaded_model_leaves_its_file_alone(single: Path) -> None:
    before = single.read_bytes()
    loaded = weights.load_mmdit(single)
    with torch.no_grad():
        loaded.context_embedder.weight.add_(1)
    assert loaded.context_embedder.weight.requires_grad
    assert single.read_bytes() == before


PEAK = """
import sys, torch
from pathlib import Path
from minisd3.weights import load_mmdit

def memory(name):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))

load_mmdit(sys.argv[1])  # a small one first: what PyTorch imports when it is first used is not the file's doing
for path in sys.argv[2:]:
    for dtype in torch.float32, torch.bfloat16:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory("VmRSS")
        model = load_mmdit(path, dtype=dtype)
        used = sum(float(t.flatten()[::512].sum()) for t in model.state_dict().values())  # every page of 4096 bytes
        print(memory("VmHWM") - before)
        del model
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_loading_takes_little_more_memory_than_the_file(tmp_path: Path, single: Path) -> None:
    model = MMDiT(replace(SMALL, depth=4, head_dim=128, dual_attention_layers=(0,)))
    fake(tmp_path / "released.safetensors", shapes_of(model), "F32", 4)
    weights.save_diffusers(tmp_path / "diffusers", model)
    size = (tmp_path / "released.safetensors").stat().st_size
    assert size > 140e6
    command = [sys.executable, "-c", PEAK, str(single), str(tmp_path / "released.safetensors"), str(tmp_path / "diffusers")]
    peaks = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(peaks) == 4 and max(int(peak) for peak in peaks) <= 1.1 * size, f"peaks {peaks} for files of {size} bytes"


# --- files that do not fit ----------------------------------------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrite a file with changed tensors, its metadata kept."""
    tensors, metadata = load_file(path), read_metadata(path)
    change(tensors)
    save_file(tensors, path, metadata)


BLOCK = "model.diffusion_model.joint_blocks."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 2\n", "Git LFS pointer.*git lfs pull"),
        (b"PK\x03\x04" + bytes(200), "pickle.*never read"),
        (b"\x80\x02}q\x00(X\x05\x00\x00\x00" + bytes(200), "pickle.*never read"),
        (b"GGUF\x03\x00\x00\x00" + bytes(200), "GGUF"),
        (b"<!DOCTYPE html><html><body>log in</body></html>", "web page"),
        (b"", r"not a safetensors file \(0 bytes\)"),
        (b"\xff" * 64, r"not a safetensors file \(64 bytes\)"),
        (
            struct.pack("<Q", 900) + b'{"a": {"dtype": "F32", "sha',
            "cut short or damaged inside its header: 35 bytes of at least 908",
        ),
    ],
)
def test_a_file_of_another_format_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    for read in (weights.load_mmdit, weights.load_vae, weights.load_controlnet, weights.describe):
        with pytest.raises(WeightsError, match=f"model.safetensors is .*{message}"):
            read(path)


def test_a_truncated_file_is_told_by_its_size(single: Path) -> None:
    whole = single.read_bytes()
    single.write_bytes(whole[:-1000])
    with pytest.raises(WeightsError, match=f"cut short: {len(whole) - 1000:,} bytes of {len(whole):,}; fetch it again"):
        weights.load_vae(single)
    single.write_bytes(whole + b"more")
    with pytest.raises(WeightsError, match="damaged"):
        weights.load_vae(single)


def test_missing_files_and_folders_are_told_with_what_is_there(tmp_path: Path, single: Path) -> None:
    with pytest.raises(WeightsError, match="modle.safetensors does not exist; .* holds model.safetensors"):
        weights.load_mmdit(tmp_path / "modle.safetensors")
    with pytest.raises(WeightsError, match="does not exist; nor does the folder"):
        weights.load_mmdit(tmp_path / "no" / "model.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="name a file in it: .* holds model.safetensors, other.safetensors"):
        weights.load_mmdit(tmp_path)


@pytest.mark.parametrize(
    ("names", "looks"),
    [
        (["transformer_blocks.0.attn.to_q.lora_A.weight", "transformer_blocks.0.attn.to_q.lora_B.weight"], "LoRA"),
        (["text_model.encoder.layers.0.mlp.fc1.weight", "text_model.embeddings.token_embedding.weight"], "CLIP text encoder"),
        (["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"], "T5 text encoder"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "UNet of Stable Diffusion 1, 2 or XL"),
        (["double_blocks.0.img_attn.qkv.weight", "img_in.weight"], "FLUX transformer"),
        (["layer1.weight"], r"model that is not known here \(its names begin with layer1.weight\)"),
    ],
)
def test_another_model_is_named(tmp_path: Path, names: list[str], looks: str) -> None:
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "file.safetensors")
    with pytest.raises(WeightsError, match=f"holds no transformer; it looks like a {looks}: load_mmdit takes SD3"):
        weights.load_mmdit(tmp_path / "file.safetensors")
    assert looks.split(r" \(")[0] in weights.describe(tmp_path / "file.safetensors")


def test_a_mislabelled_model_is_told_with_its_loader(tmp_path: Path, vae: VAE, single: Path) -> None:
    weights.save_released(tmp_path / "vae.safetensors", vae)
    with pytest.raises(WeightsError, match="holds no transformer; it looks like a VAE: load that with load_vae"):
        weights.load_mmdit(tmp_path / "vae.safetensors")
    with pytest.raises(WeightsError, match="holds no ControlNet; it looks like a .*load_(mmdit|vae), load_(mmdit|vae)"):
        weights.load_controlnet(single)


def test_names_that_do_not_fit_are_listed_at_most_ten_each(single: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{BLOCK}1.context_block")]:
            del tensors[name]
        tensors[f"{BLOCK}0.extra"] = torch.zeros(1)

    edit(single, change)
    with pytest.raises(WeightsError) as caught:
        weights.load_mmdit(single)
    message = str(caught.value)
    assert "nearest preset tiny" in message and "12 missing: joint_blocks.1.context_block" in message and "and 2 more" in message
    assert "1 unexpected: joint_blocks.0.extra" in message


def test_a_wrong_shape_is_told(single: Path) -> None:
    edit(single, lambda tensors: tensors.update({f"{BLOCK}1.x_block.attn.proj.weight": torch.zeros(48, 47)}))
    with pytest.raises(
        WeightsError, match=r"1 wrongly shaped: joint_blocks.1.x_block.attn.proj.weight is \(48, 47\), not \(48, 48\)"
    ):
        weights.load_mmdit(single)


@pytest.mark.parametrize("name", ["x_embedder.proj.weight", "context_embedder.weight", "pos_embed"])
def test_a_file_without_what_tells_its_config_is_told(single: Path, name: str) -> None:
    edit(single, lambda tensors: tensors.pop(f"model.diffusion_model.{name}"))
    with pytest.raises(WeightsError, match=f"looks like a transformer, but {name}, which tells its config, is missing"):
        weights.load_mmdit(single)
    assert name in weights.describe(single)  # and the VAE beside it is still described
    assert weights.load_vae(single).config == SMALL_VAE


def test_a_tensor_of_the_wrong_rank_is_told(single: Path) -> None:
    edit(single, lambda tensors: tensors.update({"first_stage_model.decoder.conv_in.weight": torch.zeros(16)}))
    with pytest.raises(WeightsError, match=r"looks like a VAE, but decoder.conv_in.weight, which tells its config, is \(16,\)"):
        weights.load_vae(single)


def test_queries_keys_and_values_that_do_not_fit_together_are_told(tmp_path: Path, mmdit: MMDiT) -> None:
    weights.save_diffusers(tmp_path, mmdit)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    edit(path, lambda tensors: tensors.pop("transformer_blocks.1.attn.to_k.weight"))
    with pytest.raises(
        WeightsError, match="three tensors of one shape, not .*blocks.1.attn.to_q.weight.*blocks.1.attn.to_v.weight"
    ):
        weights.load_mmdit(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "x.safetensors.index.json"])
def test_a_damaged_json_beside_the_weights_is_told(tmp_path: Path, vae: VAE, name: str) -> None:
    weights.save_diffusers(tmp_path, vae)
    (tmp_path / name).write_text("<html>")
    with pytest.raises(WeightsError, match=f"{name} is no JSON object .*; fetch it again"):
        weights.load_vae(tmp_path)


def test_text_encoders_are_described(tmp_path: Path) -> None:
    shapes = {
        "text_encoders.clip_g.transformer.text_model.embeddings.token_embedding.weight": (49408, 1280),
        "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.bias": (5120,),
        "text_encoders.t5xxl.transformer.shared.weight": (32128, 4096),
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096),
    }
    clip, t5 = weights.detect(fake(tmp_path / "file.safetensors", shapes))
    assert (clip.kind, t5.kind) == ("CLIP text encoder (clip_g)", "T5 text encoder (t5)")
    assert "sd3.5-large" in clip.presets and "sd3-medium" in t5.presets and "tiny" not in clip.presets


def test_a_transformer_that_lost_its_last_blocks_is_told(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in facts("sd3_medium").items() if not name.startswith(f"{BLOCK}23.")}
    with pytest.raises(
        WeightsError, match="23 blocks do not go with a width of 1536; blocks are missing if this is to be sd3-medium"
    ):
        weights.load_mmdit(fake(tmp_path / "file.safetensors", shapes))


def test_groups_that_cannot_be_known_are_asked_for(tmp_path: Path, vae: VAE) -> None:
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")  # without our metadata
    with pytest.raises(WeightsError, match="looks like a VAE, but .* groups=32"):
        weights.load_vae(tmp_path / "vae.safetensors")
    assert same(weights.load_vae(tmp_path / "vae.safetensors", groups=4), vae)


# --- writing --------------------------------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_nothing_else(single: Path, mmdit: MMDiT, vae: VAE) -> None:
    before = single.read_bytes()
    with pytest.raises(TypeError):
        weights.save_released(single, mmdit, metadata={"numbers": 3})  # type: ignore[dict-item]
    assert single.read_bytes() == before and [file.name for file in single.parent.iterdir()] == [single.name]
    weights.save_released(single, vae, metadata={"licence": "MIT"})
    assert read_metadata(single)["licence"] == "MIT"
    assert single.stat().st_mode & 0o777 == 0o644
