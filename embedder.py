"""Embeds images and texts with a checkpoint, and knows by a fingerprint which checkpoint it is."""

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers.utils import logging

from .configuration_mome import MomeConfig
from .data.images import to_pixel_values
from .errors import MomeError, first_line
from .modeling_mome import MomeModel
from .processing_mome import MomeProcessor, load_rgb_image

BATCH_SIZE = 64
FINGERPRINT_SAMPLES = 4096  # values of each tensor


def model_fingerprint(model: torch.nn.Module) -> str:
    """16 hexadecimal digits of the weights that embed; training changes them, copying, sharding and dtype do not.

    Of each tensor, name, shape and evenly spaced values count, rounded to bfloat16, so that it takes milliseconds.
    """
    embedding = getattr(model, "model", model)  # of a captioner
    digest = hashlib.sha256()
    for name, tensor in sorted(embedding.state_dict().items()):
        values = tensor.detach().flatten()
        step = max(1, values.numel() // FINGERPRINT_SAMPLES)
        sample = values[::step].to("cpu", torch.bfloat16).view(torch.int16).numpy().astype("<i2")
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()[:16]


class Embedder:
    """A model and its processor, from images and texts to embeddings.

    Args:
        model: a `MomeModel`, or a captioner.
        processor: its `MomeProcessor`.
        name: folder or Hub id, by which it can be loaded again.
    """

    def __init__(self, model: torch.nn.Module, processor: MomeProcessor, name: str = ""):
        self.model, self.processor, self.name = model.eval(), processor, name
        self.fingerprint = model_fingerprint(model)
        self.dimension: int = model.config.projection_dim
        self._tokenizing = threading.Lock()  # a fast tokenizer refuses to be told its padding by two threads at once

    @classmethod
    def load(
        cls,
        model: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = torch.float32,
        revision: str | None = None,
    ) -> "Embedder":
        """Loads a checkpoint.

        Args:
            model: folder or Hub id.
            device: default: a GPU if there is one.
            dtype: of weights and computation; embeddings are float32 in any case.
            revision: of a model on the Hub.

        Raises:
            MomeError: no such checkpoint, one of another kind, or one without its processor; one line.
        """
        name = str(Path(model).resolve()) if Path(model).is_dir() else str(model)
        try:
            kind = MomeConfig.get_config_dict(name, revision=revision)[0].get("model_type")
            if kind != MomeConfig.model_type:
                reason = f"is of type {kind!r}, not {MomeConfig.model_type!r}" if kind else "has no config.json"
                raise MomeError(f"model {name!r} can't be loaded: it {reason}")
            processor = MomeProcessor.from_pretrained(name, revision=revision)
            loaded = _load_quietly(name, dtype=dtype, revision=revision)
        except MomeError:
            raise
        except (OSError, ValueError) as error:
            raise MomeError(f"model {name!r} can't be loaded: {first_line(error)}") from None
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(loaded.to(device), processor, name)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Any], batch_size: int = BATCH_SIZE) -> torch.Tensor:
        """Images as `load_rgb_image` takes them → (images, dimension) float32 on the CPU, L2-normalised.

        Raises:
            ValueError: an image that can't be read.
        """
        images = [load_rgb_image(image, f"image {number}") for number, image in enumerate(images)]
        parts = [torch.zeros(0, self.dimension)]
        for start in range(0, len(images), batch_size):
            pixel_values = to_pixel_values(images[start : start + batch_size], self.processor.image_processor)
            parts.append(self.embed_pixel_values(pixel_values))
        return torch.cat(parts)

    @torch.inference_mode()
    def embed_pixel_values(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(images, channels, height, width) float32 → (images, dimension) float32 on the CPU, L2-normalised."""
        pixel_values = pixel_values.to(self.device, self.model.dtype)
        return _normalised(self.model.get_image_features(pixel_values=pixel_values).pooler_output)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 4 * BATCH_SIZE) -> torch.Tensor:
        """Texts → (texts, dimension) float32 on the CPU, L2-normalised; what is too long for the model is cut off.

        Raises:
            ValueError: a text that is none, or blank.
        """
        for number, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise MomeError(f"text {number} is {text!r}: pass a text of at least one word")
        parts = [torch.zeros(0, self.dimension)]
        for start in range(0, len(texts), batch_size):
            some = list(texts[start : start + batch_size])
            with self._tokenizing:
                inputs = self.processor(text=some, truncation=True, return_tensors="pt")
            inputs = inputs.to(self.device)
            parts.append(_normalised(self.model.get_text_features(**inputs).pooler_output))
        return torch.cat(parts)


def _load_quietly(name: str, **options: Any) -> MomeModel:
    """Without the bar and the report of weights that embeddings don't need: those of a captioner's head.

    Raises:
        MomeError: the checkpoint lacks weights.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, report = MomeModel.from_pretrained(name, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    if missing := sorted(report["missing_keys"]):
        raise MomeError(f"model {name!r} lacks {len(missing)} of its weights, {missing[0]!r} among them")
    return model


def _normalised(embeds: torch.Tensor) -> torch.Tensor:
    """float32, normalised again after any rounding to a smaller type."""
    return F.normalize(embeds.float(), dim=-1).cpu()


__all__ = ["BATCH_SIZE", "Embedder", "model_fingerprint"]
