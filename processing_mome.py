"""MoME processor: images and text to the tensors the models take.

- images of any kind become upright 8-bit RGB before the image processor sees them (`pictures_mome.py`);
- texts become `[BOS] words [EOS]`, padded on the right; caption prompts `[BOS] words`, padded on the left;
- texts that are too long are cut, with a warning;
- several threads may use one processor;
- what cannot be used is refused in one line that names the value.

    images ── load_rgb_image ── image_processor ── pixel_values
    text ──── tokenizer ──┬─────────────────────── input_ids, attention_mask
                          └─ caption prompt: left padding, no [EOS]
"""

import json
import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import ProcessingKwargs, TextKwargs, Unpack
from transformers.utils import logging

from .configuration_mome import quoted
from .pictures_mome import MomeImageProcessor, MomeImagesKwargs, given_images, load_images, load_rgb_image, rescaling
from .svg_mome import SVG_SIDE
from .texts_mome import TOKENIZING, UNLIMITED_LENGTH, check_characters, no_words, warn_of_cut_texts, wordless_texts

logger = logging.get_logger(__name__)


# How sentence-transformers calls the model. Left to guess, it averages the states of tokens, which `forward` has too.
SENTENCE_TRANSFORMERS_FILES: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {
            "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
            "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
        },
        "module_output_name": "sentence_embedding",
    },
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer",
        "similarity_fn_name": "cosine",
        "prompts": {},
        "default_prompt_name": None,
    },
}


class MomeTextKwargs(TextKwargs, total=False):
    caption_prompt: bool | None


class MomeProcessorKwargs(ProcessingKwargs, total=False):
    text_kwargs: MomeTextKwargs
    images_kwargs: MomeImagesKwargs
    _defaults = {"text_kwargs": {"padding": True}}


