"""What a source module declares, and the named operations on tensors that its key map refers to.

An operation takes the tensors of all keys that lead to one target, in the order of the key map, and the sizes of the
conversion; it returns the target's tensor.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..configuration_mome import MomeConfig
from ..errors import ConversionError
from .positions import resize_grid, resize_offsets
from .reading import Checkpoint

# Upstream key → target key, several target keys, or None: dropped on purpose. `{}` is a layer, `*` anything.
KeyMap = dict[str, str | tuple[str, ...] | None]


@dataclass(frozen=True)
class Options:
    """What the user may say about the sizes.

    Attributes:
        num_attention_heads: `None`: width / 64, or what a relative position table tells.
        image_size: pixels of the output, whose position tables are resized; `None`: those of the checkpoint.
        checkpoint_image_size: pixels of the checkpoint, where a relative position table leaves them in doubt.
        caption: give a file without a caption head one of its own, a copy of the word embeddings, in place of one tied
            to them; SigLIP gets experts of captions as well, see `caption_experts`.
        strip_punctuation: a tokenizer that leaves out punctuation, where the published one keeps it.
    """

    num_attention_heads: int | None = None
    image_size: int | None = None
    checkpoint_image_size: int | None = None
    caption: bool = False
    strip_punctuation: bool = False


@dataclass(frozen=True)
class Sizes:
    """What a source reads from the tensors' shapes before anything is converted.

    Attributes:
        config: fields of the MomeConfig, token ids aside.
        grid: patches along a side of the image in the checkpoint; the config tells that of the output.
        kind: the published kind of file, for the model card.
        text_length: longest text of the upstream training, if it is not the length of the position table.
        dropped: keys that this file's layout has no use for, beside those that the key map drops.
        classifier: an image classifier, whose images are normalised otherwise.
        absent: heads that the file doesn't hold, keys of `STAND_INS`.
        notes: what the user should know, such as what had to be guessed.
        resampling: how images are resized, for the model card.
        stand_ins: target key → function of what is there, as in `STAND_INS`, where the targets depend on the file.
    """

    config: dict
    grid: int
    kind: str
    text_length: int | None = None
    dropped: tuple[str, ...] = ()
    classifier: bool = False
    absent: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    resampling: str = "bicubic"
    stand_ins: dict[str, Callable] = field(default_factory=dict)

    @property
    def new_grid(self) -> int:
        return self.config["image_size"] // self.config["patch_size"]


@dataclass
class Conversion:
    """What a conversion did.

    Attributes:
        output: the folder.
        config: of the new checkpoint.
        dropped: upstream keys without a place in it.
        notes: what its users should know.
    """

    output: Path
    config: MomeConfig
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


Operation = Callable[[list[torch.Tensor], Sizes], torch.Tensor]


@dataclass(frozen=True)
class Request:
    """What is to be converted.

    Attributes:
        checkpoint: file, folder or Hub id.
        options: what the shapes do not tell.
        tokenizer: file or folder; `None`: the checkpoint's own.
        with_tokenizer: `False`: do without one.
        revision: of a repository on the Hub.
    """

    checkpoint: str | Path
    options: Options = field(default_factory=Options)
    tokenizer: Path | None = None
    with_tokenizer: bool = True
    revision: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A checkpoint and what belongs to it.

    Attributes:
        checkpoint: its tensors.
        sizes: what they tell.
        ids: fields of the MomeConfig that name ids.
        processor: a MomeProcessor or, without a tokenizer, what turns images into pixels.
    """

    checkpoint: Checkpoint
    sizes: Sizes
    ids: dict[str, int]
    processor: Any


@dataclass(frozen=True)
class Source:
    """One upstream project.

    Attributes:
        name: what the model card calls it.
        key_map: see `KeyMap`.
        operations: target key → operation; without one, a target is its only tensor as it is.
        measure: reads the sizes of a checkpoint.
        load: opens a checkpoint of more than one file; `None`: a file with the weights.
        vocab_size: rows of the published word embedding.
        special_tokens: ids of the published vocabulary by name, for conversions without a tokenizer.
        other_special_tokens: the same for another vocabulary, a guess; `[MASK]` is its last id.
        tokenizer_files: names under which the tokenizer lies beside a checkpoint.
        tokenizer_hint: where to get the tokenizer.
        paper, citation, license, origin: for the model card.
    """

    name: str
    key_map: KeyMap
    measure: Callable[[Checkpoint, Options], Sizes]
    operations: dict[str, Operation]
    load: Callable[[Request], Loaded] | None = None
    vocab_size: int = 0
    special_tokens: dict[str, int] = field(default_factory=dict)
    other_special_tokens: dict[str, int] = field(default_factory=dict)
    tokenizer_files: tuple[str, ...] = ()
    tokenizer_hint: str = ""
    paper: str = ""
    citation: str = ""
    license: str = ""
    origin: str = (
        "published by Microsoft under the MIT License in [microsoft/unilm](https://github.com/microsoft/unilm)"
    )


def pattern_of(key: str) -> re.Pattern:
    """A key of a map as a regular expression; its group is the layer, and only a last `*` crosses dots."""
    pattern = re.escape(key).replace(r"\{\}", r"(\d+)").replace(r"\*\.", r"[^.]+\.").replace(r"\*_", r"[^.]+_")
    return re.compile(pattern.replace(r"\*", ".+"))


