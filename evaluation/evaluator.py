"""What a captioner can do on a data set: retrieval both ways, zero-shot classification, captions."""

from dataclasses import dataclass, field, fields
from typing import Any

import datasets
import numpy as np
import torch
from tqdm import tqdm

from ..data.augment import build_augmentations
from ..data.images import decode_image, to_pixel_values
from ..data.rows import load_rows, texts_of
from ..errors import DataError
from ..modeling_mome import MomeForConditionalGeneration
from ..processing_mome import MomeProcessor
from .metrics import bleu4_and_cider, exact_match, retrieval_recall, token_f1, zero_shot_accuracy


@dataclass
class Evaluation:
    """One data set to evaluate on.

    Args:
        dataset, dataset_options, split, image_column, text_column: as in `Recipe`. The first text of a row is its
            label; all of its texts are references for its caption.
        max_samples: rows that are looked at, drawn with a fixed seed.
        pool: images that retrieval and classification choose from.
        every_image: several images may have one label; without it the first one stands for all.
        all_texts: retrieval by all texts of the images, any of an image's own counts (COCO's way); else by labels.
        classes: labels that zero-shot classification chooses from.
        captions: images that are captioned.
        max_new_tokens: of a caption.
        template: what a label is put into before it is embedded.
        augmentations: what the images go through, as in `Recipe`; should not be random.
        batch_size: images or texts at once.
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
            raise DataError(f"evaluation {name!r} has an unknown field {unknown[0]!r}: the fields are {known}")
        if "dataset" not in values:
            raise DataError(f"evaluation {name!r} names no dataset")
        return cls(**values)

    @property
    def source(self) -> str:
        """The data in words: the data set, or the files where that is only a kind of file."""
        files = self.dataset_options.get("data_files", {})
        files = files.values() if isinstance(files, dict) else [files]
        return ", ".join([self.dataset, *map(str, files)])

    def load(self) -> tuple[datasets.Dataset, str]:
        """The rows to look at, images still encoded, and the name of the image column."""
        rows, image_column = load_rows(
            self.dataset, self.split, self.dataset_options, False, self.image_column, self.text_column
        )
        order = np.random.default_rng(0).permutation(len(rows))[: self.max_samples]
        return rows.select(order), image_column

    def run(
        self, captioner: MomeForConditionalGeneration, processor: MomeProcessor, progress: bool = True
    ) -> dict[str, float]:
        """Metric → figure, as shares in 0…1 (CIDEr: 0…10)."""
        was_training = captioner.training
        captioner.eval()
        try:
            with torch.no_grad():
                return self._run(captioner, processor, progress)
        finally:
            captioner.train(was_training)

    def _run(self, captioner, processor, progress: bool) -> dict[str, float]:
        examples = self.examples()
        pool = (examples if self.every_image else one_each(examples))[: self.pool]
        image_embeds = embed_images(captioner, processor, [each["image"] for each in pool], self.batch_size, progress)
        figures: dict[str, float] = {"images": len(pool)}
        figures |= self._retrieval(captioner, processor, pool, image_embeds)
        figures |= self._zero_shot(captioner, processor, pool, image_embeds)
        if chosen := examples[: self.captions]:
            captions = caption_images(
                captioner,
                processor,
                [each["image"] for each in chosen],
                self.batch_size,
                self.max_new_tokens,
                progress,
            )
            figures |= caption_metrics(captions, [each["references"] for each in chosen])
        return figures

    def _retrieval(self, captioner, processor, pool: list[dict], image_embeds: torch.Tensor) -> dict[str, float]:
        own = [each["references"] if self.all_texts else [each["text"]] for each in pool]
        texts = list(dict.fromkeys(text for each in own for text in each))
        positives = torch.tensor([[text in each for text in texts] for each in map(set, own)])
        similarity = image_embeds @ self._embed_labels(captioner, processor, texts).T
        figures = {}
        for direction, each, hits in (
            ("text_to_image", similarity.T, positives.T),
            ("image_to_text", similarity, positives),
        ):
            figures |= {f"{direction}_r{k}": value for k, value in retrieval_recall(each, hits).items()}
        return figures

    def _zero_shot(self, captioner, processor, pool: list[dict], image_embeds: torch.Tensor) -> dict[str, float]:
        labels = list(dict.fromkeys(each["text"] for each in pool))
        own = torch.tensor([labels.index(each["text"]) for each in pool])
        similarity = image_embeds @ self._embed_labels(captioner, processor, labels).T
        return {f"zero_shot_top{k}": v for k, v in zero_shot_accuracy(similarity, own, self.classes).items()}

    def _embed_labels(self, captioner, processor, texts: list[str]) -> torch.Tensor:
        texts = [self.template.replace("{}", text) for text in texts]
        return embed_texts(captioner, processor, texts, self.batch_size)

    def examples(self) -> list[dict]:
        """Rows that can be used, as examples with `image`, `text` (the label) and `references` (all texts)."""
        rows, image_column = self.load()
        examples = []
        for row in rows:
            try:
                texts = texts_of(row[self.text_column])
                examples.append(
                    row | {"image": decode_image(row[image_column]), "text": texts[0], "references": texts}
                )
            except Exception:  # a file that can't be read, or no text: training names it, here it is left out
                continue
        if not examples:
            raise DataError(f"{self.dataset!r} (split {self.split!r}) has no row with an image and a text")
        for augment in build_augmentations(self.augmentations):
            examples = augment(examples, np.random.default_rng(0))
        return examples


def one_each(examples: list[dict]) -> list[dict]:
    """The first example of each label."""
    first: dict[str, dict] = {}
    for each in examples:
        first.setdefault(each["text"], each)
    return list(first.values())


def _batches(items: list, size: int, progress: bool, what: str):
    starts = range(0, len(items), size)
    for start in tqdm(starts, desc=what, unit="batch", leave=False, disable=not progress):
        yield items[start : start + size]


def _pixels(captioner, processor, images: list) -> torch.Tensor:
    return to_pixel_values(images, processor.image_processor).to(captioner.device)


@torch.no_grad()
def embed_images(captioner, processor, images: list, batch_size: int = 128, progress: bool = False) -> torch.Tensor:
    """(images, projection_dim) float32 on the CPU, L2-normalised."""
    parts = [
        captioner.get_image_features(_pixels(captioner, processor, part)).pooler_output.float().cpu()
        for part in _batches(images, batch_size, progress, "embedding images")
    ]
    return torch.cat(parts)


@torch.no_grad()
def embed_texts(captioner, processor, texts: list[str], batch_size: int = 128) -> torch.Tensor:
    """(texts, projection_dim) float32 on the CPU, L2-normalised; texts beyond the position table are cut."""
    parts = []
    for part in _batches(texts, batch_size, False, ""):
        tokens = processor(text=part, return_tensors="pt", truncation=True, max_length=_longest(captioner))
        parts.append(captioner.get_text_features(**tokens.to(captioner.device)).pooler_output.float().cpu())
    return torch.cat(parts)


def _longest(captioner) -> int:
    return captioner.config.max_position_embeddings


@torch.no_grad()
def caption_images(
    captioner, processor, images: list, batch_size: int = 128, max_new_tokens: int = 16, progress: bool = False
) -> list[str]:
    """Greedy captions."""
    captions = []
    for part in _batches(images, batch_size, progress, "captioning"):
        pixel_values = _pixels(captioner, processor, part)
        ids = captioner.generate(
            pixel_values=pixel_values,
            do_sample=False,
            num_beams=1,
            max_new_tokens=min(max_new_tokens, _longest(captioner) - 1),
        )
        captions += processor.post_process_image_text_to_text(ids)
    return captions


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
