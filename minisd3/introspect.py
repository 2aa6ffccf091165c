"""Looking inside: what attends to what while a picture is drawn, which shapes flow through a module, and where its parameters are.

None of it needs a line in the models: attention is seen by a torch function mode, shapes by forward hooks.
"""

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Generic, Literal, NamedTuple, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from minisd3.config import Preset, require
from minisd3.mmdit import MMDiT
from minisd3.text import Row, Tokens

# --- attention --------------------------------------------------------------------------------------------------------------------

# A reduction: the weights of some queries (... N q L), whose first `text` keys are text -> what is kept of each query (... n q K)
Reduction = Callable[[Tensor, int], Tensor]

CHUNK = 2**24  # attention weights that are computed at a time: 64 MiB
LARGEST = 2**30  # bytes that a single kept map may take


def whole(weights: Tensor, text: int) -> Tensor:
    """Everything: (N L L) a map. For small models."""
    return weights


def text_columns(weights: Tensor, text: int) -> Tensor:
    """What every query reads of each text token: (N L L')."""
    return weights[..., :text]


def text_share(weights: Tensor, text: int) -> Tensor:
    """How much of every query's attention goes to the text, from 0 to 1: (N L 1)."""
    return weights[..., :text].sum(-1, keepdim=True)


def entropy(weights: Tensor, text: int) -> Tensor:
    """How widely every query looks, in nats, from 0 (one key) to log L (all keys alike): (N L 1)."""
    return torch.special.entr(weights).sum(-1, keepdim=True)


def over_heads(reduction: Reduction) -> Reduction:
    """The same, averaged over the heads: (1 L K)."""
    return lambda weights, text: reduction(weights, text).mean(-3, keepdim=True)


Side = Literal["text", "image"]


@dataclass(frozen=True)
class AttentionMap:
    """One attention call as it was recorded. Text comes before the image, among the queries and among the keys."""

    weights: Tensor  # (N L L), each row summing to 1, or what the recorder's reduction left of it; fp32, on the CPU
    text: int  # text tokens, registers among them; 0 in the second attention of a dual block
    size: tuple[int, int]  # the picture's height and width in patches

    def quadrant(self, queries: Side, keys: Side) -> Tensor:
        """quadrant("image", "text") is what the picture's tokens read of the text: (N L L'); rows are queries."""
        part = {"text": slice(self.text), "image": slice(self.text, None)}
        length, kept = self.weights.shape[-2:]
        require(
            kept >= (length if keys == "image" else self.text),
            f"of {length} keys this map keeps {kept}, not enough for {queries} to {keys}; record with reduce=whole",
        )
        return self.weights[..., part[queries], part[keys]]

    def image_to_text(self, tokens: int | Sequence[int]) -> Tensor:
        """How much each patch of the picture reads of these text tokens together: (N h w)."""
        columns = self.quadrant("image", "text")[..., torch.as_tensor(tokens).view(-1)]
        return columns.sum(-1).unflatten(-1, self.size)

    def text_to_image(self, tokens: int | Sequence[int]) -> Tensor:
        """How much these text tokens read of each patch of the picture, on average: (N h w)."""
        rows = self.quadrant("text", "image")[..., torch.as_tensor(tokens).view(-1), :]
        return rows.mean(-2).unflatten(-1, self.size)


class ContextToken(NamedTuple):
    """A token of the context by its encoder and its text; all padding of an encoder is one."""

    encoder: str  # "CLIP", which is both side by side, or "T5"
    text: str
    at: tuple[int, ...]  # where it is in the context


def context_tokens(tokens: Tokens) -> list[ContextToken]:
    """The context of a prompt, token by token, from TextEncoders.tokenize. Raises ValueError without any CLIP."""
    clips = [row for row in (tokens.clip_l, tokens.clip_g) if row]
    require(len(clips) > 0, "without CLIP-L and CLIP-G the first tokens of the context are zeros, and have no text")
    return _labelled("CLIP", clips, 0) + (_labelled("T5", [tokens.t5], len(clips[0].ids)) if tokens.t5 else [])


