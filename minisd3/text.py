"""Prompts become conditioning: three text encoders from `transformers`, and what SD3 does with them (Esser et al. 2024, section 4).

CLIP-L and CLIP-G read the first words of a prompt, T5 reads 226 characters of it. Of each CLIP the last layer but one is taken, one vector
a token. The two are laid side by side, filled with zeros to T5's width and put before T5's tokens: the context, read by attention.
Each CLIP's vector at the end token, side by side, is the pooled vector, read by every modulation. "Released" below is Stability AI's
sd3.5 code (other_impls.py, sd3_infer.py); where diffusers does otherwise, TextConfig has a choice for it.
"""

import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from minisd3.config import CLIPConfig, T5Config, TextConfig, require
from minisd3.formats import WeightsError, compare, find_parts, read_header, write
from minisd3.types import Conditioning


class Prompts(NamedTuple):
    """A prompt of its own for each encoder."""

    clip_l: str
    clip_g: str
    t5: str


class Row(NamedTuple):
    """What one encoder reads of one prompt, and what it does not."""

    ids: list[int]
    pieces: list[str]  # the same tokens, as text
    pads: list[bool]  # which of them only fill up the length
    cut: list[str]  # the words that were left out, wholly or in part


class Tokens(NamedTuple):
    """A prompt as the three encoders read it; None where there is no such encoder."""

    clip_l: Row | None
    clip_g: Row | None
    t5: Row | None


class Ids(NamedTuple):
    """Token numbers of a batch, (B L) for each encoder; None where there is no such encoder."""

    clip_l: Tensor | None
    clip_g: Tensor | None
    t5: Tensor | None

    @classmethod
    def of(cls, tokens: Sequence[Tokens]) -> "Ids":
        """Those of prompts that were read by `TextEncoders.tokenize`; T5's are padded to the longest."""
        rows = ([row.ids for row in of_one if row] for of_one in zip(*tokens, strict=True))
        return cls(
            *(torch.tensor([ids + (max(map(len, each)) - len(ids)) * [T5_PAD] for ids in each]) if each else None for each in rows)
        )


class TruncationWarning(UserWarning):
    """An encoder did not read the whole prompt."""


Tokenizer = TypeVar("Tokenizer", CLIPTokenizer, T5Tokenizer)


# --- the encoders ----------------------------------------------------------------------------------------------------------------


def clip_tower(config: CLIPConfig, length: int) -> CLIPTextModelWithProjection:
    """A fresh CLIP text tower for sequences of `length` tokens; its tensors have the released files' names."""
    end = config.vocab - 1  # the end token has the largest id
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=config.vocab, hidden_size=config.width, intermediate_size=4 * config.width, projection_dim=config.width,
            num_hidden_layers=config.layers, num_attention_heads=config.heads, max_position_embeddings=length,
            hidden_act=config.activation, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end if config.pad == "eos" else 0,
        )
    ).eval()  # fmt: skip


def t5_tower(config: T5Config) -> T5EncoderModel:
    """A fresh T5 v1.1 encoder; its tensors have the released file's names."""
    return T5EncoderModel(
        transformers.T5Config(
            vocab_size=config.vocab, d_model=config.width, d_kv=config.head_dim, d_ff=config.hidden, num_layers=config.layers,
            num_heads=config.heads, feed_forward_proj="gated-gelu", dropout_rate=0.0,
        )
    ).eval()  # fmt: skip


def read_clip(tower: CLIPTextModelWithProjection, ids: Tensor, *, project: bool) -> tuple[Tensor, Tensor]:
    """ids (B L) -> the last layer but one, before any norm (B L D), and the normed last layer at the first end token (B D).

    Padding is not masked: attention is causal, so the pads' own states are all that they change.
    """
    out = tower.text_model(ids, output_hidden_states=True)
    pooled = out.pooler_output
    return out.hidden_states[-2], tower.text_projection(pooled) if project else pooled


