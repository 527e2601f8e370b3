"""The data set as tensors of a device: decoded once, kept in one file beside the parquet files.

    parquet files ─ read ─┐
    tokenizer, teacher ───┴─ build_tensors ─ IconTensors ─ save ─ icons.safetensors ─ load(device) ─ drawing, phrases

A picture of one colour is its opacity, one byte a pixel; the others have four. 250,000 pictures of 64 x 64 pixels are
1.4 GB. Every text (name, tag, broader word, definition) has one number, by which names, positives and token ids are
found.

Glossary of shapes: rows (pictures with their texts); plain and coloured (pictures of each kind); side; texts; length
(of the longest text in tokens); axes (of the teacher's embeddings).
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from ..configuration_mome import quoted
from ..data.teacher import Teacher
from ..errors import DataError, first_line
from .captions import STYLE_ADJECTIVES, article, kind_of_picture, split_noun
from .compose import Icons
from .splits import SPLITS
from .wordnet import MAX_RELATED

KINDS = ("icon", "emoji", "drawing", "pictogram")
STYLES = tuple(STYLE_ADJECTIVES)
ARTICLES = ("", "a", "an", "the")
FILE = "icons.safetensors"
FORMAT = "2"
CHUNK = 512  # rows decoded at a time
COLUMNS = ("image", "texts", "related", "gloss", "name", "set", "style", "source_id")


@dataclass
class IconTensors:
    """The data set on one device.

    Attributes:
        alpha: (plain, side, side) uint8, opacity of the pictures of one colour; the strongest pixel of each is 255.
        rgba: (coloured, side, side, 4) uint8.
        coloured: (rows,) bool.
        place: (rows,) int32, where in `alpha` or `rgba` a row's picture is.
        firm: (rows,) bool, whether most of the ink shows its colour unmixed, so that the colour can be said.
        main_colour: (rows,) int8, index into `palette.NAMES` of the colour that most of a coloured picture has, or -1.
        split, kind, style: (rows,) int8, indices into `SPLITS`, `KINDS` and `STYLES`; style -1 is none that has words.
        name: (rows,) int32, the text that is the row's name.
        own: (rows, most texts of a row) int32, its texts, name and tags; -1 behind the last.
        tokens: (texts, length) int32, ids without special ones; -1 behind the last.
        noun: (texts,) int8, 0 for a text that is no noun, else 1 + the index of its article in `ARTICLES`.
        vowel: (texts,) bool, whether "an" stands before the bare text, not "a".
        related: (texts, MAX_RELATED) int32, for a name the synonyms and broader words true of it; -1 behind the last.
        gloss: (texts,) int32, for a name its definition, -1 where there is none.
        teacher: (texts, axes) float16, L2-normalised; zeros for a text that the teacher doesn't know.
        word_teacher: (vocabulary, axes) float16, likewise for every piece of the tokenizer.
        texts: the texts in the order of their numbers.
    """

    alpha: torch.Tensor
    rgba: torch.Tensor
    coloured: torch.Tensor
    place: torch.Tensor
    firm: torch.Tensor
    main_colour: torch.Tensor
    split: torch.Tensor
    kind: torch.Tensor
    style: torch.Tensor
    name: torch.Tensor
    own: torch.Tensor
    tokens: torch.Tensor
    noun: torch.Tensor
    vowel: torch.Tensor
    related: torch.Tensor
    gloss: torch.Tensor
    teacher: torch.Tensor
    word_teacher: torch.Tensor
    texts: list[str]

    @property
    def side(self) -> int:
        return self.alpha.shape[1] if len(self.alpha) else self.rgba.shape[1]

    @property
    def device(self) -> torch.device:
        return self.name.device

    def __len__(self) -> int:
        return len(self.name)

    def rows_of(self, splits: Sequence[str]) -> torch.Tensor:
        """int64 numbers of the rows of some splits; an unknown split is a `DataError`."""
        for split in splits:
            if split not in SPLITS:
                raise DataError(f"no split {quoted(split)}: choose among {', '.join(SPLITS)}")
        wanted = torch.tensor([SPLITS.index(split) for split in splits], device=self.device)
        return torch.isin(self.split, wanted).nonzero()[:, 0]

    def known_texts(self, glosses: bool) -> torch.Tensor:
        """int64 numbers of the texts that the teacher knows, with or without definitions."""
        known = self.teacher.abs().sum(dim=1) > 0
        if not glosses:
            known[self.gloss[self.gloss >= 0].long()] = False
        return known.nonzero()[:, 0]

    def save(self, path: Path, source: str = ""):
        """Writes one file, whole or not at all; `source` is what `load` compares."""
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self._tensors().items()}
        tensors["texts"] = torch.frombuffer(bytearray("\n".join(self.texts).encode()), dtype=torch.uint8)
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, metadata={"format": FORMAT, "source": source})
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu", source: str | None = None) -> "IconTensors":
        """Reads a file straight into the memory of a device.

        Raises:
            DataError: no such file, another format, or made from another `source`.
        """
        try:
            with safe_open(path, "pt", device="cpu" if torch.device(device).type == "cpu" else str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise DataError(f"{path} has format {quoted(metadata.get('format'))}, not {FORMAT!r}: remove it")
                if source is not None and metadata.get("source") != source:
                    raise DataError(f"{path} was made from other files: remove it")
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except OSError as error:
            raise DataError(f"{path} can't be read: {first_line(error)}") from None
        texts = bytes(tensors.pop("texts").cpu().numpy()).decode().split("\n")
        return cls(**tensors, texts=texts)

    def to(self, device: torch.device | str) -> "IconTensors":
        return dataclasses.replace(self, **{name: each.to(device) for name, each in self._tensors().items()})

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "texts"}


# ------------------------------------------------------------------------------------------- from parquet files


def load_icons(folder: Path, tokenizer, teacher: Path | None, axes: int, device) -> IconTensors:
    """The data set of a folder of parquet files, from the file beside them if it is up to date, else made anew.

    Args:
        folder: parquet files named `split-*.parquet`, as the build writes them; or a file that `save` wrote.
        tokenizer: makes the token ids; its `model_max_length` counts two special tokens.
        teacher: parquet file with the columns `text` and `embedding`, or `None`.
        axes: of the teacher's embeddings to keep, the student's `projection_dim`.
        device: where the tensors go.

    Raises:
        DataError: no such files, one without a column, or a picture that can't be decoded.
        RecipeError: a teacher that can't be read.
    """
    if folder.is_file():
        return IconTensors.load(folder, device)
    files = split_files(folder)
    source = _fingerprint(files, tokenizer, teacher, axes)
    try:
        return IconTensors.load(folder / FILE, device, source)
    except DataError:
        icons = build_tensors(files, tokenizer, teacher, axes)
        icons.save(folder / FILE, source)
        return icons.to(device)


def split_files(folder: Path) -> list[tuple[str, Path]]:
    """Split and path of every parquet file of the data set."""
    files = [(split, path) for split in SPLITS for path in sorted(folder.glob(f"{split}-0*.parquet"))]
    if not files:
        raise DataError(f"no parquet files such as train-00000-of-00005.parquet in {quoted(folder)}")
    return files


def _fingerprint(files, tokenizer, teacher: Path | None, axes: int) -> str:
    """Changes whenever a file (by name, size and time), the vocabulary or the number of axes does."""
    paths = [path for _, path in files] + ([teacher] if teacher else [])
    stats = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    vocabulary = sorted(tokenizer.get_vocab().items())
    told = json.dumps([stats, vocabulary, tokenizer.model_max_length, axes])
    return hashlib.sha256(told.encode()).hexdigest()


def build_tensors(
    files: Sequence[tuple[str, Path]], tokenizer, teacher: Path | None = None, axes: int = 0
) -> IconTensors:
    """Decodes every picture and tokenizes every text; arguments as those of `load_icons`.

    Pictures are decoded into arrays of their final size, a few hundred at a time: there is never a second copy.
    """
    table = TextTable()
    rows: dict[str, list] = {name: [] for name in ("coloured", "split", "kind", "style", "name", "own")}
    for split, row in _rows(files):
        texts = [table.number(text) for text in row["texts"]]
        name = table.number(row["name"])
        rows["coloured"].append(_is_coloured(row["image"]["bytes"]))
        rows["split"].append(SPLITS.index(split))
        rows["kind"].append(KINDS.index(kind_of_picture(row["set"] or "")))
        rows["style"].append(STYLES.index(row["style"]) if row["style"] in STYLES else -1)
        rows["name"].append(name)
        rows["own"].append(texts)
        table.relate(name, row["related"] or [], row["gloss"] or "")
    pictures = _decode(files, np.array(rows["coloured"], bool))
    wide = torch.int32
    return IconTensors(
        **pictures,
        **{name: torch.tensor(rows[name], dtype=torch.int8) for name in ("split", "kind", "style")},
        name=torch.tensor(rows["name"], dtype=wide),
        own=padded(rows["own"], wide),
        **table.tensors(tokenizer),
        **_teach(table.texts, tokenizer, teacher, axes),
        texts=table.texts,
    )


class TextTable:
    """Numbers for texts, and what is known of each: relations, tokens, whether it is a noun."""

    def __init__(self):
        self.numbers: dict[str, int] = {}
        self.related: dict[int, list[int]] = {}
        self.gloss: dict[int, int] = {}

    @property
    def texts(self) -> list[str]:
        return list(self.numbers)

    def number(self, text: str) -> int:
        return self.numbers.setdefault(" ".join(text.split()), len(self.numbers))

    def relate(self, name: int, related: Sequence[str], gloss: str):
        """Adds what is true of a name; all its rows say the same."""
        if related and name not in self.related:
            self.related[name] = [self.number(text) for text in related]
        if gloss and name not in self.gloss:
            self.gloss[name] = self.number(gloss)

    def tensors(self, tokenizer) -> dict[str, torch.Tensor]:
        """`tokens`, `noun`, `vowel`, `related` and `gloss` of `IconTensors`."""
        texts = self.texts
        related = torch.full((len(texts), MAX_RELATED), -1, dtype=torch.int32)
        for name, others in self.related.items():
            related[name, : len(others)] = torch.tensor(others, dtype=torch.int32)
        gloss = torch.tensor([self.gloss.get(text, -1) for text in range(len(texts))], dtype=torch.int32)
        return {"tokens": tokenize(texts, tokenizer), **grammar(texts), "related": related, "gloss": gloss}


def tokenize(texts: Sequence[str], tokenizer) -> torch.Tensor:
    """(texts, length) int32 ids without special tokens, cut so that two of those fit the model; -1 behind the last."""
    longest = tokenizer.model_max_length - 2
    encoded = tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=longest)
    return padded(encoded["input_ids"], torch.int32)


def grammar(texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """`noun` and `vowel` of `IconTensors`, by the rules of `captions.py`."""
    nouns = [split_noun(text) for text in texts]
    noun = [0 if each is None else 1 + ARTICLES.index(each[0]) for each in nouns]
    vowel = [article(text).startswith("an ") for text in texts]
    return {"noun": torch.tensor(noun, dtype=torch.int8), "vowel": torch.tensor(vowel)}


def padded(lists: Sequence[Sequence[int]], dtype: torch.dtype) -> torch.Tensor:
    """(lists, longest), -1 behind the last of each; lists of equal length 0 give one column."""
    width = max([1, *map(len, lists)])
    array = np.full((len(lists), width), -1, np.int64)
    for row, values in enumerate(lists):
        array[row, : len(values)] = values
    return torch.from_numpy(array).to(dtype)


def _rows(files: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Split and columns of every row; pictures as they are in the file."""
    for split, path in files:
        with pyarrow.parquet.ParquetFile(path) as file:
            for column in COLUMNS:
                if column not in file.schema_arrow.names:
                    raise DataError(f"{path} has no column {quoted(column)}: run mome.icons.build again")
            for batch in file.iter_batches(batch_size=CHUNK, columns=list(COLUMNS)):
                for row in batch.to_pylist():
                    yield split, row


