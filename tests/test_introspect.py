"""The recorder sees true attention and changes nothing; the tables tell what is known about the released models."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from minisd3 import introspect
from minisd3.config import PRESETS, ControlNetConfig, MMDiTConfig
from minisd3.controlnet import ControlNet
from minisd3.introspect import (
    AttentionMap,
    AttentionRecorder,
    ContextToken,
    context_tokens,
    entropy,
    gathered,
    over_heads,
    parameter_table,
    shape_table,
    text_columns,
    text_share,
    transformer_inputs,
)
from minisd3.mmdit import MMDiT
from minisd3.text import Row, Tokens, clip_tower, t5_tower
from minisd3.vae import VAE

FACTS = Path(__file__).parent / "facts"
TEXT, SIZE = 5, (3, 4)  # context tokens, patches
LENGTH = TEXT + SIZE[0] * SIZE[1]
CONFIG = MMDiTConfig(
    depth=3,
    head_dim=8,
    in_channels=4,
    pos_embed_max_size=8,
    context_dim=12,
    pooled_dim=10,
    qk_norm="rms",
    dual_attention_layers=(0, 1),
)


@pytest.fixture(scope="module")
def model() -> MMDiT:
    """With normal weights, since a new model's attention would be even."""
    generator = torch.Generator().manual_seed(0)
    made = MMDiT(CONFIG)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return made.requires_grad_(False)


def inputs(batch: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(4, 2 * SIZE[0], 2 * SIZE[1]), (TEXT, CONFIG.context_dim), (CONFIG.pooled_dim,)]
    x, context, pooled = (torch.randn(batch, *shape, generator=generator) for shape in shapes)
    return x, torch.full((batch,), 0.6), context, pooled


def by_hand(model: MMDiT, block: int, row: int, batch: int) -> tuple[Tensor, Tensor]:
    """The joint and the second attention's weights (N L L) of a dual block, written out."""
    seen: list[Tensor] = []
    joint = model.joint_blocks[block]
    with joint.register_forward_pre_hook(lambda _, args: seen.extend(args)):
        model(*inputs(batch))
    context, x, c = seen
    m = joint.x_block.modulation(c)
    text = joint.context_block.pre_attention(context, joint.context_block.modulation(c))
    image = joint.x_block.pre_attention(x, m)
    own = joint.x_block.attn2.project(joint.x_block.norm1(x) * (1 + m[7]) + m[6])
    q, k = torch.cat([text.q, image.q], dim=1)[row], torch.cat([text.k, image.k], dim=1)[row]
    return tuple(torch.einsum("qnd,knd->nqk", a, b).div(8**0.5).softmax(-1) for a, b in ((q, k), (own.q[row], own.k[row])))  # type: ignore[return-value]


