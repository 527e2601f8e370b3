"""Pipelines of MoME's own: `pipeline("image-captioning", model=path, trust_remote_code=True)(image)`.

- `MomeImageCaptioningPipeline`: captions with their fit to the image, guided if wanted, one image or thousands;
- it is named in the config of every checkpoint, and registered by `import mome` for those who have the package.

    image ── processor ── generate(), guided ── ids ── text
                               └── cosine of image and caption, from the same image pass ── score
"""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from transformers import Pipeline
from transformers.utils import logging

from .guidance_mome import guidance_options
from .processing_mome import load_rgb_image

logger = logging.get_logger(__name__)

ON_ERROR = ("raise", "skip")


class MomeImageCaptioningPipeline(Pipeline):
    """Captions images.

    ```python
    caption = pipeline("image-captioning", model=path, trust_remote_code=True)
    caption("cat.jpg")                                     # [{"generated_text": "a cat", "score": 0.31}]
    caption(["cat.jpg", url, pil_image], batch_size=8)     # a list of such lists; of a data set, an iterator
    caption(image, num_captions=3, guidance="rerank", prompt="a photo of")
    ```

    The score is the cosine of the embeddings of image and caption, -1 to 1; the captions of an image come in the order
    of `generate()`: best first.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(self, images: Any = None, **kwargs) -> list:
        """Captions one image or many.

        Args:
            images: an image (path, http(s) URL, PIL image, array or tensor), a list of images, a data set or a
                generator. An item of a data set may be a dict with the image under `image`.
            kwargs: those below, and for all pipelines `batch_size` (default 1) and `num_workers`.
                num_captions: captions per image. Default: 1, or what the checkpoint's generation config says.
                guidance: `"rerank"`, `"classifier-free"`, `"contrastive"`, several of them in a list, `"none"`, or
                    fields of `MomeGenerationConfig` in a dict. Default: what the checkpoint has.
                prompt: beginning of every caption; part of the text that is returned.
                max_new_tokens: longest caption in tokens, without the prompt.
                generate_kwargs: more options of `generate()`: beams, sampling, lengths.
                on_error: `"raise"` stops at an image that can't be read; `"skip"` goes on, warns, and returns
                    `[{"generated_text": None, "score": None, "error": reason}]` in its place.

        Returns:
            For an image a list of `{"generated_text": str, "score": float}`; for a list, a list of those; for a data
            set or a generator an iterator.

        Raises:
            ValueError: an image that can't be read, with its name and the reason; an option that can't be.
        """
        images = kwargs.pop("inputs", images)
        if images is None:
            raise ValueError("images=None: pass an image, a list of images, a data set or a generator")
        if isinstance(images, (list, tuple)):
            if not images:
                return []
            images = [_named(image, f"images[{index}]") for index, image in enumerate(images)]
        return super().__call__(images, **kwargs)

    def _sanitize_parameters(
        self,
        num_captions: int | None = None,
        guidance: str | Iterable[str] | dict[str, Any] | None = None,
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        on_error: str | None = None,
        **unknown,
    ) -> tuple[dict, dict, dict]:
        if unknown:
            raise ValueError(
                f"unknown option {next(iter(unknown))!r} of image-captioning: options of generate() go into "
                "generate_kwargs={...}"
            )
        if on_error not in (None, *ON_ERROR):
            raise ValueError(f"on_error={on_error!r}: choose 'raise' or 'skip'")
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(f"prompt={prompt!r} is of type {type(prompt).__name__}: pass a string")
        if num_captions is not None and (not isinstance(num_captions, int) or num_captions < 1):
            raise ValueError(f"num_captions={num_captions!r} must be an integer of at least 1")
        forward = {
            "num_captions": num_captions,
            "guidance": None if guidance is None else guidance_options(guidance),
            "max_new_tokens": max_new_tokens,
            "generate_kwargs": generate_kwargs,
        }
        preprocess = {"prompt": prompt, "on_error": on_error}
        # What isn't given here must not replace what the pipeline was made with.
        return tuple(
            {key: value for key, value in each.items() if value is not None} for each in (preprocess, forward, {})
        )

    def preprocess(self, image: Any, prompt: str = "", on_error: str = "raise") -> dict[str, Any]:
        """An image → `pixel_values` (1, channels, height, width), `input_ids` (1, tokens); or why there are none."""
        item = _named(image, "image")
        failure = None
        try:
            image = load_rgb_image(item["image"], item["name"])
        except ValueError as error:
            if on_error == "raise":
                raise
            failure = str(error)
            logger.warning(f"skipped {failure}")
            side = self.model.config.image_size
            image = np.zeros((side, side, 3), dtype=np.uint8)  # in its place, so that a batch keeps its shape
        inputs = self.processor(images=[image], text=prompt, caption_prompt=True, return_tensors="pt")
        inputs = {key: inputs[key] for key in ("pixel_values", "input_ids", "attention_mask")}
        return {**inputs, "failure": failure}

    def _forward(self, inputs: dict[str, Any], num_captions: int | None = None, **options) -> dict[str, Any]:
        """A batch → per image its captions, (ids, cosine) each, and why there are none."""
        failures = inputs["failure"] if isinstance(inputs["failure"], list) else [inputs["failure"]]
        readable = [row for row, failure in enumerate(failures) if failure is None]
        captions: list[list] = [[] for _ in failures]
        if readable:
            tensors = {key: value[readable] for key, value in inputs.items() if key != "failure"}
            outputs = self.model.generate(**tensors, **self._generation_options(num_captions, **options))
            each = outputs.sequences.shape[0] // len(readable)
            batches = zip(readable, outputs.sequences.split(each), outputs.cosine.float().split(each))
            for row, sequences, cosines in batches:
                captions[row] = list(zip(sequences.tolist(), cosines.tolist()))
        return {"captions": captions, "failure": failures}

    def _generation_options(
        self,
        num_captions: int | None,
        guidance: dict[str, Any] | None = None,
        max_new_tokens: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        options = {
            **(guidance or {}),
            "max_new_tokens": max_new_tokens,
            **(generate_kwargs or {}),
            "output_cosine": True,
        }
        options = {key: value for key, value in options.items() if value is not None}
        if num_captions is None:
            return options
        # Enough beams or candidates for the captions that are asked for, unless sampling gives them.
        options["num_return_sequences"] = num_captions
        own = self.model.generation_config
        names = ("rerank_weight", "rerank_candidates", "do_sample", "num_beams")
        current = {name: options.get(name, getattr(own, name)) for name in names}
        if current["rerank_weight"]:
            options["rerank_candidates"] = max(current["rerank_candidates"] or 1, num_captions)
        elif not current["do_sample"]:
            options["num_beams"] = max(current["num_beams"] or 1, num_captions)
        return options

    def postprocess(self, outputs: dict[str, Any]) -> list[dict[str, Any]]:
        captions, failure = outputs["captions"], outputs["failure"]
        if isinstance(failure, list):  # a batch of one
            captions, failure = captions[0], failure[0]
        if failure is not None:
            return [{"generated_text": None, "score": None, "error": failure}]
        texts = self.processor.post_process_image_text_to_text([ids for ids, _ in captions])
        return [{"generated_text": text, "score": cosine} for text, (_, cosine) in zip(texts, captions)]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """As `Pipeline.save_pretrained`, and the processor, without which nothing would load."""
        super().save_pretrained(save_directory, **kwargs)
        kwargs.pop("max_shard_size", None)
        self.processor.save_pretrained(save_directory, **kwargs)


def _named(image: Any, name: str) -> dict[str, Any]:
    """An image and what an error calls it."""
    return {"name": name, **image} if isinstance(image, dict) and "image" in image else {"image": image, "name": name}


__all__ = ["MomeImageCaptioningPipeline"]