def layers_of(checkpoint: Checkpoint, key: str) -> list[int]:
    """The layers that have a key with `{}` in it, in order."""
    pattern = pattern_of(key)
    return sorted(int(match[1]) for match in map(pattern.fullmatch, checkpoint.shapes) if match)


def square_side(checkpoint: Checkpoint, key: str, dimensions: int, extra: int) -> int:
    """Patches along a side of the image, of a position table (…, rows, width) with so many extra rows."""
    patches = checkpoint.shape(key, dimensions)[-2] - extra
    side = math.isqrt(max(patches, 0))
    if side == 0 or side * side != patches:
        raise ConversionError(
            f"checkpoint {checkpoint.path}: {key} has {patches + extra} rows, expected {extra} and a square number"
        )
    return side


def default_heads(width: int) -> int:
    """Heads of 64 dimensions, as nearly all published models have."""
    if width % 64:
        raise ConversionError(f"the checkpoint's width {width} is not a multiple of 64: pass --num-attention-heads")
    return width // 64


# Operations.


def concatenate(tensors: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """Query, key and value one below the other."""
    return torch.cat(tensors)


def with_zero_key_bias(tensors: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """Query and value bias → with a zero key bias between, which a softmax over keys cannot see."""
    query, value = tensors
    return torch.cat([query, torch.zeros_like(query), value])


def flatten_kernel(tensors: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """(width, channels, patch, patch) of a strided convolution → (width, channels · patch · patch)."""
    return tensors[0].flatten(1)


def fold_token_type(tensors: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """Words and BERT's inner token types → words: every token has the inner type 0."""
    words, token_types = tensors
    return words + token_types[0]


def row(index: int, shape: tuple[int, ...] = (-1,)) -> Operation:
    """One row of a table."""

    def pick(tensors: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
        return tensors[0][index].reshape(shape)

    return pick


def rows_from(start: int) -> Operation:
    """A table without its first rows."""

    def cut(tensors: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
        return tensors[0][start:]

    return cut


def image_positions(start: int) -> Operation:
    """Positions of `[CLS]` and patches, from a row on, for the output's resolution: (1, 1 + patches, width)."""

    def resize(tensors: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
        table = tensors[0].reshape(-1, tensors[0].shape[-1])[start:]
        return torch.cat([table[:1], resize_grid(table[1:], sizes.grid, sizes.new_grid)])[None]

    return resize


def patch_positions(tensors: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """Positions of patches alone, for the output's resolution: (1, patches, width)."""
    return resize_grid(tensors[0], sizes.grid, sizes.new_grid)[None]


def relative_positions(tensors: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """VLMo's table: the offsets between patches come first and are resized, the rest stays."""
    offsets = (2 * sizes.grid - 1) ** 2
    return torch.cat([resize_offsets(tensors[0][:offsets], sizes.grid, sizes.new_grid), tensors[0][offsets:]])


# Stand-ins for heads that a file doesn't hold: absent head → target key → function of what is there.


def initial_temperature(state: dict[str, torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """ln(1 / 0.07), where both upstream projects start."""
    return torch.tensor(1 / 0.07).log()


def zero_bias(state: dict[str, torch.Tensor], sizes: Sizes) -> torch.Tensor:
    return torch.zeros(sizes.config["vocab_size"])


def copied_words(state: dict[str, torch.Tensor], sizes: Sizes) -> torch.Tensor:
    return state["model.text_embedding.word_embeddings.weight"].clone()


def identity_matrix(state: dict[str, torch.Tensor], sizes: Sizes) -> torch.Tensor:
    return torch.eye(sizes.config["hidden_size"])


def ones(state: dict[str, torch.Tensor], sizes: Sizes) -> torch.Tensor:
    return torch.ones(sizes.config["hidden_size"])


def zeros(state: dict[str, torch.Tensor], sizes: Sizes) -> torch.Tensor:
    return torch.zeros(sizes.config["hidden_size"])


STAND_INS: dict[str, dict[str, Callable[[dict[str, torch.Tensor], Sizes], torch.Tensor]]] = {
    "projections": {
        "model.image_projection.weight": identity_matrix,
        "model.text_projection.weight": identity_matrix,
        "model.logit_scale": initial_temperature,
    },
    "tied caption head": {"lm_head.decoder.bias": zero_bias},
    "caption transform": {
        "lm_head.transform.0.weight": identity_matrix,
        "lm_head.transform.0.bias": zeros,
        "lm_head.transform.2.weight": ones,
        "lm_head.transform.2.bias": zeros,
        "lm_head.decoder.bias": zero_bias,
    },
    "own caption head": {"lm_head.decoder.bias": zero_bias, "lm_head.decoder.weight": copied_words},
}

# What a user has to know about them.
CAVEATS = {
    "projections": "embeddings are the first token's state: the file has no trained projection",
    "tied caption head": "the caption head is untrained, tied to the word embeddings: fine-tune it before captioning",
    "caption transform": "captions are not learnt yet: their experts are copies of those of texts; train them with "
    "training/recipes/caption-siglip.yaml",
    "own caption head": "the caption head is untrained, a copy of the word embeddings: fine-tune it before captioning",
}


def absent_heads(projections: bool, masked_lm: bool, options: Options) -> tuple[str, ...]:
    """Keys of `STAND_INS`, by what the file holds."""
    caption_head = "own caption head" if options.caption else "tied caption head"
    return ("projections",) * (not projections) + (caption_head,) * (not masked_lm)
