"""Image–text pairs, from anything that `datasets` reads to the tensors of a batch.

    load_rows ─ Dataset of raw rows ─ Batches / StreamedBatches ─ Batch of this process for one step
                                      (texts drawn, images decoded, augmented, tokenised)

- order, texts and augmentation depend on (seed, epoch, step, rank) alone: a resumed run sees the same batches, and no
  state of workers or iterators needs saving;
- a bad row (unreadable image, no text) keeps its place as an invalid row, so that shapes, order and the other
  processes are unaffected; it is reported by name and takes no part in any loss.
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
from ..data.teacher import Teacher
from ..errors import RecipeError, first_line
from ..processing_mome import MomeProcessor


@dataclass
class Batch:
    """Pairs of one process for one step.

    Attributes:
        pixel_values: (pairs, channels, side, side), uint8 pixels or float32 pixel values; see `to_pixels`.
        input_ids, attention_mask: (pairs, tokens) int64, padded on the right to a fixed length.
        positive_ids: (pairs, 1 or 2) int64; rows with an equal value in a column are positives of each other.
        valid: (pairs,) bool, False for a bad row.
        captioned: (pairs,) bool, whether a row's text is also a caption to learn.
        texts: the texts before tokenisation.
        bad: names of bad rows, with the reason.
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
        """The batch in chunks of `size` pairs; the last one may be smaller. `None`: the whole batch as one."""
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
        processor: tokenises texts, and says how images become pixels.
        max_text_tokens: texts are cut and padded to this many tokens.
        image_column, text_column, positive_column: see `Recipe`.
        augmentations: what is done to the examples of a batch, in order.
        teacher: adds its embeddings of the texts.
    """

    processor: MomeProcessor
    max_text_tokens: int
    image_column: str
    text_column: str = "text"
    positive_column: str | None = None
    augmentations: list[Augmentation] = field(default_factory=list)
    teacher: Teacher | None = None

    def __call__(self, rows: list[Example], names: list[str], rng: np.random.Generator) -> Batch:
        """One batch of `len(rows)` pairs.

        Args:
            rows: as the data set has them, images still encoded.
            names: what messages call the rows.
            rng: draws texts and augmentations.
        """
        examples, places, bad = [], [], []
        for place, (row, name) in enumerate(zip(rows, names)):
            draw = rng.random()  # for every row, so that a bad one does not shift the others' draws
            try:
                pair = read_pair(row, self.image_column, self.text_column)
                image, texts = pair.open(), pair.texts
            except Exception as error:  # Pillow's decoders raise nearly anything
                bad.append(f"{self._name(row, name)}: {first_line(error)}")
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
            pixel_values=pixel_values,
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            positive_ids=torch.tensor(positive_ids),
            valid=valid,
            captioned=captioned,
            texts=texts,
            bad=bad,
            teacher_embeds=self.teacher.embed(texts) * valid[:, None] if self.teacher else None,
        )


# ---------------------------------------------------------------------------------------------- order of rows


@dataclass(frozen=True)
class Shard:
    """Which rows of the whole batch belong to this process."""

    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        if self.batch_size % self.world_size:
            raise RecipeError(f"batch_size={self.batch_size} is not a multiple of the {self.world_size} processes")

    @property
    def rows(self) -> slice:
        size = self.batch_size // self.world_size
        return slice(self.rank * size, (self.rank + 1) * size)


class Batches(torch.utils.data.Dataset):
    """The batches of one epoch over a data set with random access, by their number."""

    def __init__(self, rows: datasets.Dataset, collator: Collator, shard: Shard, seed: int, epoch: int = 0):
        if len(rows) < shard.batch_size:
            raise RecipeError(f"{len(rows)} rows are fewer than batch_size={shard.batch_size}: make it smaller")
        self.rows, self.collator, self.shard, self.seed, self.epoch = rows, collator, shard, seed, epoch
        self.order = np.random.default_rng([seed, epoch]).permutation(len(rows))

    def __len__(self) -> int:
        """Whole batches in an epoch; left-over rows have their turn in another epoch."""
        return len(self.rows) // self.shard.batch_size

    def __getitem__(self, step: int) -> Batch:
        start = step * self.shard.batch_size
        indices = self.order[start : start + self.shard.batch_size][self.shard.rows]
        columns = self.rows[indices]
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
        rng = np.random.default_rng([self.seed, self.epoch, step, self.shard.rank])
        return self.collator(rows, [f"row {index}" for index in indices], rng)


class StreamedBatches(torch.utils.data.IterableDataset):
    """The batches of one epoch over a stream, from number `start` on.

    Every process reads the whole stream but decodes only its own rows, so that the order does not depend on how many
    processes there are.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        collator: Collator,
        shard: Shard,
        seed: int,
        epoch: int = 0,
        start: int = 0,
        buffer_size: int = 10_000,
    ):
        self.rows = rows.shuffle(seed=seed + epoch, buffer_size=buffer_size).skip(start * shard.batch_size)
        self.collator, self.shard, self.seed, self.epoch, self.start = collator, shard, seed, epoch, start

    def __iter__(self) -> Iterator[Batch]:
        stream = enumerate(self.rows, self.start * self.shard.batch_size)
        for step in itertools.count(self.start):
            numbered = list(itertools.islice(stream, self.shard.batch_size))
            if len(numbered) < self.shard.batch_size:
                return
            own = numbered[self.shard.rows]
            rng = np.random.default_rng([self.seed, self.epoch, step, self.shard.rank])
            yield self.collator([row for _, row in own], [f"row {number} of the stream" for number, _ in own], rng)


def epoch_of_batches(
    rows: datasets.Dataset | datasets.IterableDataset,
    collator: Collator,
    shard: Shard,
    seed: int,
    epoch: int,
    start: int = 0,
    buffer_size: int = 10_000,
    num_workers: int = 0,
) -> torch.utils.data.DataLoader:
    """The batches of an epoch from number `start` on, prepared by `num_workers` processes.

    A stream always has one worker: `datasets` shuffles differently in a worker than in the main process.
    """
    if isinstance(rows, datasets.IterableDataset):
        batches = StreamedBatches(rows, collator, shard, seed, epoch, start, buffer_size)
        sampler, num_workers = None, 1
    else:
        batches = Batches(rows, collator, shard, seed, epoch)
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
    """Ctrl-C goes to the whole process group: it should end the run, and the run ends its workers."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
