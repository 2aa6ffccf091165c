"""The tiny family's recipes: data is prepared once, captions are dropped at their rates, and each loss is its formula."""

from pathlib import Path

import pytest
import torch
from torch import Generator, nn

from minisd3 import scenes
from minisd3.config import PRESETS, ControlNetConfig, MMDiTConfig
from minisd3.controlnet import ControlNet
from minisd3.mmdit import MMDiT
from minisd3.recipes import (
    Aligned,
    Captioned,
    Steered,
    batched,
    caption_ids,
    drop_encoders,
    hint_latents,
    layout,
    layout_loss,
    prepare,
    prepared,
    random_crops,
    scene_latents,
    train_controlnet,
    train_mmdit,
)
from minisd3.text import TextEncoders
from minisd3.training import averaged
from minisd3.types import Conditioning
from minisd3.vae import VAE

BASE = MMDiTConfig(
    depth=2, head_dim=8, pos_embed_max_size=8, context_dim=256, pooled_dim=224, qk_norm="rms", dual_attention_layers=(0,)
)


def test_crops_are_parts_of_the_picture() -> None:
    image = torch.arange(2 * 3 * 10 * 12.0).view(2, 3, 10, 12)
    crop = random_crops(image, 4, Generator().manual_seed(0))
    assert crop.shape == (2, 3, 4, 4)
    assert any(torch.equal(crop[1], image[1, :, i : i + 4, j : j + 4]) for i in range(7) for j in range(9))


def test_data_is_prepared_once_and_read_back(tmp_path: Path, small_vae: VAE, tiny_text: TextEncoders) -> None:
    def make(seeds: list[int]) -> dict[str, torch.Tensor]:
        return scene_latents(small_vae, tiny_text, (128, 128), seeds)

    paths = list(prepare(tmp_path, range(5), make, shard=2))
    written = [path.stat().st_mtime_ns for path in paths]
    assert len(paths) == 3
    assert [path.stat().st_mtime_ns for path in prepare(tmp_path, range(5), make, shard=2)] == written
    data = prepared(tmp_path)
    assert data["latents"].shape == (5, 16, 16, 16)
    assert data["layouts"].shape == (5, 64, 20)
    assert data["seeds"].tolist() == list(range(5))
    with pytest.raises(FileNotFoundError, match="no prepared data"):
        prepared(tmp_path / "none")
    assert list(batched(range(3), 2)) == [[0, 1], [2]]


@pytest.mark.parametrize("kind", ["canny", "blur", "depth"])
def test_hints_are_latents_of_what_the_kind_shows(small_vae: VAE, tiny_text: TextEncoders, kind: str) -> None:
    hints = hint_latents(small_vae, kind, [3, 4])["hints"]
    picture = scene_latents(small_vae, tiny_text, (128, 128), [3, 4])["latents"]
    assert hints.shape == picture.shape
    assert not torch.equal(hints, picture)
    torch.testing.assert_close(hints, torch.cat([hint_latents(small_vae, kind, [seed])["hints"] for seed in (3, 4)]), rtol=0, atol=5e-3)


def test_a_layout_says_how_much_of_each_patch_shows_what() -> None:
    thing = scenes.Thing("robot", "blue", x=0.5, y=0.5, size=0.5)
    shares = layout(scenes.Scene("sea", (thing,))).view(8, 8, 20).int()
    kinds, colours = shares.split(Aligned.PARTS, -1)
    robot, blue = list(scenes.KINDS).index("robot"), list(scenes.COLOURS).index("blue")
    assert kinds[0, 0].tolist() == [0] * 10 + [255]  # sky
    assert colours[4, 4, blue] == kinds[4, 4, robot] == 255  # the robot's middle
    assert (kinds.sum(-1) - 255).abs().max() <= 1  # each patch is shared out, but for rounding
    assert kinds[..., robot].sum() / 255 == pytest.approx(scenes.Scene("sea", (thing,)).masks().sum().item() / 16**2, abs=0.1)


def test_the_layout_loss_is_least_for_the_truth() -> None:
    shares = torch.stack([layout(scenes.scene(seed)) for seed in range(4)]).float()
    truth = (shares / 255).clamp_min(1e-12).log()
    entropy = -(shares / 255 * truth).sum(-1).mean()
    torch.testing.assert_close(layout_loss(truth, shares), entropy)
    assert layout_loss(torch.zeros_like(truth), shares) > entropy


def test_alignment_leaves_the_velocity_alone() -> None:
    torch.manual_seed(0)
    mmdit = MMDiT(BASE).eval()
    for p in mmdit.parameters():
        nn.init.normal_(p, std=0.1)
    inputs = torch.randn(2, 16, 8, 8), torch.tensor([0.2, 0.9]), torch.randn(2, 5, 256), torch.randn(2, 224)
    velocity, logits = Aligned(mmdit)(*inputs)
    torch.testing.assert_close(velocity, mmdit(*inputs), rtol=0, atol=0)
    assert logits.shape == (2, 16, 20)