def _is_coloured(png: bytes) -> bool:
    with Image.open(io.BytesIO(png)) as image:  # reads the header only
        return image.mode != "LA"


def _decode(files, coloured: np.ndarray) -> dict[str, torch.Tensor]:
    """The columns of `IconTensors` that pictures give."""
    place = np.where(coloured, np.cumsum(coloured) - 1, np.cumsum(~coloured) - 1)
    firm, main = np.zeros(len(coloured), bool), np.full(len(coloured), -1, np.int8)
    alpha = rgba = None
    start = 0
    for arrays in _pictures(files):
        side = arrays[0].shape[0]
        if alpha is None:
            alpha = np.zeros((int((~coloured).sum()), side, side), np.uint8)
            rgba = np.zeros((int(coloured.sum()), side, side, 4), np.uint8)
        icons = Icons(arrays)
        firm[start : start + len(arrays)] = icons.firm
        for index, array in enumerate(arrays):
            row = start + index
            if coloured[row]:
                rgba[place[row]] = array
                main[row] = icons.main_colour(index)
            else:
                alpha[place[row]] = np.rint(icons.alpha[index] * 255)
        start += len(arrays)
    columns = {"alpha": alpha, "rgba": rgba, "coloured": coloured, "place": place.astype(np.int32)}
    return {name: torch.from_numpy(each) for name, each in (columns | {"firm": firm, "main_colour": main}).items()}


