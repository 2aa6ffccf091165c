"""How each part of the tiny family is trained: its data, its loss, and the run that `training.fit` makes of them."""

import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from pydoc_data.topics import topics
from random import Random
from typing import Literal

import sentencepiece
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Generator, Tensor, nn
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from minisd3 import flow, scenes
from minisd3.config import TextConfig
from minisd3.controlnet import HINTS, ControlNet, depth
from minisd3.formats import write
from minisd3.mmdit import MMDiT
from minisd3.scenes import Scene
from minisd3.text import Ids, ImageTower, Row, TextEncoders, read_clip
from minisd3.training import Progress, autocast, fit, flow_loss, vae_loss
from minisd3.types import Conditioning
from minisd3.vae import VAE

# --- the VAE ---------------------------------------------------------------------------------------------------------------------


def train_vae(vae: VAE, run: Path, *, steps: int, batch: int = 16, lr: float = 3e-3, seed: int = 0) -> Iterator[Progress]:
    """Train on scenes that are rendered as they are needed: crops of 64 pixels, whole pictures for the last 15% of the steps."""

    def loss(module: nn.Module, step: int, generator: Generator) -> Tensor:
        assert isinstance(module, VAE)
        whole = step >= 0.85 * steps
        image = scenes.pictures(random_seeds(batch // 4 if whole else batch, generator))  # (B 3 128 128)
        if not whole:
            image = random_crops(image, 64, generator)
        return vae_loss(module, image.to(device_of(module)), generator)

    return fit(vae, loss, run, steps=steps, lr=lr, seed=seed)


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def batched(items: Iterable[int], n: int) -> Iterator[list[int]]:
    """Lists of n items, the last one maybe shorter."""
    every = iter(items)
    while chunk := list(islice(every, n)):
        yield chunk


def random_seeds(n: int, generator: Generator) -> list[int]:
    """n seeds of training scenes."""
    return torch.randint(scenes.HELD_OUT, (n,), generator=generator).tolist()


def random_crops(image: Tensor, size: int, generator: Generator) -> Tensor:
    """A random square of each picture: (B 3 H W) -> (B 3 size size)."""
    tops, lefts = (torch.randint(side - size + 1, (len(image),), generator=generator).tolist() for side in image.shape[2:])
    return torch.stack([x[:, i : i + size, j : j + size] for x, i, j in zip(image, tops, lefts, strict=True)])


# --- prepared data ---------------------------------------------------------------------------------------------------------------


def prepare(
    folder: Path,
    seeds: Iterable[int],
    make: Callable[[list[int]], dict[str, Tensor]],
    *,
    shard: int = 1000,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Path]:
    """What `make` makes of the scenes of these seeds, made once: a file for each `shard` of them, whole or not there, kept if it is.

    make: called with 10 seeds or fewer; gives tensors with a row for each. `prepared` reads them back
    share: (i, n) makes only every nth file from the ith, for one of n processes
    """
    for chunk in islice(batched(seeds, shard), share[0], None, share[1]):
        path = folder / f"{chunk[0]:09d}.safetensors"
        if not path.exists():
            # with 50 at a time a CPU takes half as long again: memory that large comes and goes page by page
            parts = [make(part) for part in batched(chunk, 10)]
            write(path, {name: torch.cat([part[name] for part in parts]) for name in parts[0]} | {"seeds": torch.tensor(chunk)})
        yield path


def prepared(folder: Path) -> dict[str, Tensor]:
    """All that `prepare` wrote into a folder, by name, and the "seeds" of its scenes."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no prepared data; `python -m minisd3 train` makes it, or recipes.prepare")
    files = [load_file(path) for path in paths]
    return {name: torch.cat([file[name] for file in files]) for name in files[0]}


@torch.no_grad()
def scene_latents(vae: VAE, text: TextEncoders, size: tuple[int, int], seeds: list[int]) -> dict[str, Tensor]:
    """What the transformer learns from, drawn at this height and width: normalised "latents" (n C h w) in fp16, "layouts" (n L 20),
    "captions" (n 12 60), and how many "things" there are (n)."""
    drawn = [scenes.scene(seed) for seed in seeds]
    image = scenes.rendered(drawn, *size).to(device_of(vae))
    return {
        "latents": vae.normalize(vae.encode(image)[0]).half().cpu(),
        "layouts": torch.stack([layout(scene, size) for scene in drawn]),
        "captions": torch.stack([caption_ids(text, scene) for scene in drawn]),
        "things": torch.tensor([len(scene.things) for scene in drawn]),
    }


@torch.no_grad()
def hint_latents(vae: VAE, kind: str, seeds: list[int]) -> dict[str, Tensor]:
    """What a ControlNet of this kind reads: "hints" (n C h w) in fp16."""
    drawn = [scenes.scene(seed) for seed in seeds]
    hints = depth(torch.stack([scene.depth() for scene in drawn])) if kind == "depth" else HINTS[kind](scenes.rendered(drawn))
    hints = hints.to(device_of(vae))
    return {"hints": vae.normalize(vae.encode(hints)[0]).half().cpu()}


def layout(scene: Scene, size: tuple[int, int] = (128, 128)) -> Tensor:
    """How much of each 16 x 16 pixels shows each kind of object, then each colour, the last of both being none: uint8 (L 11+9), 255 is all."""
    cover = F.avg_pool2d(scene.masks(*size).float()[None], 16)[0].flatten(1)  # (n L)
    shares = []
    kinds, colours = [thing.kind for thing in scene.things], [thing.colour for thing in scene.things]
    for names, own in (list(scenes.KINDS), kinds), (list(scenes.COLOURS), colours):
        share = torch.zeros(len(names) + 1, cover.shape[1])
        share.index_add_(0, torch.tensor([names.index(name) for name in own]), cover)
        share[-1] = 1 - cover.sum(0)
        shares.append(share)
    return (255 * torch.cat(shares)).round().to(torch.uint8).T


# --- the transformer -------------------------------------------------------------------------------------------------------------


class Aligned(nn.Module):
    """The transformer with a linear map that, after half of its blocks, reads from each patch what the clean picture shows there.

    Representation alignment (Yu et al. 2024) with exact labels in the place of another network's features: the first blocks learn early
    where what belongs. The map is dropped after training.
    """

    PARTS = (len(scenes.KINDS) + 1, len(scenes.COLOURS) + 1)

    def __init__(self, mmdit: MMDiT) -> None:
        super().__init__()
        self.mmdit = mmdit
        self.head = nn.Linear(mmdit.config.hidden_size, sum(self.PARTS))

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """As MMDiT.forward -> the velocity, and logits (B L 20) of what `layout` tells."""
        depth = self.mmdit.config.depth
        stream = self.mmdit.run(self.mmdit.embed(x, t, context, pooled), range(depth // 2))
        logits = self.head(F.layer_norm(stream.x, stream.x.shape[-1:]))
        return self.mmdit.final(self.mmdit.run(stream, range(depth // 2, depth)), x), logits


def layout_loss(logits: Tensor, layouts: Tensor) -> Tensor:
    """Cross-entropy of kinds plus that of colours, averaged over patches: logits (B L 20), layouts (B L 20) as `layout` gives them."""
    kinds, colours = zip(logits.split(Aligned.PARTS, -1), (layouts / 255).split(Aligned.PARTS, -1), strict=True)
    of_kinds, of_colours = (F.cross_entropy(guess.flatten(0, 1), share.flatten(0, 1)) for guess, share in (kinds, colours))
    return of_kinds + of_colours


def drop_encoders(
    cond: Conditioning, config: TextConfig, generator: Generator, rates: tuple[float, float, float] = (0.2, 0.2, 0.2)
) -> Conditioning:
    """What CLIP-L, CLIP-G and T5 say, each set to zero for some samples, so that a model can do without (Esser et al. 2024, section B.3).

    The paper drops each at 46.4%; a small model that trains for a short time needs to read most of the time.
    """
    keep = (torch.rand(len(cond.context), 3, generator=generator) >= torch.tensor(rates)).to(cond.context)
    widths = config.clip_l.width, config.clip_g.width
    pooled = torch.cat([keep[:, :1].expand(-1, widths[0]), keep[:, 1:2].expand(-1, widths[1])], dim=1)  # (B P)
    clip = F.pad(pooled, (0, config.context_dim - sum(widths)))[:, None].expand(-1, config.clip_length, -1)
    rest = keep[:, 2:, None].expand(-1, cond.context.shape[1] - config.clip_length, config.context_dim)
    return Conditioning(cond.context * torch.cat([clip, rest], dim=1), cond.pooled * pooled)


def caption_ids(text: TextEncoders, scene: Scene) -> Tensor:
    """Every phrasing of a scene's caption as token numbers, of CLIP-L, CLIP-G and T5 in a row: int16 (12 20+20+20)."""
    return _ids(text, [scene.caption(manner) for manner in range(scenes.PHRASINGS)])


def _ids(text: TextEncoders, prompts: list[str]) -> Tensor:
    ids = Ids.of([text.tokenize(prompt) for prompt in prompts])
    return torch.cat([each for each in ids if each is not None], dim=1).short()


class Captioned:
    """Draws batches of prepared scenes, those of several objects twice as often, each time with one of its captions."""

    def __init__(self, text: TextEncoders, data: dict[str, Tensor]) -> None:
        """data: of `scene_latents`, or any that has its "captions" and "things"."""
        self.text, self.captions = text, data["captions"]
        self.weights = torch.where(data["things"] > 1, 2.0, 1.0)
        self.nothing = _ids(text, [""])

    def draw(self, batch: int, generator: Generator, *, empty: float = 0.1) -> tuple[Tensor, Conditioning]:
        """Which scenes (B,), and what the text encoders say of them.

        empty: the share of captions that are left out, so that the model also learns the unconditional velocity that CFG needs (Ho &
        Salimans 2022).
        """
        index = torch.multinomial(self.weights, batch, replacement=True, generator=generator)
        manner = torch.randint(scenes.PHRASINGS, (batch,), generator=generator)
        left_out = torch.rand(batch, 1, generator=generator) < empty
        ids = torch.where(left_out, self.nothing, self.captions[index, manner]).long()  # (B L'')
        config = self.text.config
        cond = self.text.read(Ids(*ids.split((config.clip_length, config.clip_length, config.t5_length), dim=1)))
        return index, drop_encoders(cond, config, generator)


def train_mmdit(
    mmdit: MMDiT, text: TextEncoders, data: Sequence[dict[str, Tensor]], run: Path, *, steps: int, batch: int = 64, lr: float = 4e-3,
    seed: int = 0,
) -> Iterator[Progress]:  # fmt: skip
    """Train on what `scene_latents` prepared at one size or several; each step takes one, as often as it has scenes.

    The run's weights are those of `Aligned`, so the transformer's names begin with "mmdit.".
    """
    captioned = [Captioned(text, one) for one in data]
    shares = torch.tensor([float(len(one["latents"])) for one in data])

    def loss(module: nn.Module, step: int, generator: Generator) -> Tensor:
        which = int(torch.multinomial(shares, 1, generator=generator))
        index, cond = captioned[which].draw(batch, generator)
        x0 = data[which]["latents"][index].to(text.device).float()
        t, noise = flow.logit_normal(batch, generator=generator).to(x0), torch.randn(x0.shape, generator=generator).to(x0)
        with autocast(x0.device):
            v, logits = module(flow.interpolate(x0, noise, t), t, *cond)
        aligned = layout_loss(logits.float(), data[which]["layouts"][index].to(x0))
        return F.mse_loss(v.float(), flow.velocity(x0, noise)) + 0.15 * aligned

    return fit(Aligned(mmdit), loss, run, steps=steps, lr=lr, seed=seed, cooldown=0.6)


# --- ControlNets -----------------------------------------------------------------------------------------------------------------


class Steered(nn.Module):
    """A ControlNet to be trained and its base, which learns nothing."""

    def __init__(self, net: ControlNet, base: MMDiT) -> None:
        super().__init__()
        self.net, self.base = net, base.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, hint: Tensor) -> Tensor:
        """As MMDiT.forward, under a hint (B C H W)."""
        return self.base(x, t, context, pooled, control=self.net(self.base, x, hint, t, pooled))


def train_controlnet(
    net: ControlNet, mmdit: MMDiT, text: TextEncoders, data: dict[str, Tensor], hints: dict[str, Tensor], run: Path, *, steps: int,
    batch: int = 32, lr: float = 2e-3, seed: int = 0,
) -> Iterator[Progress]:  # fmt: skip
    """Train a ControlNet, best one made by ControlNet.from_base, on what `scene_latents` and `hint_latents` prepared of the same scenes.

    Half of the captions are empty, so that the hint is read and not only the prompt (Zhang et al. 2023, section 3.3).
    """
    place = {seed: i for i, seed in enumerate(data["seeds"].tolist())}
    data = {name: each[[place[seed] for seed in hints["seeds"].tolist()]] for name, each in data.items()}
    captioned = Captioned(text, data)

    def loss(module: nn.Module, step: int, generator: Generator) -> Tensor:
        index, cond = captioned.draw(batch, generator, empty=0.5)
        x0, hint = data["latents"][index].to(text.device).float(), hints["hints"][index].to(text.device).float()
        return flow_loss(partial(module, hint=hint), x0, cond, generator)

    return fit(Steered(net, mmdit), loss, run, steps=steps, lr=lr, seed=seed)


# --- the text encoders of the tiny family ------------------------------------------------------------------------------------------


def train_tokenizers(folder: Path, *, clip_vocab: int = 1024, t5_vocab: int = 512) -> None:
    """CLIP's byte-pair and T5's unigram vocabulary: each caption word one token, and pieces of English to spell others with.

    English is the 1500 commonest words of Python's own reference, so the pieces depend a little on Python's version (shipped: 3.11).
    """
    counted = Counter(word for text in topics.values() for word in re.findall("[a-z]{3,}", text.lower()))
    english = [word for word, _ in counted.most_common(1500)]
    text = [word for word in scenes.VOCABULARY for _ in range(2000)] + english
    _train_clip_tokenizer(folder / "clip_tokenizer", text, clip_vocab)
    # sentencepiece proposes only what occurs in two words, so each caption word is also given an s
    _train_t5_tokenizer(folder / "t5_tokenizer", text + [f"{word}s" for word in scenes.VOCABULARY], t5_vocab)


def _train_clip_tokenizer(folder: Path, text: list[str], size: int) -> None:
    """In CLIP's order: 256 bytes (printable ones first, so that 0 is "!"), the same ending a word, merges, start and end token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    learner = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    merges = size - 2 * len(symbols) - 2
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator([word for word in text if word.isalpha()], trainer)
    pairs = json.loads(learner.to_str())["model"]["merges"][:merges]
    names = [*symbols, *(f"{s}</w>" for s in symbols), *(a + b for a, b in pairs), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in pairs), ""]))


def _train_t5_tokenizer(folder: Path, text: list[str], size: int) -> None:
    """With T5's special tokens; capitals are read as small letters."""
    folder.mkdir(parents=True, exist_ok=True)
    small = folder / "small.tsv"
    small.write_text("".join(f"{capital:X}\t{capital + 32:X}\n" for capital in range(65, 91)))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=size, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>",
        normalization_rule_tsv=str(small), required_chars="".join(map(chr, range(33, 65))) + "abcdefghijklmnopqrstuvwxyz", minloglevel=2,
    )  # fmt: skip
    small.unlink()
    (folder / "spiece.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))


class Contrast(nn.Module):
    """A CLIP text tower and the image tower that it is trained against (Radford et al. 2021)."""

    def __init__(self, text: CLIPTextModelWithProjection, image: ImageTower, *, project: bool) -> None:
        super().__init__()
        self.text, self.image, self.project = text, image, project
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        """image (B 3 H W), ids (C L) -> (B C): how well each caption fits each picture, before a softmax."""
        _, pooled = read_clip(self.text, ids, project=self.project)
        return self.logit_scale.exp() * F.normalize(self.image(image), dim=-1) @ F.normalize(pooled, dim=-1).T


def contrastive_loss(logits: Tensor, names: list[str]) -> Tensor:
    """Each picture should find its caption among all, and each caption its picture. Others of the same name are no wrong answers."""
    number = {name: i for i, name in enumerate(names)}
    label = torch.tensor([number[name] for name in names], device=logits.device)
    target = torch.arange(len(names), device=logits.device)
    others = (label[:, None] == label) & (target[:, None] != target)  # (B B)
    logits = logits.masked_fill(others, -torch.inf)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def rival(scene: Scene, rng: Random) -> Scene:
    """The scene but for one thing: two objects have exchanged colours or places, or the first has another colour or kind."""
    while True:
        first, *rest = scene.things
        if rest and rng.random() < 0.75:
            kinds = (first.kind, rest[0].kind) if rng.random() < 0.5 else (rest[0].kind, first.kind)
            second = replace(rest[0], kind=kinds[1], colour=first.colour)
            things = (replace(first, kind=kinds[0], colour=rest[0].colour), second, *rest[1:])
        elif rng.random() < 0.5:
            things = (replace(first, colour=rng.choice(list(scenes.COLOURS))), *rest)
        else:
            things = (replace(first, kind=rng.choice(list(scenes.KINDS))), *rest)
        if not any(scenes.held_out(thing.kind, thing.colour, scene.background) for thing in set(things) - set(scene.things)):
            return replace(scene, things=things)


def train_clip(
    encoders: TextEncoders, name: Literal["clip_l", "clip_g"], image: ImageTower, run: Path, *, steps: int, batch: int = 256,
    lr: float = 2e-3, seed: int = 0,
) -> Iterator[Progress]:  # fmt: skip
    """Train a CLIP tower with its image tower. Half of a batch are rivals of the other half, so that order and colours must be read."""

    def loss(module: nn.Module, step: int, generator: Generator) -> Tensor:
        rng = _random(generator)
        drawn = [scenes.scene(s) for s in random_seeds(batch // 2, generator)]
        drawn += [rival(scene, rng) for scene in drawn]
        read = [encoders.tokenize(scene.caption(rng.randrange(scenes.PHRASINGS))) for scene in drawn]
        ids = torch.tensor([getattr(tokens, name).ids for tokens in read])
        image, ids = scenes.rendered(drawn).to(device_of(module)), ids.to(device_of(module))
        return contrastive_loss(module(image, ids), [scene.caption() for scene in drawn])

    tower, config = getattr(encoders, name), getattr(encoders.config, name)
    return fit(Contrast(tower.train(), image, project=config.project), loss, run, steps=steps, lr=lr, seed=seed)


class Grounded(nn.Module):
    """T5 with one linear map that reads kind, colour, background, and x, y and size from every token's vector."""

    PARTS = (len(scenes.KINDS), len(scenes.COLOURS), len(scenes.BACKGROUNDS), 3)

    def __init__(self, tower: T5EncoderModel) -> None:
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(tower.config.d_model, sum(self.PARTS))

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """ids (B L) -> (B L 10), (B L 8), (B L 7), (B L 3)"""
        return self.head(self.tower(ids).last_hidden_state).split(self.PARTS, dim=-1)


def grounding_loss(module: nn.Module, drawn: list[Scene], rows: list[Row]) -> Tensor:
    """The words "red fish" should know which of the scene's objects they name, where it stands and how large it is; every word where
    the scene is. Unlike T5's own task, filling in gaps, this teaches which colour belongs to which thing."""
    kind, colour, background, place = module(torch.tensor([row.ids for row in rows], device=device_of(module)))
    wanted = [_grounds(scene, row) for scene, row in zip(drawn, rows, strict=True)]
    kinds, colours, backgrounds, places = (
        torch.tensor(part, device=kind.device) for part in zip(*wanted, strict=True)
    )  # (B L), and (B L 3)
    named = (kinds >= 0)[..., None]
    error = ((place - places).square() * named).sum() / named.sum()
    classes = (kind, kinds), (colour, colours), (background, backgrounds)
    return sum((F.cross_entropy(x.flatten(0, 1), y.flatten()) for x, y in classes), 20 * error)  # error is of fractions, so small


def _grounds(scene: Scene, row: Row) -> tuple[list[int], list[int], list[int], list[list[float]]]:
    """For each token kind, colour, background and place; -100, which the loss passes over, where it has none."""
    names = [piece.removeprefix("▁") for piece in row.pieces]
    owner = {}
    for i, look in enumerate(pairwise(names)):
        for thing in scene.things:
            if look == (thing.colour, thing.kind):
                owner[i] = owner[i + 1] = thing
    spots = [owner.get(i) for i in range(len(names))]
    return (
        [list(scenes.KINDS).index(thing.kind) if thing else -100 for thing in spots],
        [list(scenes.COLOURS).index(thing.colour) if thing else -100 for thing in spots],
        [-100 if pad else list(scenes.BACKGROUNDS).index(scene.background) for pad in row.pads],
        [[thing.x, thing.y, thing.size] if thing else [0.0, 0.0, 0.0] for thing in spots],
    )


def train_t5(
    encoders: TextEncoders, run: Path, *, steps: int, batch: int = 64, lr: float = 2e-3, seed: int = 0
) -> Iterator[Progress]:
    """Train the T5 encoder on captions. SD3 has no use for T5's decoder, so there is none."""

    def loss(module: nn.Module, step: int, generator: Generator) -> Tensor:
        rng = _random(generator)
        drawn = [scenes.scene(s) for s in random_seeds(batch, generator)]
        read = [encoders.tokenize(scene.caption(rng.randrange(scenes.PHRASINGS))).t5 for scene in drawn]
        return grounding_loss(module, drawn, [row for row in read if row])

    assert encoders.t5 is not None
    return fit(Grounded(encoders.t5.train()), loss, run, steps=steps, lr=lr, seed=seed)


def _random(generator: Generator) -> Random:
    """Python's randomness, from a generator of torch's."""
    return Random(int(torch.randint(2**62, (), generator=generator)))