def _labelled(encoder: str, rows: Sequence[Row], first: int) -> list[ContextToken]:
    """rows: of encoders whose tokens share their places; where they read different words both are named."""
    pads = [all(one) for one in zip(*(row.pads for row in rows), strict=True)]
    texts = [" / ".join(dict.fromkeys(map(plain, pieces))) for pieces in zip(*(row.pieces for row in rows), strict=True)]
    read = [ContextToken(encoder, text, (first + i,)) for i, (text, pad) in enumerate(zip(texts, pads, strict=True)) if not pad]
    padding = tuple(first + i for i, pad in enumerate(pads) if pad)
    return [*read, ContextToken(encoder, "padding", padding)] if padding else read


def plain(piece: str) -> str:
    """A tokenizer's piece without the marks of its kind."""
    names = {"<|startoftext|>": "start", "<|endoftext|>": "end", "</s>": "end"}
    return names.get(piece, piece.removesuffix("</w>").removeprefix("▁"))


def gathered(kept: AttentionMap, tokens: Sequence[ContextToken]) -> Tensor:
    """A whole map with these tokens for its text: (N n+h*w n+h*w). What is read of several places is summed; what several places read
    is averaged, so that every row still sums to 1."""
    length = kept.weights.shape[-2]
    member = torch.zeros(len(tokens) + length - kept.text, length)
    for i, token in enumerate(tokens):
        member[i, list(token.at)] = 1
    member[len(tokens) :, kept.text :].fill_diagonal_(1)
    return member / member.sum(1, keepdim=True) @ kept.weights @ member.T