class ImageTower(nn.Module):
    """A small convolutional network that the tiny CLIP towers are trained against; kept for scoring pictures by their captions."""

    def __init__(self, out: int, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.GELU(), nn.Conv2d(32, width, 2, 2))
        self.blocks = nn.Sequential(_Residual(width), nn.Conv2d(width, 2 * width, 2, 2), _Residual(2 * width), _Residual(2 * width))
        self.squeeze = nn.Conv2d(2 * width, 24, 1)  # keeps where things are, which pooling over the picture would lose
        self.head = nn.Linear(24 * 8 * 8, out)

    def forward(self, image: Tensor) -> Tensor:
        """image (B 3 H W) in [-1, 1], any size -> (B D), to be compared with a caption's pooled vector by the cosine of their angle."""
        image = F.interpolate(image, (128, 128), mode="bilinear", antialias=True) if image.shape[-2:] != (128, 128) else image
        x = self.blocks(self.embed(image))  # (B C 8 8)
        return self.head(self.squeeze(x).flatten(1))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.gelu(self.conv1(self.norm(x))))


# --- the tokens ------------------------------------------------------------------------------------------------------------------

LONG_WORD = 8  # tokens; only a word of at least so many is split where CLIP's sequence ends (released: max_word_length)


def words(text: str) -> list[str]:
    r"""The words that are tokenised one by one. `(word:1.3)` loses its parentheses and its weight; `\(` is a parenthesis."""
    marked = text.replace("\\)", "\0\1").replace("\\(", "\0\2")
    plain = (segment.replace("\0\1", ")").replace("\0\2", "(") for segment in _segments(marked))
    return [word for segment in plain for word in segment.replace("\n", " ").split(" ") if word]


def _segments(text: str) -> Iterator[str]:
    """The text outside and inside of parentheses, in order. An unclosed one stays as it is."""
    for part in _parenthesised(text):
        if len(part) >= 2 and part[0] == "(" and part[-1] == ")":
            inner, colon, weight = part[1:-1].rpartition(":")
            yield from _segments(inner if colon and inner and _is_number(weight) else part[1:-1])
        else:
            yield part


def _parenthesised(text: str) -> Iterator[str]:
    """Cut before each outermost `(` and after the `)` that closes it."""
    start, depth = 0, 0
    for i, char in enumerate(text):
        if char == "(":
            if depth == 0:
                yield text[start:i]
                start = i
            depth += 1
        elif char == ")":
            depth -= 1
            if depth == 0:
                yield text[start : i + 1]
                start = i + 1
    yield text[start:]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def first_tokens(groups: Sequence[list[int]], room: float, long_word: int = LONG_WORD) -> tuple[list[int], int]:
    """Tokens of the words that fit into `room`, and how many words are whole. A word that does not fit ends the sequence, unless it
    has `long_word` tokens or more: of that one as many as fit are kept (released: tokenize_with_weights, its first chunk)."""
    ids: list[int] = []
    for whole, group in enumerate(groups):
        if len(ids) + len(group) > room:
            return ids + (group[: int(room) - len(ids)] if len(group) >= long_word else []), whole
        ids += group
    return ids, len(groups)