@pytest.mark.parametrize("chunk", [introspect.CHUNK, 100])
def test_recorder_sees_the_softmax(model: MMDiT, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(introspect, "CHUNK", chunk)  # 100 weights: less than two queries at a time
    with AttentionRecorder(model, row=1) as recorder:
        model(*inputs(2))
    assert set(recorder.maps) == {(0, 0), (0, 1), (0, 2)} and set(recorder.second) == {(0, 0), (0, 1)}
    joint, second = by_hand(model, 1, row=1, batch=2)
    torch.testing.assert_close(recorder.maps[0, 1].weights, joint)
    torch.testing.assert_close(recorder.second[0, 1].weights, second)
    assert recorder.maps[0, 2].weights.shape == (3, LENGTH, LENGTH) and recorder.second[0, 0].weights.shape == (3, 12, 12)
    for kept in [*recorder.maps.values(), *recorder.second.values()]:
        torch.testing.assert_close(kept.weights.sum(-1), torch.ones(kept.weights.shape[:-1]))
        assert kept.size == SIZE and kept.weights.untyped_storage().nbytes() == kept.weights.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_bit_equal_with_the_recorder_on(model: MMDiT, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        plain = model(*inputs(2))
        with AttentionRecorder(model) as recorder, AttentionRecorder(model, row=1) as inner:  # they nest
            watched = model(*inputs(2))
    assert torch.equal(plain, watched) and not torch.equal(recorder.maps[0, 0].weights, inner.maps[0, 0].weights)
    assert recorder.maps[0, 0].weights.dtype == torch.float32


def test_gradients_pass_and_stay(model: MMDiT) -> None:
    x, *rest = inputs()
    x.requires_grad_()
    plain = torch.autograd.grad(model(x, *rest).square().sum(), x)[0]
    model.checkpointing = True
    with AttentionRecorder(model) as recorder:
        watched = torch.autograd.grad(model(x, *rest).square().sum(), x)[0]
    model.checkpointing = False
    assert torch.equal(plain, watched) and not recorder.maps[0, 0].weights.requires_grad and len(recorder.maps) == 3


def test_quadrants_and_heat_maps(model: MMDiT) -> None:
    with AttentionRecorder(model) as recorder:
        for _ in range(2):
            model(*inputs())
    kept = recorder.maps[1, 0]
    top = torch.cat([kept.quadrant("text", "text"), kept.quadrant("text", "image")], dim=-1)
    bottom = torch.cat([kept.quadrant("image", "text"), kept.quadrant("image", "image")], dim=-1)
    assert torch.equal(torch.cat([top, bottom], dim=-2), kept.weights) and bottom.shape == (3, 12, LENGTH)

    read, reading = kept.image_to_text([1, 3]), kept.text_to_image([1, 3])
    assert read.shape == reading.shape == (3, *SIZE)
    patch = TEXT + 1 * SIZE[1] + 2  # row 1, column 2
    torch.testing.assert_close(read[:, 1, 2], kept.weights[:, patch, 1] + kept.weights[:, patch, 3])
    torch.testing.assert_close(reading[:, 1, 2], (kept.weights[:, 1, patch] + kept.weights[:, 3, patch]) / 2)

    over = torch.stack([recorder.maps[step, block].image_to_text(2).mean(0) for step in (0, 1) for block in (1, 2)]).mean(0)
    torch.testing.assert_close(recorder.heat_map(2, blocks=[1, 2]), over)
    assert recorder.heat_map([0, 4], steps=[1]).shape == SIZE
    share = recorder.by_depth(lambda kept: kept.weights[..., :TEXT].sum(-1).mean())
    assert share.shape == (2, 3) and torch.equal(share[0], share[1]) and (share > 0).all() and (share < 1).all()


def test_reductions_on_the_fly_equal_those_afterwards(model: MMDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(introspect, "CHUNK", 100)
    with AttentionRecorder(model) as full:
        model(*inputs())
    for reduction in (text_columns, text_share, entropy, over_heads(text_columns)):
        with AttentionRecorder(model, reduce=reduction, blocks=[1]) as reduced:
            model(*inputs())
        assert set(reduced.maps) == {(0, 1)}
        torch.testing.assert_close(reduced.maps[0, 1].weights, reduction(full.maps[0, 1].weights, TEXT))
    torch.testing.assert_close(reduced.heat_map(3), full.heat_map(3, blocks=[1]))
    with pytest.raises(ValueError, match="of 17 keys this map keeps 5, not enough for image to image; record with reduce=whole"):
        reduced.maps[0, 1].quadrant("image", "image")
    even = torch.full((1, 1, 8), 1 / 8)
    torch.testing.assert_close(entropy(even, 2), torch.tensor(8.0).log().view(1, 1, 1))
    torch.testing.assert_close(text_share(even, 2), torch.tensor(0.25).view(1, 1, 1))


def test_a_map_that_is_too_large_says_what_to_do(model: MMDiT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(introspect, "LARGEST", 3000)
    with pytest.raises(ValueError, match="GiB; keep less"), AttentionRecorder(model):
        model(*inputs())
    with AttentionRecorder(model, reduce=over_heads(text_columns)) as recorder:
        model(*inputs())
    assert len(recorder.maps) == 3


def test_steps_rows_and_branches(model: MMDiT) -> None:
    with AttentionRecorder(model) as first, AttentionRecorder(model, row=slice(0, 2), steps=[1]) as both:
        model(*inputs(2))
        model.forward_branched(*inputs(2), skip_layers=(1,), rows=1)
    for block in range(3):  # not of the copy that left block 1 out
        torch.testing.assert_close(first.maps[0, block].weights, first.maps[1, block].weights)
    assert set(both.maps) == {(1, 0), (1, 1), (1, 2)} and both.maps[1, 0].weights.shape == (2, 3, LENGTH, LENGTH)
    assert both.maps[1, 0].image_to_text(0).shape == (2, 3, *SIZE)
    with AttentionRecorder(model) as skipped:
        model(*inputs(2), skip_layers=(1,))
    assert not torch.allclose(skipped.maps[0, 2].weights, first.maps[1, 2].weights)
    assert skipped.by_depth(lambda kept: kept.weights.mean()).isnan().tolist() == [[False, True, False]]


def test_only_the_blocks_attention_is_recorded_and_hooks_are_removed(model: MMDiT) -> None:
    def hooks() -> Iterator[int]:
        return (len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match="context is"), AttentionRecorder(model) as recorder:
        x, t, context, pooled = inputs()
        nn.functional.scaled_dot_product_attention(q, q, q)  # a VAE's, say
        net = ControlNet(ControlNetConfig(depth=1, num_heads=3, head_dim=8, in_channels=4, pooled_dim=10))
        net(model, x, x, t, pooled)  # borrows the model's patches, and is no step of it
        assert recorder.step == -1 and recorder.maps == {}
        model(x, t, context, pooled)
        with pytest.raises(RuntimeError):
            model.joint_blocks[0](torch.randn(1, TEXT, 24), torch.randn(1, 12, 24), torch.randn(1, 7))
        nn.functional.scaled_dot_product_attention(q, q, q)
        model(x, t, context[..., 1:], pooled)
    assert len(recorder.maps) == 3 and sum(hooks()) == 0
    with recorder:  # again, from nothing
        pass
    assert recorder.maps == {}
    with pytest.raises(ValueError, match="not a VAE"):
        AttentionRecorder(VAE(PRESETS["tiny"].vae))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="row is -1; count the samples of the batch from 0"):
        AttentionRecorder(model, row=-1)
    with pytest.raises(ValueError, match="nothing is recorded at steps"):
        recorder.heat_map(0)


def test_context_tokens_and_maps_gathered_by_them() -> None:
    clip = ["<|startoftext|>", "red</w>", "<|endoftext|>", "!", "!"]
    row = Row([8, 5, 9, 0, 0], clip, [False] * 3 + [True] * 2, [])
    other = Row([8, 6, 9, 9, 9], [clip[0], "blue</w>", *[clip[2]] * 3], row.pads, [])
    t5 = Row([4, 1], ["▁red", "</s>"], [False, False], [])
    named = [("CLIP", "start", (0,)), ("CLIP", "red", (1,)), ("CLIP", "end", (2,)), ("CLIP", "padding", (3, 4))]
    tokens = context_tokens(Tokens(row, row, t5))
    assert tokens == [*named, ("T5", "red", (5,)), ("T5", "end", (6,))]
    assert context_tokens(Tokens(other, row, None))[1] == ContextToken("CLIP", "blue / red", (1,))
    with pytest.raises(ValueError, match="without CLIP-L and CLIP-G"):
        context_tokens(Tokens(None, None, t5))

    weights = torch.rand(2, 11, 11, generator=torch.Generator().manual_seed(0)).softmax(-1)
    found = gathered(AttentionMap(weights, 7, (2, 2)), tokens)
    assert found.shape == (2, 10, 10)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 10))
    torch.testing.assert_close(found[:, 6, 3], weights[:, 7, 3] + weights[:, 7, 4])  # the first patch reads the padding
    torch.testing.assert_close(found[:, 3, 9], (weights[:, 3, 10] + weights[:, 4, 10]) / 2)  # the padding reads the last patch
    torch.testing.assert_close(found[:, 4:, 4:], weights[:, 5:, 5:])


def test_shape_table_of_large() -> None:
    preset = PRESETS["sd3.5-large"]
    with torch.device("meta"):
        model = MMDiT(preset.mmdit)
    table = shape_table(model, *transformer_inputs(preset))
    rows = {row.name: row for row in table.rows}
    assert list(rows) == [
        "", "x_embedder", "t_embedder", "y_embedder", "context_embedder", "joint_blocks.0-36", "joint_blocks.37", "final_layer"
    ]  # fmt: skip
    assert rows[""].input == ((1, 16, 128, 128), (1,), (1, 154, 4096), (1, 2048)) and rows[""].output == ((1, 16, 128, 128),)
    block = rows["joint_blocks.0-36"]
    assert block.input == ((1, 154, 2432), (1, 4096, 2432), (1, 2432)) and block.output == block.input[:2] and block.times == 37
    assert rows["final_layer"].output == ((1, 4096, 64),)
    assert rows[""].parameters == 8_056_627_520 == sum(row.parameters * row.times for row in table.rows[1:])

    names = json.loads((FACTS / "sd3.5_large.keys.json").read_text())
    prefix = "model.diffusion_model.joint_blocks.37."
    assert rows["joint_blocks.37"].parameters == sum(torch.Size(s).numel() for n, s in names.items() if n.startswith(prefix))


@pytest.mark.parametrize(("preset", "file"), [("sd3-medium", "sd3_medium"), ("sd3.5-medium", "sd3.5_medium")])
def test_shape_tables_agree_with_the_released_files(preset: str, file: str) -> None:
    with torch.device("meta"):
        model = MMDiT(PRESETS[preset].mmdit)
    shapes = json.loads((FACTS / f"{file}.keys.json").read_text())
    prefix = "model.diffusion_model."
    for row in shape_table(model, *transformer_inputs(PRESETS[preset]), depth=2).rows[1:]:
        name = re.sub(r"\.(\d+)-\d+", r".\1", row.name)  # the first of those that are alike
        held = [torch.Size(shape).numel() for key, shape in shapes.items() if key.startswith(f"{prefix}{name}.")]
        assert sum(held) == row.parameters, row.name


def test_shape_table_goes_deep_in_the_order_of_work(model: MMDiT) -> None:
    table = shape_table(model, *inputs(), depth=3)
    names = [row.name for row in table.rows]
    assert names.index("joint_blocks.0-1.context_block.attn") < names.index("joint_blocks.0-1.x_block")
    assert table.rows[names.index("joint_blocks.0-1.x_block.attn2")].output == ((1, 12, 24),)
    assert table.rows[names.index("joint_blocks.2.context_block")].input == ()  # only its parts are called
    decoder = shape_table(VAE(PRESETS["tiny"].vae).decoder, torch.zeros(1, 16, 2, 2))
    assert [row.name for row in decoder.rows][1:7] == ["conv_in", "mid", "up.3", "up.2", "up.1", "up.0"]
    with pytest.raises(ValueError, match="pooled"):
        shape_table(model, *inputs()[:3], torch.zeros(1, 11))
    assert all(len(part._forward_hooks) == 0 for part in model.modules())


def test_shape_table_says_what_each_part_does() -> None:
    vae = VAE(PRESETS["tiny"].vae)
    rows = {row.name: row.does for row in shape_table(vae.encoder, torch.zeros(1, 3, 16, 16), depth=4).rows}
    assert rows["down.0.block.0.conv1"] == "3 x 3 convolution" and rows["down.0.downsample.conv"] == "3 x 3 convolution, stride 2"
    assert rows["down.0.block.0.norm1"] == "norm of 8 groups of channels"
    assert rows["down.0.block"] == "its parts, one after another"
    assert rows["mid.attn_1"] == "Self-attention of one head between all cells of the coarsest level"
    assert rows["down.0"].startswith("The residual blocks of one resolution")  # said by the class it is made from


def test_shape_table_of_text_towers_says_more_than_their_docstrings() -> None:
    text = PRESETS["sd3.5-large"].text
    with torch.device("meta"):
        towers = {"clip_l": clip_tower(text.clip_l, 77), "clip_g": clip_tower(text.clip_g, 77), "t5xxl": t5_tower(text.t5)}
    for name, tower in towers.items():
        rows = shape_table(tower, torch.zeros(1, 77, dtype=torch.long, device="meta"), depth=3).rows
        assert not [row.name for row in rows if "class" in row.does or "PyTorch" in row.does]
        shapes = json.loads((FACTS / f"{name}.keys.json").read_text())
        first = next(row.name for row in rows if row.kind in ("CLIPEncoderLayer", "T5Block"))
        held = [torch.Size(shape).numel() for key, shape in shapes.items() if key.startswith(first.split("-")[0] + ".")]
        assert next(row.parameters for row in rows if row.name == first) == sum(held) > 0
    assert rows[1].name == "encoder" and rows[0].output == ((1, 77, 4096),)


def test_parameter_table(model: MMDiT) -> None:
    table = parameter_table(model, depth=3)
    rows = {row.name: row for row in table.rows}
    mlp = model.get_submodule("joint_blocks.0.x_block.mlp")
    assert rows["joint_blocks.*.x_block.mlp"].parameters == 3 * sum(p.numel() for p in mlp.parameters())
    assert rows["sum"].parameters == sum(p.numel() for p in model.parameters()) == sum(r.parameters for r in table.rows[:-1])
    assert sum(row.share for row in table.rows[:-1]) == pytest.approx(1) and "t_embedder.mlp" in rows


def test_tables_print(model: MMDiT) -> None:
    table = parameter_table(nn.Sequential(nn.Linear(1000, 9), nn.Linear(9, 1)))
    assert str(table).splitlines() == [
        "name  tensors  parameters   share",
        "*           4       9,019  100.0%",
        "sum         4       9,019  100.0%",
    ]
    assert table._repr_markdown_().splitlines()[2] == r"| \* | 4 | 9,019 | 100.0% |", "a star must not begin italics"
    assert table._repr_markdown_().splitlines()[:2] == ["| name | tensors | parameters | share |", "|---|---:|---:|---:|"]
    lines = str(shape_table(model, *inputs(), depth=3)).splitlines()
    assert any("9 x (1 1 24)" in line for line in lines) and any("(1 5 24) (1 12 24) (1 24)" in line for line in lines)


def test_inputs_of_a_preset() -> None:
    x, t, context, pooled = transformer_inputs(PRESETS["sd3.5-medium"], (512, 768), text=333, batch=2)
    assert (x.shape, t.shape, context.shape, pooled.shape) == ((2, 16, 64, 96), (2,), (2, 333, 4096), (2, 2048))
    with pytest.raises(ValueError, match="500 x 512"):
        transformer_inputs(PRESETS["sd3.5-medium"], (500, 512))
