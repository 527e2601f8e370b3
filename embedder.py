"""Images and texts to embeddings, and images to captions: the one loop for each, whatever the model is used for.

    images ── decoded, resized ── batches of pixel_values ──┬─ image embeddings
                                                            └─ generate() ── captions
    texts ─── cut or refused ──── batches of input_ids ──────── text embeddings

Batches, device, dtype, long texts and progress bars are dealt with here and nowhere else in the package. A fingerprint
of the weights says which checkpoint made an embedding.
"""

import hashlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import BatchEncoding
from transformers.utils import logging

from .configuration_mome import MomeConfig, quoted
from .data.images import read_image, to_pixel_values
from .errors import MomeError, first_line
from .families import FAMILIES, FAMILY_NAMES
from .inputs_mome import pictures_of
from .pictures_mome import count_blank, warn_of_blank
from .processing_mome import MomeProcessor
from .texts_mome import longest_text, no_words, tokenize_texts, warn_of_cut_texts, wordless_texts

BATCH_SIZE = 64
CAPTION_TOKENS = 16
FINGERPRINT_SAMPLES = 4096  # values of each tensor
LONG_TEXTS = ("cut", "refuse")

Item = TypeVar("Item")


def model_fingerprint(model: torch.nn.Module) -> str:
    """16 hexadecimal digits of the weights that embed; training changes them, copying, sharding and dtype do not.

    Of each tensor, name, shape and evenly spaced values count, rounded to bfloat16, so that it takes milliseconds.
    """
    embedding = getattr(model, "model", model)  # of a captioner
    digest = hashlib.sha256()
    for name, tensor in sorted(embedding.state_dict().items()):
        plain = tensor.dequantize() if type(tensor).__module__.startswith("torchao.") else tensor
        values = plain.detach().flatten()
        step = max(1, values.numel() // FINGERPRINT_SAMPLES)
        sample = values[::step].to("cpu", torch.bfloat16).view(torch.int16).numpy().astype("<i2")
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()[:16]


def batches_of(items: Sequence[Item], size: int, what: str = "", progress: bool = False) -> Iterator[Sequence[Item]]:
    """`size` items at a time, the last time what is left; with `progress` under a bar called `what`.

    Items without a length, a stream or a generator, are taken as they come.

    Raises:
        MomeError: a `size` that is no number from 1.
    """
    check_count("batch_size", size)
    if not hasattr(items, "__len__"):
        with tqdm(desc=what, unit="batch", leave=False, disable=not progress) as bar:
            items = iter(items)
            while some := list(itertools.islice(items, size)):
                yield some
                bar.update()
        return
    for start in tqdm(range(0, len(items), size), desc=what, unit="batch", leave=False, disable=not progress):
        yield items[start : start + size]


def check_count(name: str, value: Any):
    """Raises MomeError unless it is a whole number from 1: no batch or caption has less."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise MomeError(f"{name}={quoted(value)} must be a whole number from 1")


class Embedder:
    """A model and its processor: images and texts in, embeddings and captions out.

    The model may be in training mode, with all its modules or some of them: every call puts it into evaluation mode
    and back. Several threads may call at the same time.

    Args:
        model: a `MomeModel`, a `CocaModel`, or a captioner.
        processor: its `MomeProcessor`.
        name: folder or Hub id, by which it can be loaded again.
    """

    def __init__(self, model: torch.nn.Module, processor: MomeProcessor, name: str = ""):
        self.model, self.processor, self.name, self.config = model, processor, name, model.config
        self.dimension: int = model.config.projection_dim
        self._switching, self._calls, self._in_training = threading.Lock(), 0, []

    @classmethod
    def load(
        cls,
        model: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = torch.float32,
        revision: str | None = None,
        captions: bool = False,
        **overrides: Any,
    ) -> "Embedder":
        """Loads a checkpoint.

        Args:
            model: folder or Hub id.
            device: default: a GPU if there is one.
            dtype: of weights and computation; embeddings are float32 in any case.
            revision: of a model on the Hub.
            captions: load what `caption_images` needs, too.
            **overrides: fields of the config that are to differ from the checkpoint's, such as `experts_per_token`.

        Raises:
            MomeError: no such checkpoint, one of another kind, or one without its processor; no such device or field;
                one line.
        """
        device = checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        name = str(Path(model).resolve()) if os.path.isdir(model) else str(model)
        try:
            kind = MomeConfig.get_config_dict(name, revision=revision)[0].get("model_type")
            if kind not in FAMILIES:
                reason = f"is of type {quoted(kind)}, not {FAMILY_NAMES}" if kind else "has no config.json"
                raise MomeError(f"model {quoted(name)} can't be loaded: it {reason}")
            processor = MomeProcessor.from_pretrained(name, revision=revision)
            model_class = FAMILIES[kind].captioner if captions else FAMILIES[kind].model
            loaded = _load_quietly(model_class, name, dtype=dtype, revision=revision, **overrides)
        except MomeError:
            raise
        except (OSError, ValueError, TypeError) as error:  # TypeError: no such field of the config
            raise MomeError(f"model {quoted(name)} can't be loaded: {first_line(error)}") from None
        return cls(loaded.to(device).eval(), processor, name)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def precision(self) -> str:
        """Of weights and computation, such as `"float32"`."""
        return str(self.dtype).removeprefix("torch.")

    @cached_property
    def fingerprint(self) -> str:
        """See `model_fingerprint`; of the weights at the first look."""
        return model_fingerprint(self.model)

    @property
    def longest_text(self) -> int:
        """The most tokens of a text that the model reads, `[BOS]` and `[EOS]` counted."""
        return longest_text(self.processor.tokenizer, self.config)

    # --------------------------------------------------------------------------------------------- embeddings

    def embed_images(
        self, images: Sequence[Any], batch_size: int = BATCH_SIZE, progress: bool = False
    ) -> torch.Tensor:
        """Images → (images, dimension) float32 on the CPU, L2-normalised.

        Args:
            images: several of what `read_image` takes: a list, a data set of `datasets` or a column of one, a stream,
                a generator; they are read batch by batch.
            batch_size: images that go through the model together.
            progress: show a bar.

        Raises:
            ValueError: an image that can't be read, with its number.
        """
        parts = [torch.zeros(0, self.dimension)]
        for pixel_values in self.pixel_batches(images, batch_size, "embedding images", progress):
            parts.append(self.embed_pixel_values(pixel_values))
        return torch.cat(parts)

    def embed_pixel_values(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(images, channels, height, width) float32 → (images, dimension) float32 on the CPU, L2-normalised."""
        pixel_values = pixel_values.to(self.device, self.dtype)
        with self.evaluating():
            return _normalised(self.model.get_image_features(pixel_values=pixel_values).pooler_output)

    def embed_texts(
        self,
        texts: Sequence[str],
        batch_size: int = 4 * BATCH_SIZE,
        progress: bool = False,
        long_texts: str = "cut",
        allow_blank: bool = False,
        on_cut: Callable[[int], Any] | None = None,
    ) -> torch.Tensor:
        """Texts → (texts, dimension) float32 on the CPU, L2-normalised.

        Args:
            texts, batch_size, progress: as for images.
            long_texts: what becomes of texts of more than `longest_text` tokens: `"cut"` takes their beginning and
                warns once for all of them; `"refuse"` raises an error.
            allow_blank: take texts without a word, as captions can be: all of them have the same embedding.
            on_cut: is called with the number of texts that were cut, in place of the warning.

        Raises:
            MomeError: a text that is none, blank, or without a word that the tokenizer knows; one that is too long and
                refused; another `long_texts`.
        """
        if isinstance(texts, str):
            raise MomeError(f"texts={quoted(texts, 40)} is one text: pass a list of them")
        texts = texts if isinstance(texts, (list, tuple)) else list(texts)  # a column, a generator
        for number, text in enumerate(texts):
            if not isinstance(text, str) or not (allow_blank or text.strip()):
                raise MomeError(f"text {number} is {quoted(text)}: pass a text of at least one word")
        parts = [torch.zeros(0, self.dimension)]
        options = long_texts, on_cut, allow_blank
        for inputs in self.token_batches(texts, batch_size, "embedding texts", progress, *options):
            parts.append(self.embed_tokens(inputs))
        return torch.cat(parts)

    def embed_tokens(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`input_ids` and `attention_mask`, (texts, tokens) int64 → (texts, dimension) float32 on the CPU."""
        with self.evaluating():
            return _normalised(self.model.get_text_features(**inputs).pooler_output)

    def wordless(self, texts: Sequence[str]) -> list[int]:
        """The numbers of the texts without a word that the tokenizer knows: `embed_texts` refuses them."""
        batches = self.token_batches(texts, on_cut=lambda count: None)
        return self.wordless_rows([ids for inputs in batches for ids in inputs["input_ids"].tolist()])

    def wordless_rows(self, rows: Sequence[list[int]]) -> list[int]:
        """As `wordless`, of texts that are ids already."""
        return wordless_texts(self.processor.tokenizer, rows)

    # ----------------------------------------------------------------------------------------------- captions

    def caption_images(
        self,
        images: Sequence[Any],
        batch_size: int = BATCH_SIZE,
        progress: bool = False,
        max_new_tokens: int = CAPTION_TOKENS,
        **generate: Any,
    ) -> list[str]:
        """Captions, one for each image; greedy ones unless `generate` says otherwise.

        Args:
            images, batch_size, progress: as for embeddings.
            max_new_tokens: longest caption; at most as many as the model has places for.
            generate: options of `generate()`; with `num_return_sequences=n` each image has n captions in a row.

        Raises:
            MomeError: the model has no caption head; a `max_new_tokens` that is no number from 1.
            ValueError: an image that can't be read, with its number; an option that can't be.
        """
        if not hasattr(self.model, "generate"):
            raise MomeError(f"a {type(self.model).__name__} writes no captions: load one with captions=True")
        check_count("max_new_tokens", max_new_tokens)
        room = self.config.max_position_embeddings - 1  # [BOS] has a place, too
        options = {"do_sample": False, "num_beams": 1, **generate, "max_new_tokens": min(max_new_tokens, room)}
        captions = []
        for pixel_values in self.pixel_batches(images, batch_size, "captioning", progress):
            with self.evaluating():
                ids = self.model.generate(pixel_values=pixel_values, **options)
            captions += self.processor.post_process_image_text_to_text(ids)
        return captions

    # ------------------------------------------------------------------------------------------------ batches

    def pixel_batches(
        self, images: Sequence[Any], batch_size: int = BATCH_SIZE, what: str = "images", progress: bool = False
    ) -> Iterator[torch.Tensor]:
        """Images → `pixel_values` (images, channels, height, width) in the model's dtype, on its device.

        Those of one single colour are counted; one warning tells how many, after the last batch.

        Raises:
            ValueError: an image that can't be read, with its number.
        """
        several, number, blank = pictures_of(images), 0, 0
        if several is None:
            raise MomeError(f"images are of type {type(images).__name__}: pass a list, a data set or a generator")
        for some in batches_of(several, batch_size, what, progress):
            rgb = [_read(image, f"image {place}") for place, image in enumerate(some, number)]
            number += len(rgb)
            pixel_values = to_pixel_values(rgb, self.processor.image_processor)
            blank += count_blank(pixel_values)
            yield pixel_values.to(self.device, self.dtype)
        warn_of_blank(blank)

    def token_batches(
        self,
        texts: Sequence[str],
        batch_size: int = 4 * BATCH_SIZE,
        what: str = "texts",
        progress: bool = False,
        long_texts: str = "cut",
        on_cut: Callable[[int], Any] | None = None,
        allow_blank: bool = True,
    ) -> Iterator[BatchEncoding]:
        """Texts → `input_ids` and `attention_mask`, (texts, tokens) int64, on the model's device; blank ones, too.

        Args, Raises: as for `embed_texts`; the warning comes after the last batch.
        """
        if long_texts not in LONG_TEXTS:
            raise MomeError(f"long_texts={quoted(long_texts)}: choose {' or '.join(map(repr, LONG_TEXTS))}")
        limit, cut, number = self.longest_text, 0, 0
        for some in batches_of(texts, batch_size, what, progress):
            inputs, too_long = tokenize_texts(self.processor.tokenizer, list(some), limit)
            if not allow_blank and (empty := wordless_texts(self.processor.tokenizer, inputs["input_ids"].tolist())):
                raise MomeError(no_words(some[empty[0]], f"text {number + empty[0]}"))
            if too_long and long_texts == "refuse":
                text = some[too_long[0]]
                place = f"text {number + too_long[0]} ({quoted(text, 40)})"
                raise MomeError(f"{place} has more than {limit} tokens, the most that the model reads: shorten it")
            number, cut = number + len(some), cut + len(too_long)
            yield inputs.to(self.device)
        if on_cut is None:
            warn_of_cut_texts(cut, limit)
        elif cut:
            on_cut(cut)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients, and evaluation mode until the last thread is done; then each module has its mode again."""
        with self._switching:
            if not self._calls:
                self._in_training = [module for module in self.model.modules() if module.training]
                for module in self._in_training:
                    module.training = False
            self._calls += 1
        try:
            with torch.inference_mode():
                yield
        finally:
            with self._switching:
                self._calls -= 1
                if not self._calls:
                    for module in self._in_training:
                        module.training = True


def _read(image: Any, name: str) -> Image.Image:
    if isinstance(image, Exception):  # a data set could not decode it
        raise ValueError(f"{name}: {first_line(image)}")
    if isinstance(image, dict) and "image" in image:  # a row
        image = image["image"]
    return read_image(image, name)


def checked_device(device: str | torch.device) -> torch.device:
    """Raises MomeError for what is no device."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise MomeError(f"device={quoted(device)} is none of torch's: write cpu, cuda or cuda:1, say") from None


def _load_quietly(model_class: type[torch.nn.Module], name: str, **options: Any) -> torch.nn.Module:
    """Without the bar and the report of weights that embeddings don't need: those of a captioner's head.

    Raises:
        MomeError: the checkpoint lacks weights.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, report = model_class.from_pretrained(name, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    if missing := sorted(report["missing_keys"]):
        raise MomeError(f"model {quoted(name)} lacks {len(missing)} of its weights, {quoted(missing[0])} among them")
    return model


def _normalised(embeds: torch.Tensor) -> torch.Tensor:
    """float32, normalised again after any rounding to a smaller type."""
    return F.normalize(embeds.float(), dim=-1).cpu()


__all__ = ["BATCH_SIZE", "CAPTION_TOKENS", "Embedder", "batches_of", "checked_device", "model_fingerprint"]