class AttentionRecorder(TorchFunctionMode):
    """While open, keeps the attention weights of every block of an MMDiT. What the model computes stays the same to the bit.

        with AttentionRecorder(sd3.mmdit) as recorder:
            sd3.generate("a red house")
        recorder.maps[10, 2].quadrant("image", "text")  # step 10, block 2: (N 64 40)

    maps[step, block] holds the joint attention, second[step, block] the picture's own one in dual blocks; a step is one forward pass.
    The weights are computed beside the fused attention, a few queries at a time, and reduced before they are kept.

    reduce: what is kept of each query; `whole`, `text_columns`, `text_share`, `entropy`, any of them under `over_heads`, or your own
    row: which sample of the batch, or a slice of it, which leads the shape of all maps. Guidance orders a batch as prompts, then
        negative prompts; of a step with skip-layer guidance the maps are those of the pass that leaves no block out
    blocks, steps: only these
    """

    def __init__(
        self,
        model: MMDiT,
        *,
        reduce: Reduction = whole,
        row: int | slice = 0,
        blocks: Collection[int] | None = None,
        steps: Collection[int] | None = None,
    ) -> None:
        super().__init__()
        require(isinstance(model, MMDiT), f"AttentionRecorder watches an MMDiT that is not compiled, not a {type(model).__name__}")
        require(isinstance(row, slice) or row >= 0, f"row is {row}; count the samples of the batch from 0")
        self.model, self.reduce, self.blocks, self.steps = model, reduce, blocks, steps
        self.row = row if isinstance(row, slice) else slice(row, row + 1)
        self.single = not isinstance(row, slice)
        self.maps: dict[tuple[int, int], AttentionMap] = {}
        self.second: dict[tuple[int, int], AttentionMap] = {}
        self.step = -1
        self._size = (0, 0)
        self._block, self._text = 0, 0
        self._awaited: list[dict[tuple[int, int], AttentionMap]] = []  # where the open block's next calls go, the first one last
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        self.maps.clear()
        self.second.clear()
        self.step = -1
        # a ControlNet may borrow the patch embedder; the time embedder runs once a forward pass
        self._handles = [
            self.model.x_embedder.register_forward_pre_hook(self._see_picture),
            self.model.t_embedder.register_forward_pre_hook(self._begin_step),
        ]
        for i, block in enumerate(self.model.joint_blocks):
            self._handles.append(block.register_forward_pre_hook(partial(self._enter_block, i)))
            self._handles.append(block.register_forward_hook(self._leave_block, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)

    def _see_picture(self, _module: nn.Module, args: tuple[Tensor]) -> None:
        height, width = args[0].shape[2:]
        patch = self.model.config.patch_size
        self._size = (height // patch, width // patch)

    def _begin_step(self, _module: nn.Module, _args: tuple[Tensor]) -> None:
        self.step += 1

    def _enter_block(self, i: int, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._block, self._text = i, args[0].shape[1]
        wanted = (self.blocks is None or i in self.blocks) and (self.steps is None or self.step in self.steps)
        self._awaited = [self.second, self.maps] if wanted else []

    def _leave_block(self, _module: nn.Module, _args: object, _result: object) -> None:
        self._awaited = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.scaled_dot_product_attention and self._awaited:
            self._keep(args[0], args[1], self._awaited.pop())
        return func(*args, **(kwargs or {}))

    def _keep(self, q: Tensor, k: Tensor, store: dict[tuple[int, int], AttentionMap]) -> None:
        """q, k (B N L d)"""
        q, k = q[self.row], k[self.row]
        if len(q):
            text = self._text if store is self.maps else 0
            weights = self._weights(q[0], k[0], text) if self.single else self._weights(q, k, text)
            store[self.step, self._block] = AttentionMap(weights, text, self._size)

    @torch.no_grad()
    def _weights(self, q: Tensor, k: Tensor, text: int) -> Tensor:
        """softmax(q k^T / sqrt(d)) in fp32, reduced: (... N L d) twice -> (... n L K)."""
        *heads, length, width = q.shape
        queries = max(1, CHUNK // (torch.Size(heads).numel() * length))
        kept = []
        with torch.autocast(q.device.type, enabled=False):
            keys = k.float().mT / width**0.5
            for part in q.float().split(queries, dim=-2):
                kept.append(self.reduce(torch.softmax(part @ keys, dim=-1), text).cpu())
                size = kept[0].nbytes * length // kept[0].shape[-2]
                require(size <= LARGEST, f"the map of one block takes {size / 2**30:.1f} GiB; keep less, "
                        "as AttentionRecorder(model, reduce=over_heads(text_columns)) does")  # fmt: skip
        return torch.cat(kept, dim=-2)

    def heat_map(
        self, tokens: int | Sequence[int], *, steps: Collection[int] | None = None, blocks: Collection[int] | None = None
    ) -> Tensor:
        """Where in the picture these text tokens are read, averaged over heads and over these steps and blocks: (h w)."""
        chosen = [
            kept.image_to_text(tokens).mean(-3)
            for (step, block), kept in self.maps.items()
            if (steps is None or step in steps) and (blocks is None or block in blocks)
        ]
        require(len(chosen) > 0, f"nothing is recorded at steps {steps} and blocks {blocks}; there is {list(self.maps)[:10]} ...")
        return torch.stack(chosen).mean(0)

    def by_depth(self, measure: Callable[[AttentionMap], Tensor]) -> Tensor:
        """A number from every joint map, such as lambda m: m.quadrant("image", "text").sum(-1).mean(): (steps blocks), NaN where none."""
        table = torch.full((self.step + 1, len(self.model.joint_blocks)), torch.nan)
        for place, kept in self.maps.items():
            table[place] = measure(kept)
        return table


# --- tables -----------------------------------------------------------------------------------------------------------------------

Shapes = tuple[tuple[int, ...], ...]  # of every tensor that went in, or came out


class ShapeRow(NamedTuple):
    """A module as it was seen at work; without shapes if only its parts were called."""

    name: str
    kind: str
    input: Shapes
    output: Shapes
    parameters: int  # of one
    times: int = 1  # so many of them in a row, all alike
    does: str = ""

    def among(self, level: int, word: str, times: int) -> "ShapeRow":
        """The row of a whole run: its own with another word in its name."""
        words = self.name.split(".")
        words[level] = word
        return self._replace(name=".".join(words), times=self.times * times)


class ParameterRow(NamedTuple):
    name: str
    tensors: int
    parameters: int
    share: float  # of the whole


TableRow = TypeVar("TableRow", ShapeRow, ParameterRow)


@dataclass(frozen=True)
class Table(Generic[TableRow]):
    """Rows that print as aligned text, and as a table in a notebook."""

    rows: tuple[TableRow, ...]

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        line = "  ".join(f"{{:{'>' if right else '<'}{width}}}" for right, width in zip(self._right(), widths, strict=True))
        return "\n".join(line.format(*values).rstrip() for values in cells)

    def _repr_markdown_(self) -> str:
        header, *lines = ("| " + " | ".join(values).replace("*", r"\*") + " |" for values in self._cells())
        rule = "|" + "|".join("---:" if right else "---" for right in self._right()) + "|"
        return "\n".join([header, rule, *lines])

    def _cells(self) -> list[list[str]]:
        return [list(self.rows[0]._fields), *([_written(value) for value in row] for row in self.rows)]

    def _right(self) -> list[bool]:
        """Which columns hold numbers, and so are flush right."""
        return [isinstance(value, int | float) for value in self.rows[0]]


def _written(value: str | float | Shapes) -> str:
    if isinstance(value, tuple):
        runs = ((shape, len(list(run))) for shape, run in groupby(value))
        return " ".join((f"{n} x " if n > 1 else "") + "(" + " ".join(map(str, shape)) + ")" for shape, n in runs)
    return f"{value:,}" if isinstance(value, int) else f"{value:.1%}" if isinstance(value, float) else value


def transformer_inputs(
    preset: Preset, size: tuple[int, int] | None = None, *, text: int | None = None, batch: int = 1
) -> tuple[Tensor, ...]:
    """x, t, context, pooled as an MMDiT takes them, on meta: shapes without numbers.

    size: height and width in pixels; text: context tokens. Both are the preset's unless given. For any model, at no cost:

        with torch.device("meta"):
            model = MMDiT(preset.mmdit)
        print(shape_table(model, *transformer_inputs(preset)))
    """
    height, width = size or preset.size
    require(
        height % preset.multiple == 0 and width % preset.multiple == 0,
        f"size is {height} x {width}; both must be multiples of {preset.multiple}",
    )
    c, factor = preset.mmdit, preset.vae.factor
    tokens = preset.text.clip_length + preset.text.t5_length if text is None else text
    shapes = [(c.in_channels, height // factor, width // factor), (), (tokens, c.context_dim), (c.pooled_dim,)]
    return tuple(torch.empty(batch, *shape, device="meta") for shape in shapes)


@torch.no_grad()
def shape_table(module: nn.Module, *inputs: Any, depth: int = 1, **named: Any) -> Table[ShapeRow]:
    """Run module(*inputs, **named) once and list the modules in it in the order of their first call, down to `depth` names deep.

    Numbers do not count as names: depth 1 shows joint_blocks.0, depth 2 joint_blocks.0.x_block. Neighbours that are alike in all
    that is shown become one row, joint_blocks.1-11. The first row is the module itself.
    """
    parts = {name: part for name, part in module.named_modules() if not isinstance(part, nn.ModuleList | nn.Identity)}
    seen: dict[str, tuple[Shapes, Shapes]] = {}
    order: dict[str, int] = {}  # of every module that was called or holds one that was

    def begin(name: str, _module: nn.Module, _args: Any) -> None:
        for ancestor in _path(name):
            order.setdefault(ancestor, len(order))

    def end(name: str, _module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        seen.setdefault(name, (_shapes((args, kwargs)), _shapes(result)))

    handles = [part.register_forward_pre_hook(partial(begin, name)) for name, part in parts.items()]
    handles += [part.register_forward_hook(partial(end, name), with_kwargs=True) for name, part in parts.items()]
    try:
        module(*inputs, **named)
    finally:
        for handle in handles:
            handle.remove()
    shown = [name for name in order if name in parts and _deep(name) <= depth]
    shown.sort(key=lambda name: [order[ancestor] for ancestor in _path(name)])
    rows = [
        ShapeRow(n, type(parts[n]).__name__, *seen.get(n, ((), ())), _count(parts[n].parameters()), does=_does(parts[n]))
        for n in shown
    ]
    return Table(tuple(_fold(rows)))


def parameter_table(module: nn.Module, *, depth: int = 1) -> Table[ParameterRow]:
    """Parameters by part, the modules `depth` names deep, and their share of the whole; the last row is the sum.

    Numbers do not count as names: depth 2 has one row joint_blocks.*.x_block for all blocks together. Buffers, such as the position
    table, are no parameters.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        words = ["*" if word.isdigit() else word for word in (name.rpartition(".")[0] or name).split(".")]
        names = [i for i, word in enumerate(words) if word != "*"] or [0]
        parts.setdefault(".".join(words[: names[:depth][-1] + 1]), []).append(parameter)
    total = _count(module.parameters())
    rows = [ParameterRow(name, len(held), _count(held), _count(held) / total) for name, held in parts.items()]
    return Table((*rows, ParameterRow("sum", sum(row.tensors for row in rows), total, 1.0)))


_TRANSFORMERS = {  # whose docstrings say little
    "CLIPTextModelWithProjection": "ids -> the pooled vector, mapped, and a vector for each token",
    "CLIPTextModel": "ids -> a vector for each token, and the one at the end token",
    "CLIPTextEmbeddings": "each token's own vector and its place's, added",
    "CLIPEncoder": "its layers, one after another",
    "CLIPEncoderLayer": "causal attention, then an MLP",
    "T5EncoderModel": "ids -> a vector for each token",
    "T5Stack": "token vectors, blocks, a last norm",
    "T5Block": "attention with a bias by distance, then a gated MLP",
    "T5LayerSelfAttention": "norm and attention with a bias by distance, added",
    "T5LayerFF": "norm and gated MLP, added",
    "T5LayerNorm": "RMS norm of each token",
}


def _does(part: nn.Module) -> str:
    """What a module does: torch's and transformers' commonest in a few words, any other in the first sentence of its docstring."""
    if (name := type(part).__name__) in _TRANSFORMERS:
        return _TRANSFORMERS[name]
    match part:
        case nn.Conv2d():
            stride = f", stride {part.stride[0]}" if part.stride[0] > 1 else ""
            return f"{part.kernel_size[0]} x {part.kernel_size[1]} convolution{stride}"
        case nn.GroupNorm():
            return f"norm of {part.num_groups} groups of channels"
        case nn.LayerNorm() | nn.RMSNorm():
            return "norm of each token"
        case nn.Linear():
            return "linear map"
        case nn.Embedding():
            return f"one of {part.num_embeddings:,} learned vectors for each"
        case nn.Dropout():
            return "nothing, outside of training"
        case nn.Sequential() if type(part) is nn.Sequential:
            return "its parts, one after another"
    uncited = re.sub(r"\s\([^()]*\d{4}[^()]*\)", "", inspect.getdoc(type(part)) or "")
    return " ".join(re.split(r"\.(?:\s|$)", uncited)[0].split())


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _shapes(values: Any) -> Shapes:
    return tuple(tuple(leaf.shape) for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _path(name: str) -> list[str]:
    """The module a.b.c and all that hold it: "", a, a.b, a.b.c."""
    words = name.split(".") if name else []
    return [".".join(words[:i]) for i in range(len(words) + 1)]


def _deep(name: str) -> int:
    return sum(bool(word) and not word.isdigit() for word in name.split("."))


def _fold(rows: list[ShapeRow], level: int = 0) -> list[ShapeRow]:
    """Rows in tree order, alike up to word `level` of their names -> the same, with runs of equal numbered subtrees as one."""
    folded = [row for row in rows if row.name.count(".") < level]
    trees = (list(tree) for _, tree in groupby(rows[len(folded) :], lambda row: row.name.split(".")[: level + 1]))
    for _, run in groupby(trees, partial(_likeness, level)):
        alike = list(run)
        numbers = dict.fromkeys(tree[0].name.split(".")[level] for tree in (alike[0], alike[-1]))
        folded += _fold([row.among(level, "-".join(numbers), len(alike)) for row in alike[0]], level + 1)
    return folded


def _likeness(level: int, tree: list[ShapeRow]) -> tuple[object, ...]:
    """What two subtrees must share to become one: everything but the number that tells them apart."""
    word = tree[0].name.split(".")[level]
    return ("" if word.isdigit() else word, *((row.name.split(".")[level + 1 :], row[1:]) for row in tree))