class TextEncoders(nn.Module):
    """The three encoders with their tokenizers. Any encoder may be None; `encode` says what stands in its place."""

    def __init__(
        self,
        config: TextConfig,
        *,
        clip_l: CLIPTextModelWithProjection | None = None,
        clip_g: CLIPTextModelWithProjection | None = None,
        t5: T5EncoderModel | None = None,
        clip_tokenizer: CLIPTokenizer | None = None,
        t5_tokenizer: T5Tokenizer | None = None,
    ) -> None:
        """Raises ValueError if there is no encoder, or a tokenizer is missing or is not the one of its encoder."""
        super().__init__()
        require(any((clip_l, clip_g, t5)), "TextEncoders needs at least one of clip_l, clip_g and t5")
        for name, tower, tower_config in ("clip_l", clip_l, config.clip_l), ("clip_g", clip_g, config.clip_g):
            end = clip_tokenizer and clip_tokenizer.eos_token_id
            require(not tower or end == tower_config.vocab - 1,
                    f"{name} needs a clip_tokenizer whose last token, {tower_config.vocab - 1}, is its end token; given: {end}")  # fmt: skip
        size = len(t5_tokenizer) if t5_tokenizer else None
        require(not t5 or (size is not None and size <= config.t5.vocab),
                f"t5 needs a t5_tokenizer of at most {config.t5.vocab} tokens; given: {size}")  # fmt: skip
        self.config = config
        self.clip_l, self.clip_g, self.t5 = clip_l, clip_g, t5
        self.clip_tokenizer, self.t5_tokenizer = clip_tokenizer, t5_tokenizer

    @torch.no_grad()
    def encode(self, prompts: Sequence[str | Prompts]) -> Conditioning:
        """Prompts -> context (B L D) and pooled (B P), float32, on the encoders' device.

        L is clip_length + t5_length, or more where T5's text is longer (a batch is padded to its longest, and T5 reads the padding). Zeros
        stand in place of an absent CLIP; without T5 its tokens are left out, or zeros if config.without_t5 says so. A
        TruncationWarning names the words that an encoder does not read. Raises ValueError for no prompts or what is no prompt.
        """
        _check(prompts)
        tokens = [self.tokenize(prompt) for prompt in prompts]
        for prompt, read in zip(prompts, tokens, strict=True):
            _warn_of_cuts(prompt, read)
        return self.read(Ids.of(tokens))

    @torch.no_grad()
    def read(self, ids: Ids) -> Conditioning:
        """What `encode` gives, of prompts that are token numbers already."""
        n = next(len(each) for each in ids if each is not None)
        context_l, pooled_l = self._read_clip(self.clip_l, self.config.clip_l, ids.clip_l, n)
        context_g, pooled_g = self._read_clip(self.clip_g, self.config.clip_g, ids.clip_g, n)
        clip = torch.cat([context_l, context_g], dim=-1)  # (B L D_l+D_g)
        clip = F.pad(clip, (0, self.config.context_dim - clip.shape[-1]))  # (B L D)
        context = torch.cat([clip, self._read_t5(ids.t5, n)], dim=1)
        return Conditioning(context, torch.cat([pooled_l, pooled_g], dim=-1))

    def tokenize(self, prompt: str | Prompts) -> Tokens:
        """How each encoder reads a prompt, padding included, and which words it does not read."""
        prompt = Prompts(prompt, prompt, prompt) if isinstance(prompt, str) else prompt
        return Tokens(
            self._clip_row(prompt.clip_l, self.config.clip_l) if self.clip_l else None,
            self._clip_row(prompt.clip_g, self.config.clip_g) if self.clip_g else None,
            self._t5_row(prompt.t5) if self.t5 else None,
        )

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def _clip_row(self, text: str, config: CLIPConfig) -> Row:
        assert self.clip_tokenizer is not None  # the constructor checked it
        start, end, length = config.vocab - 2, config.vocab - 1, self.config.clip_length
        every = words(text)
        ids, whole = first_tokens(_ids(self.clip_tokenizer, every), length - 2)
        return _row(self.clip_tokenizer, [start, *ids, end], end if config.pad == "eos" else 0, length, every[whole:])

    def _t5_row(self, text: str) -> Row:
        assert self.t5_tokenizer is not None
        kept, every = words(text[: self.config.t5_characters]), words(text)
        limit = self.config.t5_limit or sys.maxsize
        ids, whole = first_tokens(_ids(self.t5_tokenizer, kept), limit - 1, long_word=1)  # diffusers' limit splits any word
        same = next((i for i, (a, b) in enumerate(zip(kept, every, strict=False)) if a != b), len(kept))
        return _row(self.t5_tokenizer, [*ids, T5_END], T5_PAD, self.config.t5_length, every[min(whole, same) :])

    def _read_clip(
        self, tower: CLIPTextModelWithProjection | None, config: CLIPConfig, ids: Tensor | None, n: int
    ) -> tuple[Tensor, Tensor]:
        if tower is None or ids is None:
            context = torch.zeros(n, self.config.clip_length, config.width, device=self.device)
            return context, context[:, 0]
        context, pooled = read_clip(tower, ids.to(tower.device), project=config.project)
        return context.to(self.device, torch.float32), pooled.to(self.device, torch.float32)

    def _read_t5(self, ids: Tensor | None, n: int) -> Tensor:
        if self.t5 is None or ids is None:
            length = self.config.t5_length if self.config.without_t5 == "zeros" else 0
            return torch.zeros(n, length, self.config.context_dim, device=self.device)
        out = self.t5(ids.to(self.t5.device)).last_hidden_state  # no mask: the padding is read as well
        return out.to(self.device, torch.float32)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        config: TextConfig,
        *,
        without: Collection[str] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Read the encoders from a folder: the released files clip_l, clip_g and t5* .safetensors, or diffusers' text_encoder folders.

        The tokenizers are read from clip_tokenizer and t5_tokenizer, or diffusers' tokenizer and tokenizer_3, or else from the hub.
        `without` names encoders to leave out ("clip_l", "clip_g", "t5"). dtype None keeps what is stored; T5 computes in bfloat16, in which
        it was trained, where float16 is asked for, which it overflows, or float8 is stored. Raises WeightsError (a ValueError).
        """
        folder = Path(folder)
        unknown = set(without) - set(FILES)
        require(not unknown, f"without names {sorted(unknown)}; the encoders are {', '.join(FILES)}")
        towers: dict[str, Any] = {name: _load_tower(name, folder, config, device, dtype) for name in FILES if name not in without}
        clip = _load_tokenizer(CLIPTokenizer, folder) if {"clip_l", "clip_g"} & set(towers) else None
        t5 = _load_tokenizer(T5Tokenizer, folder) if "t5" in towers else None
        return cls(config, **towers, clip_tokenizer=clip, t5_tokenizer=t5)

    def save(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write what `load` reads, in the released layout."""
        folder = Path(folder)
        for name, tower in self.named_children():
            tensors = {k: v.to(dtype) for k, v in tower.state_dict().items() if k != T5_ALIAS}
            write(folder / f"{name}.safetensors", tensors)
        for name, tokenizer in ("clip_tokenizer", self.clip_tokenizer), ("t5_tokenizer", self.t5_tokenizer):
            if tokenizer:
                tokenizer.save_pretrained(folder / name)


