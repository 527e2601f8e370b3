"""Image–text pairs, from anything that `datasets` reads to the tensors of a batch.

    load_rows ─ Dataset of raw rows ─ Batches / StreamedBatches ─ Batch of this process for one step
                                      (texts drawn, images decoded, augmented, tokenised)

- order, texts and augmentation follow from (seed, epoch, step, rank) alone: a run that is resumed sees what it would
  have seen, and no state of workers or iterators needs saving;
- a row that can't be used (unreadable image, no text) keeps its place as an invalid row, so that shapes, order and
  the other processes stay as they are; it is reported by name and takes no part in any loss.
"""

import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

import datasets
import numpy as np
import torch

from ..data.augment import Augmentation, Example
from ..data.images import to_pixels
from ..data.pairs import read_pair
from ..errors import RecipeError
from ..processing_mome import MomeProcessor
from .distillation import Teacher


@dataclass
class Batch:
    """Pairs of one process for one step.

    Attributes:
        pixel_values: (pairs, channels, side, side), uint8 pixels or float32 pixel values; see `to_pixels`.
        input_ids, attention_mask: (pairs, tokens) int64, padded on the right to a fixed length.
        positive_ids: (pairs, 1 or 2) int64: rows that agree in a column are positives of each other.
        valid: (pairs,) bool, False for a row that could not be used.
        captioned: (pairs,) bool, whether a row's text is also a caption to learn.
        texts: the texts as they were tokenised.
        bad: name and reason of rows that could not be used.
        teacher_embeds: (pairs, projection_dim) float32, L2-normalised, zeros where the teacher does not know the text;
            `None` without a teacher.
    """

    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    positive_ids: torch.Tensor
    valid: torch.Tensor
    captioned: torch.Tensor
    texts: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    teacher_embeds: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.valid)

    def to(self, device: torch.device) -> "Batch":
        tensors = {each.name: getattr(self, each.name) for each in fields(self)}
        moved = {k: v.to(device, non_blocking=True) for k, v in tensors.items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)

    def chunks(self, size: int | None) -> list["Batch"]:
        """The batch in parts of `size` pairs, the last one possibly smaller."""
        size = size or len(self)
        tensors = {each.name: getattr(self, each.name) for each in fields(self)}
        parts = []
        for start in range(0, len(self), size):
            own = {key: value[start : start + size] for key, value in tensors.items() if value is not None}
            parts.append(replace(self, **own))
        return parts


# ------------------------------------------------------------------------------------------- rows to tensors


def stable_hash(text: str) -> int:
    """63 bits that are the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass
class Collator:
    """Raw rows → `Batch`.

    Args:
        max_text_tokens: texts are cut and padded to so many tokens.
        text_column, image_column, positive_column: see `Recipe`.
        teacher: knows what texts shall mean.
    """

    processor: MomeProcessor
    max_text_tokens: int
    image_column: str
    text_column: str = "text"
    positive_column: str | None = None
    augmentations: list[Augmentation] = field(default_factory=list)
    teacher: Teacher | None = None

    def __call__(self, rows: list[Example], names: list[str], rng: np.random.Generator) -> Batch:
        """rows, what error messages call them, and a generator → one batch of `len(rows)` pairs."""
        examples, places, bad = [], [], []
        for place, (row, name) in enumerate(zip(rows, names)):
            draw = rng.random()  # one for every row, good or bad, so that a bad row changes nothing else
            try:
                pair = read_pair(row, self.image_column, self.text_column)
                image, texts = pair.open(), pair.texts
            except Exception as error:  # Pillow's decoders raise nearly anything
                bad.append(f"{self._name(row, name)}: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
                continue
            examples.append(row | {"image": image, "text": texts[int(draw * len(texts))]})
            places.append(place)
        for augment in self.augmentations if examples else ():
            examples = augment(examples, rng)
        return self._tensors(examples, places, len(rows), bad)

    def _name(self, row: Example, name: str) -> str:
        path = row[self.image_column].get("path") if isinstance(row[self.image_column], dict) else None
        return f"{name} ({path})" if path else name

    def _tensors(self, examples: list[Example], places: list[int], size: int, bad: list[str]) -> Batch:
        tokenizer = self.processor.tokenizer
        texts = [""] * size
        groups = [""] * size
        for place, each in zip(places, examples):
            texts[place] = each["text"]
            groups[place] = str(each[self.positive_column]) if self.positive_column else ""
        tokens = tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_text_tokens, return_tensors="pt"
        )
        valid = torch.zeros(size, dtype=torch.bool)
        valid[places] = True
        captioned = torch.zeros(size, dtype=torch.bool)
        captioned[places] = torch.tensor([each.get("captioned", True) for each in examples], dtype=torch.bool)
        positive_ids = [[stable_hash(text)] for text in texts]
        if self.positive_column:
            positive_ids = [[*ids, stable_hash(group)] for ids, group in zip(positive_ids, groups)]
        blank = np.zeros((1, 1, 3), np.uint8)
        pixels = to_pixels([each["image"] for each in examples] or [blank], self.processor.image_processor)
        pixel_values = pixels.new_zeros(size, *pixels.shape[1:])
        if examples:
            pixel_values[places] = pixels
        return Batch(
            pixel_values,
            tokens["input_ids"],
            tokens["attention_mask"],
            torch.tensor(positive_ids),
            valid,
            captioned,
            texts,
            bad,
            self.teacher.embed(texts) * valid[:, None] if self.teacher else None,
        )


# ---------------------------------------------------------------------------------------------- order of rows


@dataclass(frozen=True)
class Slice:
    """Which rows of a global batch are this process's."""

    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        if self.batch_size % self.world_size:
            raise RecipeError(f"batch_size={self.batch_size} is not a multiple of the {self.world_size} processes")

    @property
    def own(self) -> slice:
        size = self.batch_size // self.world_size
        return slice(self.rank * size, (self.rank + 1) * size)