def test_encoders_are_dropped_apart_and_at_their_rates() -> None:
    config = PRESETS["tiny"].text
    cond = Conditioning(torch.ones(4000, 25, 256), torch.ones(4000, 224))
    context, pooled = drop_encoders(cond, config, Generator().manual_seed(0), (0.1, 0.2, 0.4))
    alive = {
        "clip_l": (context[:, :20, :96].flatten(1), pooled[:, :96]),
        "clip_g": (context[:, :20, 96:224].flatten(1), pooled[:, 96:]),
        "t5": (context[:, 20:].flatten(1),),
    }
    for (name, parts), rate in zip(alive.items(), (0.1, 0.2, 0.4), strict=True):
        kept = torch.cat(parts, dim=1)
        assert (kept.amin(1) == kept.amax(1)).all(), name  # whole or not at all, in the sequence and in the pooled vector
        assert kept[:, 0].mean().item() == pytest.approx(1 - rate, abs=0.03), name
    together = [parts[0][:, 0] for parts in alive.values()]
    assert torch.stack(together).prod(0).mean().item() == pytest.approx(0.9 * 0.8 * 0.6, abs=0.03)  # independently


def test_captions_are_read_as_encode_reads_them(tiny_text: TextEncoders) -> None:
    scene = scenes.scene(3)
    data = {"captions": caption_ids(tiny_text, scene)[None], "things": torch.tensor([1])}
    captioned = Captioned(tiny_text, data)
    generator = Generator().manual_seed(0)
    whole = [captioned.draw(1, generator, empty=0.0)[1] for _ in range(40)]
    told = tiny_text.encode([scene.caption(manner) for manner in range(scenes.PHRASINGS)])
    found = [(told.context - cond.context).abs().amax((1, 2)).min() < 1e-5 for cond in whole]
    assert 12 < sum(found) < 30  # the others lost an encoder: 1 - 0.8^3, about half
    nothing = tiny_text.encode([""])
    left_out = [captioned.draw(1, generator, empty=1.0)[1] for _ in range(10)]
    assert sum((nothing.pooled - cond.pooled).abs().max() < 1e-5 for cond in left_out) > 5


def test_scenes_of_several_objects_are_drawn_twice_as_often(tiny_text: TextEncoders) -> None:
    captions = caption_ids(tiny_text, scenes.scene(3)).expand(3, -1, -1)
    index, cond = Captioned(tiny_text, {"captions": captions, "things": torch.tensor([1, 1, 3])}).draw(400, Generator().manual_seed(0))
    assert (index == 2).float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert cond.context.shape == (400, 40, 256)


def test_a_controlnet_learns_and_its_base_does_not(tmp_path: Path, small_vae: VAE, tiny_text: TextEncoders) -> None:
    torch.manual_seed(0)
    mmdit = MMDiT(BASE)
    for p in mmdit.parameters():
        nn.init.normal_(p, std=0.05)
    before = {name: p.clone() for name, p in mmdit.state_dict().items()}
    net = ControlNet.from_base(mmdit, ControlNetConfig(depth=1, num_heads=2, head_dim=8, pooled_dim=224), "canny")
    data, hints = scene_latents(small_vae, tiny_text, (128, 128), [1, 2, 3]), hint_latents(small_vae, "canny", [3, 2])
    run = train_controlnet(
        net,
        mmdit,
        tiny_text,
        data | {"seeds": torch.tensor([1, 2, 3])},
        hints | {"seeds": torch.tensor([3, 2])},
        tmp_path,
        steps=3,
        batch=4,
    )
    assert len(list(run)) == 3
    assert all(torch.equal(p, before[name]) for name, p in mmdit.state_dict().items())
    weights = averaged(tmp_path)
    assert weights.keys() == {f"net.{name}" for name, _ in net.named_parameters()}
    assert weights["net.pos_embed_input.proj.weight"].abs().max() > 0


def test_a_new_controlnet_steers_nothing() -> None:
    torch.manual_seed(0)
    mmdit = MMDiT(BASE).eval()
    for p in mmdit.parameters():
        nn.init.normal_(p, std=0.1)
    net = ControlNet.from_base(mmdit, ControlNetConfig(depth=1, num_heads=2, head_dim=8, pooled_dim=224), "blur")
    inputs = torch.randn(2, 16, 8, 8), torch.tensor([0.2, 0.9]), torch.randn(2, 5, 256), torch.randn(2, 224)
    torch.testing.assert_close(Steered(net, mmdit)(*inputs, hint=torch.randn(2, 16, 8, 8)), mmdit(*inputs), rtol=0, atol=0)


def test_the_transformer_overfits_two_scenes(tmp_path: Path, small_vae: VAE, tiny_text: TextEncoders) -> None:
    torch.manual_seed(0)
    data = scene_latents(small_vae, tiny_text, (128, 128), [1, 2]) | {"seeds": torch.tensor([1, 2])}
    wide = scene_latents(small_vae, tiny_text, (96, 128), [3]) | {"seeds": torch.tensor([3])}
    assert wide["latents"].shape[2:] == (12, 16)
    assert wide["layouts"].shape == (1, 48, 20)
    losses = [p.loss for p in train_mmdit(MMDiT(BASE), tiny_text, [data, wide], tmp_path, steps=150, batch=8, lr=1e-2)]
    assert sum(losses[-10:]) / 10 < 0.7 * losses[0]
    assert "mmdit.final_layer.linear.weight" in averaged(tmp_path)
