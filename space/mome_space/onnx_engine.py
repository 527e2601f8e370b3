"""An export (`python -m mome.export`) in place of a checkpoint: it embeds and writes greedy captions, by ONNX Runtime.

Unlike the rest of the Space it needs the package `mome`, with its extra `onnx`.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from .engine import CAPTION_TOKENS, Engine
from .limits import quoted, refuse


class OnnxEngine(Engine):
    """An exported model on the CPU; nothing of its experts can be seen.

    Args:
        model: `mome.onnx_embedder.OnnxEmbedder`.
        processor: its `MomeProcessor`.
        captions: whether its caption decoder is loaded.
    """

    guides = routes = captions_without_picture = False

    @classmethod
    def load(cls, folder: str) -> "OnnxEngine":
        """An export's folder, in the first type that is there."""
        from mome.onnx_embedder import OnnxEmbedder

        captions = any(Path(folder).glob("onnx/decoder_model_merged*.onnx"))
        embedder = OnnxEmbedder.load(folder, captions=captions)
        return cls(embedder, embedder.processor, captions)

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        """See `Engine.embed_texts`."""
        return self.model.embed_tokens(self.prepare(text=texts, truncation=True)).numpy()

    def embed_images(self, pictures: list[Image.Image]) -> np.ndarray:
        """See `Engine.embed_images`."""
        return self.model.embed_pixel_values(self.prepare(images=pictures)["pixel_values"]).numpy()

    def caption(
        self, pictures: list[Image.Image], prompt: str = "", candidates: int = 1, **guidance: float
    ) -> list[list[tuple[str, float]]]:
        """One greedy caption of each picture and its cosine; `candidates` and `guidance` change nothing."""
        inputs = self.prepare(images=pictures, text=prompt, caption_prompt=True)
        if inputs["input_ids"].shape[1] >= self.config.max_position_embeddings:
            raise refuse(f"The beginning {quoted(prompt)} leaves no room for a caption: shorten it.")
        ids = self.model.caption_ids(inputs["pixel_values"], CAPTION_TOKENS, inputs)
        with self._tokenizing:
            texts = self.processor.post_process_image_text_to_text(ids)
        images = self.model.embed_pixel_values(inputs["pixel_values"]).numpy()
        cosines = (images * self.embed_texts(texts)).sum(axis=1)
        return [[(text, float(cosine))] for text, cosine in zip(texts, cosines)]

    def embed_pairs(self, pictures: list[Image.Image], names: list[str]) -> tuple[np.ndarray, None, None]:
        """See `Engine.embed_pairs`: embeddings, and nothing of experts."""
        return self.embed_images(pictures), None, None

    def _weights(self) -> Iterator[bytes]:
        yield f"{self.model.fingerprint} {self.model.precision}".encode()
