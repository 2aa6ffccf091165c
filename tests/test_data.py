"""Pictures of one's own: found in every layout, or an error that names what is wrong; prepared once, and drawn as they were prepared."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator

from minisd3 import data
from minisd3.data import Prepared, buckets, find_examples, plan, prepare
from minisd3.text import TextEncoders
from minisd3.vae import VAE

CAPTIONS = ["a red house", "two boats", "a star at night"]


def picture(seed: int, width: int = 40, height: int = 24) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def fill(folder: Path, n: int = 3) -> Path:
    """A folder of pictures with captions beside them."""
    for i in range(n):
        below = folder / ("deeper" if i % 2 else "")
        below.mkdir(parents=True, exist_ok=True)
        picture(i).save(below / f"{i}.png")
        (below / f"{i}.txt").write_text(f" {CAPTIONS[i % 3]}\n")
    return folder


def pack(folder: Path, path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for file in sorted(folder.rglob("*")):
            tar.add(file, file.relative_to(folder), recursive=False)
    return path


def table(folder: Path, *rows: object) -> Path:
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


# --- finding ----------------------------------------------------------------------------------------------------------------------


def test_every_layout_gives_the_same_pictures_and_captions(tmp_path: Path) -> None:
    folder = fill(tmp_path / "folder")
    (tmp_path / "tars").mkdir()
    pack(folder, tmp_path / "tars" / "000.tar")
    listed = table(
        fill(tmp_path / "listed"), *({"file_name": f"{'deeper/' if i == 1 else ''}{i}.png", "text": CAPTIONS[i]} for i in range(3))
    )
    for file in listed.rglob("*.txt"):
        file.unlink()
    for source in (folder, tmp_path / "tars", tmp_path / "tars" / "000.tar", listed):
        found = sorted(find_examples([source]), key=lambda example: Path(example.name).name)
        assert [(example.name, example.caption) for example in found] == [
            ("0.png", CAPTIONS[0]), ("deeper/1.png", CAPTIONS[1]), ("2.png", CAPTIONS[2])
        ]  # fmt: skip
        for i, example in enumerate(found):
            assert (np.asarray(example.read((24, 40))) == np.asarray(picture(i))).all()
            assert example.ratio() == 24 / 40
    assert len(find_examples([folder, listed])) == 6


def test_captions_may_hold_what_ends_a_line_elsewhere_and_begin_with_a_mark(tmp_path: Path) -> None:
    folder = fill(tmp_path / "folder", 1)
    (folder / "0.txt").write_text("a café\n", encoding="utf-8-sig")
    assert find_examples([folder])[0].caption == "a café"
    rows = [json.dumps({"file_name": "0.png", "text": text}, ensure_ascii=False) for text in ("one\u2028two", "three")]
    (folder / "metadata.jsonl").write_text("\r\n\r\n".join(rows) + "\r\n", encoding="utf-8-sig")
    assert [example.caption for example in find_examples([folder])] == ["one\u2028two", "three"]


def test_two_pictures_may_share_a_caption(tmp_path: Path) -> None:
    folder = fill(tmp_path / "folder", 1)
    picture(1).save(folder / "0.jpg")
    for source in (folder, pack(folder, tmp_path / "x.tar")):
        assert sorted((example.name, example.caption) for example in find_examples([source])) == [
            ("0.jpg", CAPTIONS[0]), ("0.png", CAPTIONS[0])
        ]  # fmt: skip


def lose_a_caption(folder: Path) -> list[Path]:
    (fill(folder) / "2.txt").unlink()
    return [folder]


def lose_a_caption_in_a_tar(folder: Path) -> list[Path]:
    lose_a_caption(folder)
    return [pack(folder, folder / "x.tar")]


def compress(folder: Path) -> list[Path]:
    return [pack(fill(folder), folder / "x.tar", "w:gz")]


def spoil_a_caption(folder: Path) -> list[Path]:
    (fill(folder) / "0.txt").write_bytes(b"caf\xe9")
    return [folder]


WRONG: list[tuple[Callable[[Path], list[Path]], str]] = [
    (lose_a_caption, r"2.png has no caption; write it to 2.txt beside it"),
    (lose_a_caption_in_a_tar, r"2.png in .*x.tar has no caption; add 2.txt to the tar"),
    (compress, r"x.tar is no uncompressed tar .*; unpack it"),
    (
        lambda folder: [table(fill(folder), {"file_name": "0.png"})],
        r"metadata.jsonl, line 1, is no object with file_name and text: {",
    ),
    (lambda folder: [table(fill(folder), ["0.png"])], r"line 1, is no object"),
    (spoil_a_caption, r"0.txt is no UTF-8 text \(.*\); save it as such"),
    (lambda folder: [table(fill(folder), {"file_name": "9.png", "text": "x"})], r"line 1, names 9.png, which is not there"),
    (lambda folder: [folder], r"there are no pictures \(.jpeg, .jpg, .png, .webp\) in"),
    (lambda folder: [folder / "none"], r"none does not exist; name a folder of pictures and captions, or tars"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_what_is_wrong_is_named(tmp_path: Path, make: Callable[[Path], list[Path]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_examples(make(tmp_path))


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    whole = (folder / "2.png").read_bytes()
    for broken in (b"no picture", whole[: len(whole) // 2]):
        (folder / "2.png").write_bytes(broken)
        with pytest.raises(ValueError, match=r"^2.png of .*2.png cannot be read as a picture \(.*\); mend it or take it out"):
            [example.read((8, 8)) for example in find_examples([folder])]


# --- sizes ------------------------------------------------------------------------------------------------------------------------


def test_pictures_are_cropped_to_their_middle_and_stand_upright(tmp_path: Path) -> None:
    wide = picture(0, 80, 24)
    lying = wide.transpose(Image.Transpose.ROTATE_90)
    about = Image.Exif()
    about[0x0112] = 6  # to be turned clockwise by a quarter
    lying.save(tmp_path / "0.png", exif=about)
    (tmp_path / "0.txt").write_text("x")
    [example] = find_examples([tmp_path])
    assert example.ratio() == 24 / 80
    assert (np.asarray(example.read((24, 24))) == np.asarray(wide.crop((28, 0, 52, 24)))).all()


@pytest.mark.parametrize(("side", "multiple", "step"), [(1024, 16, 64), (512, 16, 32), (128, 16, 16)])
def test_buckets_have_about_the_same_area(side: int, multiple: int, step: int) -> None:
    sizes = buckets(side, multiple)
    assert (side, side) in sizes and len(sizes) == len(set(sizes)) >= 5
    for height, width in sizes:
        assert height % step == width % step == 0
        assert 0.84 * side**2 < height * width <= side**2
        assert 0.45 <= height / width <= 2.2


def test_each_picture_goes_where_its_proportions_fit(tmp_path: Path) -> None:
    for i, (width, height) in enumerate([(40, 40), (80, 40), (40, 80), (44, 40)]):
        picture(i, width, height).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("x")
    shards = plan(find_examples([tmp_path]), tmp_path, [(32, 32), (24, 48), (48, 24)], most=1)
    assert [(shard.size, shard.examples[0].name) for shard in shards] == [
        ((32, 32), "0.png"), ((32, 32), "3.png"), ((24, 48), "1.png"), ((48, 24), "2.png")
    ]  # fmt: skip


# --- preparing and drawing --------------------------------------------------------------------------------------------------------


def test_what_is_prepared_is_what_the_encoders_give_and_is_kept(tmp_path: Path, small_vae: VAE, tiny_text: TextEncoders) -> None:
    folder, out = fill(tmp_path / "folder", 5), tmp_path / "out"

    def made() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}

    shards = plan(find_examples([folder]), out, [(16, 32)], most=2)
    paths = list(prepare(shards, small_vae, tiny_text, batch=1))
    before = made()
    assert list(before) and set(before) == set(paths) == {shard.path for shard in shards} and len(paths) == 3
    names = [example.name for shard in shards for example in shard.examples]
    prepared = Prepared(paths)
    latents, cond = prepared.first(5)
    for i, name in enumerate(names):
        image = picture(int(Path(name).stem)).resize((32, 16), Image.Resampling.LANCZOS, box=(0, 2, 40, 22))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
        expected = tiny_text.encode([CAPTIONS[int(Path(name).stem) % 3]])
        with torch.no_grad():
            torch.testing.assert_close(latents[i : i + 1], small_vae.normalize(small_vae.encode(pixels)[0]), rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(cond.context[i : i + 1], expected.context, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(cond.pooled[i : i + 1], expected.pooled, rtol=2e-3, atol=2e-3)

    again = plan(find_examples([folder]), out, [(16, 32)], most=2)
    assert [shard.path for shard in again] == paths
    (folder / "4.txt").write_text("another caption")  # names run 0, 2, 4, deeper/1, deeper/3
    changed = [shard.path for shard in plan(find_examples([folder]), out, [(16, 32)], most=2)]
    assert [a == b for a, b in zip(paths, changed, strict=True)] == [True, False, True]
    picture(9, 64, 64).save(folder / "0.png")
    replaced = [shard.path for shard in plan(find_examples([folder]), out, [(16, 32)], most=2)]
    assert [a == b for a, b in zip(changed, replaced, strict=True)] == [False, True, True]
    assert {shard.path for shard in plan(find_examples([folder]), out, [(16, 32)], made_with="another", most=2)}.isdisjoint(paths)
    assert made() == before


def test_batches_are_of_one_size_and_some_captions_are_empty(tmp_path: Path, small_vae: VAE, tiny_text: TextEncoders) -> None:
    for i in range(6):
        picture(i, *((40, 40) if i < 4 else (80, 40))).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(CAPTIONS[i % 3])
    shards = plan(find_examples([tmp_path]), tmp_path / "out", [(16, 16), (16, 32)])
    prepared = Prepared(prepare(shards, small_vae, tiny_text))
    generator = Generator().manual_seed(0)
    drawn = [prepared.draw(20, generator, empty=0.25) for _ in range(60)]
    square = [latents.shape[2:] == (2, 2) for latents, _ in drawn]
    assert all(latents.shape == (20, 16, 2, 2 if small else 4) for (latents, _), small in zip(drawn, square, strict=True))
    assert np.mean(square) == pytest.approx(4 / 6, abs=0.2)
    empty = tiny_text.encode([""])
    without = [torch.isclose(c.pooled, empty.pooled, rtol=2e-3, atol=2e-3).all(1) for _, c in drawn]
    assert torch.cat(without).float().mean().item() == pytest.approx(0.25, abs=0.05)
    for (_, cond), dropped in zip(drawn, without, strict=True):
        torch.testing.assert_close(cond.context[dropped], empty.context.expand(int(dropped.sum()), -1, -1), rtol=2e-3, atol=2e-3)
    one, two = (prepared.draw(4, Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1].context, two[1].context)


def test_long_captions_are_cut_without_a_word(tiny_text: TextEncoders) -> None:
    cond = data.encode_captions(tiny_text, ["a red house and " * 40])
    assert cond.context.dtype == torch.float16