def _check(prompts: Sequence[str | Prompts]) -> None:
    require(not isinstance(prompts, str | Prompts), f"encode takes a list of prompts, not one: write [{prompts!r}]")
    require(len(prompts) > 0, "encode was given an empty list; give at least one prompt")
    for prompt in prompts:
        texts = prompt if isinstance(prompt, Prompts) else (prompt,)
        require(
            all(isinstance(text, str) for text in texts), f"a prompt is a str or Prompts(clip_l, clip_g, t5) of str, not {prompt!r}"
        )


def _warn_of_cuts(prompt: str | Prompts, tokens: Tokens) -> None:
    names = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5"}
    cut = [f"{names[name]} leaves out {' '.join(row.cut)!r}" for name, row in tokens._asdict().items() if row and row.cut]
    if cut:
        warnings.warn(
            f"the prompt {prompt!r} is too long: {'; '.join(cut)}", TruncationWarning, stacklevel=4
        )  # the caller of encode, past no_grad


def _ids(tokenizer: CLIPTokenizer | T5Tokenizer, every: list[str]) -> list[list[int]]:
    """The tokens of each word."""
    return [_word_ids(tokenizer, word) for word in every]


@lru_cache(maxsize=100_000)  # a training run reads the same words millions of times
def _word_ids(tokenizer: CLIPTokenizer | T5Tokenizer, word: str) -> list[int]:
    return list(tokenizer(word, add_special_tokens=False).input_ids)


def _row(tokenizer: CLIPTokenizer | T5Tokenizer, ids: list[int], pad: int, length: int, cut: list[str]) -> Row:
    pads = max(0, length - len(ids))
    filled = ids + pads * [pad]
    return Row(filled, list(tokenizer.convert_ids_to_tokens(filled)), len(ids) * [False] + pads * [True], cut)


# --- files -----------------------------------------------------------------------------------------------------------------------

FILES = {"clip_l": ("clip_l*.safetensors", "text_encoder"), "clip_g": ("clip_g*.safetensors", "text_encoder_2"),
         "t5": ("t5*.safetensors", "text_encoder_3")}  # fmt: skip
