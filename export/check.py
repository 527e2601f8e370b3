"""Whether exported files give what the checkpoint gives: on drawn pictures and drawn words, at several batch sizes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F

from ..embedder import Embedder
from ..errors import ExportError
from ..onnx_embedder import OnnxEmbedder

BATCHES = (1, 3, 32)
LENGTHS = (3, None)  # tokens of the longest text of a batch; None: as many as the model reads
CAPTIONS = 16
# The mean and the lowest cosine that an embedding may have with that of the checkpoint.
LEAST_COSINE = {"fp32": (0.99999, 0.99999), "fp16": (0.9995, 0.9), "q8": (0.999, 0.9)}
LEAST_CAPTIONS = {"fp32": 1.0, "fp16": 0.75, "q8": 0.5}  # the share that is the same token for token


@dataclass(frozen=True)
class Agreement:
    """How an export agrees with its checkpoint.

    Attributes:
        images, texts: cosines of embeddings, (mean, lowest).
        captions: the share of greedy captions that are the same token for token; `None` without a caption head.
    """

    images: tuple[float, float]
    texts: tuple[float, float]
    captions: float | None = None

    def check(self, dtype: str):
        """Raises ExportError if it is too little for this type."""
        mean, lowest = LEAST_COSINE[dtype]
        for what, found in (("images", self.images), ("texts", self.texts)):
            if not (found[0] >= mean and found[1] >= lowest):  # `not >=` also catches NaN
                raise ExportError(
                    f"type {dtype}: embeddings of {what} have a cosine of {found[0]:.5f} (lowest {found[1]:.5f}) with "
                    f"the checkpoint's, at least {mean} (lowest {lowest}) is wanted: leave {dtype} out"
                )
        if self.captions is not None and not self.captions >= LEAST_CAPTIONS[dtype]:
            raise ExportError(
                f"type {dtype}: {self.captions:.0%} of the captions are the checkpoint's, at least "
                f"{LEAST_CAPTIONS[dtype]:.0%} is wanted: leave {dtype} out"
            )


class Checks:
    """Inputs, and what the checkpoint makes of them.

    Args:
        embedder: the checkpoint's, in float32 on the CPU; a captioner if captions are to be compared.
    """

    def __init__(self, embedder: Embedder):
        config, random = embedder.config, np.random.default_rng(0)
        pictures = [draw_picture(random, 2 * config.image_size) for _ in range(sum(BATCHES))]
        self.pixel_values = torch.cat(list(embedder.pixel_batches(pictures)))
        self.tokens = [
            draw_tokens(random, embedder, batch, length or embedder.longest_text)
            for batch in BATCHES
            for length in LENGTHS
        ]
        self.image_embeds, self.text_embeds = self._images(embedder), self._texts(embedder)
        self.captions = None
        if hasattr(embedder.model, "generate"):
            room = config.max_position_embeddings - 1
            options = {"max_new_tokens": room, "do_sample": False, "num_beams": 1, "output_cosine": False}
            with embedder.evaluating():
                self.captions = embedder.model.generate(
                    pixel_values=self.pixel_values[:CAPTIONS], return_dict_in_generate=False, **options
                )

    def _images(self, embedder: Embedder) -> torch.Tensor:
        return torch.cat([embedder.embed_pixel_values(some) for some in self.pixel_values.split(BATCHES)])

    def _texts(self, embedder: Embedder) -> torch.Tensor:
        return torch.cat([embedder.embed_tokens(each) for each in self.tokens])

    def of(self, exported: OnnxEmbedder) -> Agreement:
        """Compares an export with the checkpoint."""
        captions = None
        if self.captions is not None:
            ids = exported.caption_ids(self.pixel_values[:CAPTIONS], exported.config.max_position_embeddings)
            captions = same_rows(ids, self.captions, exported.config.pad_token_id)
        images, texts = self._images(exported), self._texts(exported)
        return Agreement(cosines(images, self.image_embeds), cosines(texts, self.text_embeds), captions)

    def of_both(self, session: Any, embedder: Embedder) -> Agreement:
        """Compares the file of both towers with the checkpoint: its embeddings, and logits made of them.

        Args:
            session: of ONNX Runtime.
            embedder: the checkpoint's.

        Raises:
            ExportError: the logits are not the products of the embeddings.
        """
        images, texts, model = [], [], getattr(embedder.model, "model", embedder.model)
        for number, tokens in enumerate(self.tokens):
            given = {name: value.numpy() for name, value in tokens.items()}
            pixel_values = self.pixel_values.split(BATCHES)[number // len(LENGTHS)]
            per_image, per_text, text, image = map(
                torch.from_numpy, session.run(None, {"pixel_values": pixel_values.numpy(), **given})
            )
            expected = model.similarity(image, text)
            if not (per_image - expected).abs().max() < 1e-3 * model.logit_scale.exp() or not torch.equal(
                per_text, per_image.T
            ):
                raise ExportError("the logits of both towers are not the products of their embeddings")
            images, texts = [*images, image], [*texts, text]
        wanted = [rows for rows in self.image_embeds.split(BATCHES) for _ in LENGTHS]
        return Agreement(cosines(torch.cat(images), torch.cat(wanted)), cosines(torch.cat(texts), self.text_embeds))


def draw_picture(random: np.random.Generator, side: int) -> Image.Image:
    """Some coloured shapes on a plain ground, (side, side)."""

    def colour() -> tuple[int, ...]:
        return tuple(random.integers(0, 256, 3).tolist())

    picture = Image.new("RGB", (side, side), "white" if random.random() < 0.7 else colour())
    draw = ImageDraw.Draw(picture)
    for _ in range(random.integers(1, 6)):
        shape = (draw.ellipse, draw.rectangle, draw.arc, draw.line)[random.integers(4)]
        left, top = random.integers(0, 3 * side // 4, 2).tolist()
        right, bottom = (side - random.integers(0, side // 4, 2)).tolist()
        if shape in (draw.ellipse, draw.rectangle):
            shape((left, top, max(left + 1, right), max(top + 1, bottom)), fill=colour())
        elif shape == draw.arc:
            start = int(random.integers(360))
            box = (left, top, max(left + 1, right), max(top + 1, bottom))
            shape(box, start, start + 200, fill=colour(), width=max(1, side // 16))
        else:
            shape((left, top, right, bottom), fill=colour(), width=max(1, side // 16))
    return picture


def draw_tokens(random: np.random.Generator, embedder: Embedder, texts: int, longest: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (texts, longest): words drawn one by one, the first text as long as can be."""
    config, tokenizer = embedder.config, embedder.processor.tokenizer
    special = {*tokenizer.all_special_ids, config.image_token_id, getattr(config, "mask_token_id", None)}
    words = [word for word in range(min(len(tokenizer), config.vocab_size)) if word not in special]
    ids = np.full((texts, longest), config.pad_token_id)
    lengths = np.array([longest, *random.integers(3, longest + 1, texts - 1)])
    for row, length in zip(ids, lengths):
        first = [config.bos_token_id] if getattr(config, "text_start_token", True) else []  # CoCa's have one
        row[:length] = [*first, *random.choice(words, length - len(first) - 1), tokenizer.eos_token_id]
    mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def cosines(embeds: torch.Tensor, others: torch.Tensor) -> tuple[float, float]:
    """(rows, dimension) each → the mean and the lowest cosine of a row with the other's."""
    found = F.cosine_similarity(embeds, others, dim=-1)
    return float(found.mean()), float(found.min())


def same_rows(ids: torch.Tensor, others: torch.Tensor, padding: int) -> float:
    """The share of rows that are the same but for padding at their end, which may have other lengths."""
    length = max(ids.shape[1], others.shape[1])
    ids, others = (F.pad(each, (0, length - each.shape[1]), value=padding) for each in (ids, others))
    return float((ids == others).all(dim=1).float().mean())
