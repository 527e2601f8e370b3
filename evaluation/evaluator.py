"""Evaluates a captioner on a data set: retrieval both ways, zero-shot classification, captions."""

from dataclasses import dataclass, field, fields
from typing import Any

import datasets
import numpy as np
import torch

from ..configuration_mome import quoted
from ..data.augment import build_augmentations
from ..data.pairs import load_rows, pairs_of
from ..embedder import Embedder
from ..errors import DataError
from .metrics import bleu4_and_cider, exact_match, retrieval_recall, token_f1, zero_shot_accuracy


@dataclass
class Evaluation:
    """One data set to evaluate on.

    Args:
        dataset, dataset_options, split, image_column, text_column: as in `Recipe`. The first text of a row is its
            label; all of its texts are references for its caption.
        max_samples: how many rows to use, drawn with a fixed seed.
        pool: how many images retrieval and classification choose from.
        every_image: use every image of a label, not only its first.
        all_texts: retrieve by all texts of an image, each of which counts as a hit (as on COCO); else by its label.
        classes: how many labels zero-shot classification chooses from.
        captions: how many images to caption.
        max_new_tokens: longest caption in tokens.
        template: sentence that texts are put into before they are embedded, with `{}` for the text.
        augmentations: what is done to the images first, as in `Recipe`; should not be random.
        batch_size: images or texts that go through the model together.
    """

    dataset: str
    dataset_options: dict[str, Any] = field(default_factory=dict)
    split: str = "validation"
    image_column: str | None = None
    text_column: str = "text"
    max_samples: int | None = None
    pool: int = 1000
    every_image: bool = False
    all_texts: bool = False
    classes: int = 100
    captions: int = 256
    max_new_tokens: int = 16
    template: str = "{}"
    augmentations: list[dict[str, Any]] = field(default_factory=list)
    batch_size: int = 128

    @classmethod
    def from_dict(cls, name: str, values: dict[str, Any]) -> "Evaluation":
        known = [each.name for each in fields(cls)]
        if unknown := [key for key in values if key not in known]:
            raise DataError(
                f"evaluation {quoted(name)} has an unknown field {quoted(unknown[0])}: the fields are {known}"
            )
        if "dataset" not in values:
            raise DataError(f"evaluation {quoted(name)} names no dataset")
        return cls(**values)

    @property
    def source(self) -> str:
        """The data in words: the data set, or the files where that is only a kind of file."""
        files = self.dataset_options.get("data_files", {})
        files = files.values() if isinstance(files, dict) else [files]
        return ", ".join([self.dataset, *map(str, files)])

    def load(self) -> tuple[datasets.Dataset, str]:
        """The rows to use, images still encoded, and the name of the image column."""
        rows, image_column = load_rows(
            self.dataset, self.split, self.dataset_options, False, self.image_column, self.text_column
        )
        order = np.random.default_rng(0).permutation(len(rows))[: self.max_samples]
        return rows.select(order), image_column

    def run(self, embedder: Embedder, progress: bool = True) -> dict[str, float]:
        """Metric → figure, as shares in 0…1 (CIDEr: 0…10).

        Args:
            embedder: of a captioner; of any model where `captions` is 0.
            progress: show bars.
        """
        examples = self.examples()
        pool = (examples if self.every_image else one_each(examples))[: self.pool]
        image_embeds = embedder.embed_images([each["image"] for each in pool], self.batch_size, progress)
        texts = list(dict.fromkeys(text for each in pool for text in self._texts(each)))
        said = [self.template.replace("{}", text) for text in texts]
        text_embeds = embedder.embed_texts(said, self.batch_size, allow_blank=True)
        similarity = image_embeds @ text_embeds.T
        figures: dict[str, float] = {"images": len(pool)}
        figures |= self._retrieval(pool, texts, similarity) | self._zero_shot(pool, texts, similarity)
        if chosen := examples[: self.captions]:
            images = [each["image"] for each in chosen]
            captions = embedder.caption_images(images, self.batch_size, progress, self.max_new_tokens)
            figures |= caption_metrics(captions, [each["references"] for each in chosen])
        return figures

    def _texts(self, example: dict) -> list[str]:
        """The texts that an image is to be found by, its label first."""
        return example["references"] if self.all_texts else [example["text"]]

    def _retrieval(self, pool: list[dict], texts: list[str], similarity: torch.Tensor) -> dict[str, float]:
        positives = torch.tensor(
            [[text in own for text in texts] for own in (set(self._texts(each)) for each in pool)]
        )
        figures = {}
        for direction, each, hits in (
            ("text_to_image", similarity.T, positives.T),
            ("image_to_text", similarity, positives),
        ):
            figures |= {f"{direction}_r{k}": value for k, value in retrieval_recall(each, hits).items()}
        return figures

    def _zero_shot(self, pool: list[dict], texts: list[str], similarity: torch.Tensor) -> dict[str, float]:
        labels = list(dict.fromkeys(each["text"] for each in pool))
        places = {label: place for place, label in enumerate(labels)}
        own = torch.tensor([places[each["text"]] for each in pool])
        of_labels = similarity[:, [texts.index(label) for label in labels]]
        return {f"zero_shot_top{k}": v for k, v in zero_shot_accuracy(of_labels, own, self.classes).items()}

    def examples(self) -> list[dict]:
        """The usable rows as examples: their columns with `image`, `text` (the label) and `references` (all texts).

        Rows without a text, and those with an unreadable image, are left out.

        Raises:
            DataError: the data can't be read, or no row is left.
        """
        rows, image_column = self.load()
        examples = []
        for pair in pairs_of(rows, image_column, self.text_column):
            try:
                image = pair.open()
            except Exception:  # Pillow's decoders raise nearly anything
                continue
            examples.append(pair.row | {"image": image, "text": pair.texts[0], "references": pair.texts})
        if not examples:
            raise DataError(f"{quoted(self.dataset)} (split {quoted(self.split)}) has no row with an image and a text")
        for augment in build_augmentations(self.augmentations):
            examples = augment(examples, np.random.default_rng(0))
        return examples


def one_each(examples: list[dict]) -> list[dict]:
    """The first example of each label."""
    first: dict[str, dict] = {}
    for each in examples:
        first.setdefault(each["text"], each)
    return list(first.values())


def caption_metrics(captions: list[str], references: list[list[str]]) -> dict[str, float]:
    """Exact match, token-F1 and, with `mome[eval]`, BLEU-4 and CIDEr."""
    figures = {
        "caption_exact": exact_match(captions, references),
        "caption_f1": token_f1(captions, references),
    }
    try:
        figures |= {f"caption_{name}": value for name, value in bleu4_and_cider(captions, references).items()}
    except ModuleNotFoundError:
        pass
    return figures


__all__ = ["Evaluation", "caption_metrics", "one_each"]