def _pictures(files) -> Iterator[list[np.ndarray]]:
    """Chunks of pictures, uint8 (side, side, 2 or 4), in the order of the rows."""
    chunk = []
    for _, row in _rows(files):
        try:
            image = Image.open(io.BytesIO(row["image"]["bytes"]))
            chunk.append(np.asarray(image if image.mode == "LA" else image.convert("RGBA")))
        except OSError as error:
            raise DataError(
                f"the picture of {quoted(row['source_id'])} can't be decoded: {first_line(error)}"
            ) from None
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _teach(texts: Sequence[str], tokenizer, teacher: Path | None, axes: int) -> dict[str, torch.Tensor]:
    """`teacher` and `word_teacher` of `IconTensors`; one column of zeros without a teacher."""
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    if teacher is None:
        return {
            "teacher": torch.zeros(len(texts), 1, dtype=torch.float16),
            "word_teacher": torch.zeros(len(pieces), 1, dtype=torch.float16),
        }
    known = Teacher(str(teacher), axes)
    return {
        "teacher": known.embed(texts).half(),
        "word_teacher": known.embed([piece.removeprefix("##") for piece in pieces]).half(),
    }


def normalised(embeddings: torch.Tensor, width: int) -> torch.Tensor:
    """(texts, axes) → (texts, width) float32, cut or filled with zeros, L2-normalised; rows of zeros stay zeros."""
    embeddings = embeddings.float()[:, :width]
    return F.normalize(F.pad(embeddings, (0, max(0, width - embeddings.shape[1]))), dim=1)


def where(condition: torch.Tensor, yes: torch.Tensor | float, no: torch.Tensor | float) -> torch.Tensor:
    """As `torch.where`, which copies a number to the device while the host waits; this does not.

    Args:
        condition: bool; of a shape that fits the one of a tensor beside a number.
        yes, no: tensors, or whole numbers if both are numbers.
    """
    if not isinstance(yes, torch.Tensor) and not isinstance(no, torch.Tensor):
        no = torch.full_like(condition, no, dtype=torch.int64)
    if not isinstance(yes, torch.Tensor):
        return no.masked_fill(condition, yes)
    return torch.where(condition, yes, no) if isinstance(no, torch.Tensor) else yes.masked_fill(~condition, no)