class Batches(torch.utils.data.Dataset):
    """Batch number `step` of one epoch over a data set that allows random access."""

    def __init__(self, rows: datasets.Dataset, collator: Collator, part: Slice, seed: int, epoch: int = 0):
        if len(rows) < part.batch_size:
            raise RecipeError(f"{len(rows)} rows are fewer than batch_size={part.batch_size}: make it smaller")
        self.rows, self.collator, self.part, self.seed, self.epoch = rows, collator, part, seed, epoch
        self.order = np.random.default_rng([seed, epoch]).permutation(len(rows))

    def __len__(self) -> int:
        """Whole batches of an epoch; the rest of the rows has its turn in another one."""
        return len(self.rows) // self.part.batch_size

    def __getitem__(self, step: int) -> Batch:
        start = step * self.part.batch_size
        indices = self.order[start : start + self.part.batch_size][self.part.own]
        columns = self.rows[indices]
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
        rng = np.random.default_rng([self.seed, self.epoch, step, self.part.rank])
        return self.collator(rows, [f"row {index}" for index in indices], rng)


class StreamedBatches(torch.utils.data.IterableDataset):
    """The batches of one epoch over a stream, from batch number `start` on.

    Every process reads the whole stream and decodes its own rows only, so that the order does not depend on the number
    of processes.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        collator: Collator,
        part: Slice,
        seed: int,
        epoch: int = 0,
        start: int = 0,
        buffer_size: int = 10_000,
    ):
        self.rows = rows.shuffle(seed=seed + epoch, buffer_size=buffer_size).skip(start * part.batch_size)
        self.collator, self.part, self.seed, self.epoch, self.start = collator, part, seed, epoch, start

    def __iter__(self) -> Iterator[Batch]:
        stream = enumerate(self.rows, self.start * self.part.batch_size)
        for step in itertools.count(self.start):
            numbered = list(itertools.islice(stream, self.part.batch_size))
            if len(numbered) < self.part.batch_size:
                return
            own = numbered[self.part.own]
            rng = np.random.default_rng([self.seed, self.epoch, step, self.part.rank])
            yield self.collator([row for _, row in own], [f"row {number} of the stream" for number, _ in own], rng)


def epoch_of_batches(
    rows: datasets.Dataset | datasets.IterableDataset,
    collator: Collator,
    part: Slice,
    seed: int,
    epoch: int,
    start: int = 0,
    buffer_size: int = 10_000,
    num_workers: int = 0,
) -> torch.utils.data.DataLoader:
    """The batches of an epoch from number `start` on, made by `num_workers` processes.

    A stream has one, always: in a worker `datasets` shuffles it in another order than in the main process.
    """
    if isinstance(rows, datasets.IterableDataset):
        batches = StreamedBatches(rows, collator, part, seed, epoch, start, buffer_size)
        sampler, num_workers = None, 1
    else:
        batches = Batches(rows, collator, part, seed, epoch)
        sampler = range(start, len(batches))
    return torch.utils.data.DataLoader(
        batches,
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=lambda batch: batch,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_leave_process_group,
        generator=torch.Generator(),  # or starting a loader would move the generator that dropout draws from
    )


def _leave_process_group(worker: int) -> None:
    """Ctrl-C and the like go to a whole process group; they end a run, which then ends its workers."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