# a tokenizer's folders, where else it is found, and the files that it needs
TOKENIZERS: dict[type, tuple[tuple[str, str], str, tuple[str, ...]]] = {
    CLIPTokenizer: (("clip_tokenizer", "tokenizer"), "openai/clip-vit-large-patch14", ("vocab.json", "merges.txt")),
    T5Tokenizer: (("t5_tokenizer", "tokenizer_3"), "google/t5-v1_1-xxl", ("spiece.model",)),
}
T5_END, T5_PAD = 1, 0
T5_ALIAS = "encoder.embed_tokens.weight"  # the same tensor as shared.weight; released files may lack it
PROJECTION = "text_projection.weight"  # a CLIP-L file may lack it; the released code takes the identity, and SD3 never uses it


def _load_tower(
    name: str, folder: Path, config: TextConfig, device: torch.device | str | None, dtype: torch.dtype | None
) -> CLIPTextModelWithProjection | T5EncoderModel:
    path = _find(name, folder)
    header = read_header(path)
    kind, parts = "T5 text encoder" if name == "t5" else "CLIP text encoder", find_parts(header)
    if [part.kind for part in parts] != [kind]:
        raise WeightsError(f"{path} should hold a {kind}, but looks like: {', '.join(part.kind for part in parts)}")
    with torch.device("meta"):
        tower = t5_tower(config.t5) if name == "t5" else clip_tower(getattr(config, name), config.clip_length)
    expected = {key: tuple(tensor.shape) for key, tensor in tower.state_dict().items()}
    optional = {"clip_l": {PROJECTION}, "t5": {T5_ALIAS}}.get(name, set())
    found = parts[0].shapes
    differs = compare(found, {name: shape for name, shape in expected.items() if name in found or name not in optional})
    if differs:
        raise WeightsError(f"{path} is not the text encoder that the config describes: {differs}")
    stored = {entry.dtype for entry in header.values()}
    if name == "t5" and (dtype == torch.float16 or (dtype is None and stored & {"F16", "F8_E4M3", "F8_E5M2"})):
        dtype = torch.bfloat16
    return _fill(tower, dict(parts[0].read(device=device, dtype=dtype)))


def _fill(
    tower: CLIPTextModelWithProjection | T5EncoderModel, tensors: dict[str, Tensor]
) -> CLIPTextModelWithProjection | T5EncoderModel:
    """Give a tower on the meta device its weights, and what no file holds."""
    if isinstance(tower, T5EncoderModel):
        tensors[T5_ALIAS] = tensors["shared.weight"]
        tower.load_state_dict(tensors, strict=True, assign=True)
        tower.encoder.embed_tokens.weight = tower.shared.weight
        return tower
    embeddings = tower.text_model.embeddings
    some = tensors["text_model.final_layer_norm.weight"]
    tensors.setdefault(PROJECTION, torch.eye(len(some), dtype=some.dtype, device=some.device))
    tower.load_state_dict(tensors, strict=True, assign=True)
    embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings, device=some.device)[None]
    return tower


def _find(name: str, folder: Path) -> Path:
    pattern, subfolder = FILES[name]
    files = sorted(folder.glob(pattern), key=lambda file: (len(file.name), file.name))  # plain names first, then _fp16, then _fp8
    if not files and not (folder / subfolder).is_dir():
        raise WeightsError(
            f"{folder} has neither {pattern} nor a folder {subfolder}: put one there, or do without it by without=[{name!r}]"
        )
    return files[0] if files else folder / subfolder


def _load_tokenizer(kind: type[Tokenizer], folder: Path) -> Tokenizer:
    names, hub, files = TOKENIZERS[kind]
    found = next((folder / name for name in names if (folder / name).is_dir()), None)
    if found:
        missing = [file for file in files if not (found / file).is_file()]
        if missing and not (found / "tokenizer.json").is_file():  # transformers would make an empty tokenizer
            raise WeightsError(f"{found} lacks {' and '.join(missing)}; copy them there from {hub} on the hub")
        return kind.from_pretrained(found)
    try:
        fetched = [Path(hf_hub_download(hub, file)) for file in files]
    except OSError as error:
        raise WeightsError(
            f"{folder} has no {names[0]}, and {hub} cannot be fetched from the hub ({type(error).__name__}); "
            f"put the hub's {' and '.join(files)} into {folder / names[0]}"
        ) from None
    return kind.from_pretrained(fetched[0].parent)