class MomeProcessor(ProcessorMixin):
    """An image processor and a tokenizer in one.

    Args:
        image_processor: a `MomeImageProcessor`, CLIP's, which becomes one, or another that gives `pixel_values`.
        tokenizer: one that writes `[BOS] words [EOS]`, or `words [EOS]`, and pads on the right.
    """

    valid_processor_kwargs = MomeProcessorKwargs

    def __init__(self, image_processor, tokenizer):
        if type(image_processor).__name__.startswith("CLIPImageProcessor"):
            image_processor = MomeImageProcessor.like(image_processor)
        super().__init__(image_processor, tokenizer)

    def __call__(
        self, images: Any = None, text: str | Iterable[str] | None = None, **kwargs: Unpack[MomeProcessorKwargs]
    ) -> BatchFeature:
        """Turns images and texts into model inputs; their numbers may differ unless `caption_prompt` pairs them.

        Args:
            images: one image or several, as `load_images` takes them.
            text: one text, or several in a list, an array, a column or a generator; what is longer than
                `tokenizer.model_max_length` is cut with a warning.
            kwargs: those of the image processor and the tokenizer (`return_tensors`, `truncation`, ...), and
                `caption_prompt`: True makes each text, or none, the beginning of a caption: `[BOS] words`, padded on
                the left; one text serves all images. By default only for images with nothing but empty texts, as the
                image-text-to-text pipeline passes them.

        Returns:
            `pixel_values` (images, 3, height, width) float32; `input_ids`, `attention_mask` (texts, tokens) int64.

        Raises:
            ValueError: nothing to process, an image that cannot be read or rescaled as it is asked for, a text that is
                no string, one without a word that the tokenizer knows, though not an empty one, or, with
                `truncation=False`, one of more than `tokenizer.model_max_length` tokens.
        """
        if images is None and text is None:
            raise ValueError("neither images nor text given: pass images=..., text=... or both")
        if images is not None:
            nested, images = kwargs.get("images_kwargs") or {}, given_images(images)
            changed = rescaling(self.image_processor, images, {**kwargs, **nested})
            kwargs = {key: value for key, value in kwargs.items() if key not in changed}
            kwargs["images_kwargs"] = {**nested, **changed}
            images = load_images(images, getattr(self.image_processor, "svg_side", SVG_SIDE))
        texts = None if text is None else _check_texts(text)
        text_kwargs = dict(kwargs.pop("text_kwargs", {}))
        caption_prompt = kwargs.pop("caption_prompt", text_kwargs.pop("caption_prompt", None))
        if caption_prompt is None:
            caption_prompt = images is not None and texts is not None and not any(texts)
        if caption_prompt:
            texts = _one_prompt_per_image(texts or [""], images)
            kwargs["padding_side"] = "left"
        inputs = BatchFeature() if images is None else super().__call__(images=images, **kwargs)
        if texts is not None:
            inputs.update(self._tokenize(texts, caption_prompt, text_kwargs, kwargs))
        return inputs

    def _tokenize(
        self, texts: list[str], caption_prompt: bool, text_kwargs: dict[str, Any], kwargs: dict[str, Any]
    ) -> BatchFeature:
        """Texts as they are padded, cut and ended; see `__call__`."""
        options = {**kwargs, **text_kwargs}
        text_kwargs.setdefault("verbose", False)  # of what is too long we speak ourselves
        truncation, own_limit = options.get("truncation"), options.get("max_length") is not None
        with TOKENIZING:
            inputs = super().__call__(text=texts, text_kwargs=text_kwargs, **kwargs)
            if not own_limit and (cut := self._longer_texts(inputs["input_ids"], texts, truncation)):
                limit = self.tokenizer.model_max_length
                if truncation is None:
                    warn_of_cut_texts(len(cut), limit, "prompt" if caption_prompt else "text")
                    text_kwargs = {**text_kwargs, "truncation": True}
                    inputs = super().__call__(text=texts, text_kwargs=text_kwargs, **kwargs)
                elif truncation in (False, "do_not_truncate"):
                    text = texts[cut[0]]
                    raise ValueError(
                        f"text {cut[0]} ({quoted(text, 40)}) has more than tokenizer.model_max_length = {limit} "
                        "tokens: shorten it, or leave out truncation=False"
                    )
                else:
                    logger.warning_once(f"texts of more than {limit} tokens, the most that the model reads, are cut")
        self._check_words(inputs["input_ids"], texts, caption_prompt)
        if caption_prompt:
            self._drop_end_of_text(inputs)
            self._put_start_of_text(inputs)
        return inputs

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs
    ) -> list[str]:
        """Generated ids, (batch, tokens) or (tokens,), as stripped texts; `kwargs` go to the tokenizer's `decode`."""
        with TOKENIZING:
            texts = self.tokenizer.decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return [text.strip() for text in ([texts] if isinstance(texts, str) else texts)]

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        """Writes `processor_config.json`, the tokenizer's files, this module, and what sentence-transformers reads.

        A folder that has sentence-transformers' files already keeps them: they may name further modules.

        Args:
            save_directory: where to; made if it is not there.
            push_to_hub: afterwards push all of it to `repo_id` (default: the folder's name).
            kwargs: those of `push_to_hub` (`repo_id`, `commit_message`, `private`, `token`, ...).

        Returns:
            The paths of the processor's and the tokenizer's files.
        """
        # Otherwise traces of how the tokenizer was loaded and last called would be saved as its defaults.
        for key in ("is_local", "local_files_only"):
            self.tokenizer.init_kwargs.pop(key, None)
        if self.tokenizer.is_fast:
            self.tokenizer.backend_tokenizer.no_padding()
            self.tokenizer.backend_tokenizer.no_truncation()
        repo_id = kwargs.pop("repo_id", Path(save_directory).name)
        files = super().save_pretrained(save_directory, **({} if push_to_hub else kwargs))
        vars(self).pop("auto_map", None)  # written to the file; left here, the saved processor would differ from it
        if not (Path(save_directory) / "modules.json").exists():
            for name, content in SENTENCE_TRANSFORMERS_FILES.items():
                (Path(save_directory) / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if push_to_hub:  # not in the call above, which would push before our files are there
            self.push_to_hub(repo_id, **kwargs)
        return files

    def _drop_end_of_text(self, inputs):
        """Cuts the last column: left padding has put every row's `[EOS]` there, if the tokenizer writes one."""
        if all(int(row[-1]) == self.tokenizer.eos_token_id for row in inputs["input_ids"]):
            for key in self.tokenizer.model_input_names:
                if key in inputs:
                    rows = inputs[key]
                    inputs[key] = [row[:-1] for row in rows] if isinstance(rows, list) else rows[:, :-1]

    def _put_start_of_text(self, inputs):
        """`[BOS]` before every prompt, if the tokenizer has one that it doesn't write (SigLIP's)."""
        bos, pad = self.tokenizer.bos_token_id, self.tokenizer.pad_token_id
        with TOKENIZING:
            is_written = self.tokenizer("").input_ids[:1] == [bos]
        if bos is None or is_written:
            return
        given = inputs["input_ids"]
        rows = [[int(token) for token in row] for row in given]
        masks = inputs.get("attention_mask") if hasattr(inputs, "get") else None
        masks = [[token != pad for token in row] for row in rows] if masks is None else masks
        counts = [int(sum(mask)) for mask in masks]  # of words, which are on the right
        starts = [len(row) - count for row, count in zip(rows, counts)]
        made = {
            "input_ids": [[pad] * start + [bos] + row[start:] for row, start in zip(rows, starts)],
            "attention_mask": [[0] * start + [1] * (count + 1) for start, count in zip(starts, counts)],
        }
        for key in made:
            if key in inputs:
                as_given = {torch.Tensor: torch.tensor, np.ndarray: np.array}.get(type(given), list)
                inputs[key] = as_given(made[key])

    def _longer_texts(self, input_ids, texts: list[str], truncation: Any) -> list[int]:
        """The numbers of the texts that have more tokens than the model takes, whether they are cut by now or not."""
        limit, pad = self.tokenizer.model_max_length, self.tokenizer.pad_token_id
        if limit >= UNLIMITED_LENGTH or len(input_ids) != len(texts):
            return []
        counts = [sum(int(token) != pad for token in row) if len(row) >= limit else 0 for row in input_ids]
        if pad == self.tokenizer.eos_token_id:  # one of them ends the text
            counts = [count + (0 < count < len(row)) for count, row in zip(counts, input_ids)]
        full = [number for number, count in enumerate(counts) if count >= limit]
        if not full or truncation in (None, False, "do_not_truncate"):
            return [number for number in full if counts[number] > limit]
        whole = self.tokenizer([texts[number] for number in full], verbose=False)["input_ids"]
        return [number for number, ids in zip(full, whole) if len(ids) > limit]

    def _check_words(self, input_ids, texts: list[str], caption_prompt: bool):
        """Refuses a text of which nothing is left; an empty one says so itself, and a prompt may be one."""
        for number in wordless_texts(self.tokenizer, input_ids):
            if number < len(texts) and texts[number].strip():
                message = no_words(texts[number], f"{'prompt' if caption_prompt else 'text'} {number}")
                if not caption_prompt:
                    raise ValueError(message)
                logger.warning(message)


def _check_texts(text) -> list[str]:
    if isinstance(text, str):
        texts = [text]
    else:  # an unordered set would lose which text is which
        several = isinstance(text, Iterable) and not isinstance(text, (bytes, bytearray, Mapping, Set))
        texts = list(np.atleast_1d(text).tolist() if isinstance(text, np.ndarray) else text) if several else []
    if not texts:
        raise ValueError(f"text is {quoted(text, 40)} of type {type(text).__name__}: pass a string or some in a list")
    for index, element in enumerate(texts):
        if not isinstance(element, str):
            raise ValueError(f"text[{index}] is of type {type(element).__name__}: pass a string")
    check_characters(texts)
    return texts


def _one_prompt_per_image(prompts, images) -> list[str]:
    if images is None or len(prompts) == len(images):
        return prompts
    if len(prompts) > 1:
        raise ValueError(f"{len(prompts)} caption prompts for {len(images)} images: pass one for each, or one for all")
    return prompts * len(images)


# `save_pretrained` then copies this module and writes its `auto_map`, whether it was imported or loaded from the Hub.
MomeProcessor.register_for_auto_class()

__all__ = ["MomeProcessor", "MomeProcessorKwargs", "load_rgb_image"]
