"""MoME processor: images and text to the tensors the models take.

- images of any kind (path, URL, PIL, numpy, torch) become upright 8-bit RGB before the image processor sees them;
- texts become `[BOS] words [EOS]`, padded on the right; caption prompts `[BOS] words`, padded on the left;
- what cannot be used is refused in one line that names the value.

    images ── load_rgb_image ── image_processor ── pixel_values
    text ──── tokenizer ──┬─────────────────────── input_ids, attention_mask
                          └─ caption prompt: left padding, no [EOS]
"""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import get_session
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import BatchEncoding, BatchFeature, ProcessorMixin
from transformers.processing_utils import ProcessingKwargs, TextKwargs, Unpack
from transformers.utils import logging

logger = logging.get_logger(__name__)

URL_TIMEOUT_SECONDS = 30
UNLIMITED_LENGTH = 1_000_000  # a tokenizer without a length limit carries a huge model_max_length

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
    _defaults = {"text_kwargs": {"padding": True}}


def _to_uint8(values: np.ndarray) -> np.ndarray:
    """Pixel values of any range as 0…255: floats and integers wider than 8 bits are scaled, never clipped."""
    if values.dtype == np.uint8:
        return values
    values, kind, bits = values.astype(np.float64), values.dtype.kind, 8 * values.dtype.itemsize
    ceilings = {"b": [1], "f": [1, 2**8 - 1, 2**16 - 1]}.get(kind, [2**8 - 1, 2**16 - 1, 2**31 - 1])
    if kind == "u" and bits == 16:
        ceilings = [2**16 - 1]  # the type tells the range, even if the picture is dark
    ceiling = next((ceiling for ceiling in ceilings if values.max() <= ceiling), None)
    if ceiling is None or not values.min() >= 0:  # `not >=` also catches NaN
        raise ValueError(
            f"pixel values from {values.min():g} to {values.max():g}: pass integers 0 to 255 or floats 0 to 1"
        )
    return (values * (255 / ceiling)).round().astype(np.uint8)


def _image_from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    axes = (2, 0)  # where both ends could be the channels, numpy has them last and torch first
    if isinstance(array, torch.Tensor):
        axes = (0, 2)
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    readings = [(axis, counts) for counts in ((3, 4), (1,)) for axis in axes]
    axis = next((axis for axis, counts in readings if array.ndim == 3 and array.shape[axis] in counts), None)
    if array.size == 0 or (axis is None and array.ndim != 2):
        raise ValueError(
            f"shape {array.shape} is no picture: pass (height, width) or 1, 3 or 4 channels, first or last"
        )
    if axis is not None:
        array = np.moveaxis(array, axis, 2)
        array = array[:, :, 0] if array.shape[2] == 1 else array
    return Image.fromarray(np.ascontiguousarray(_to_uint8(array)))


def _open_image(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _image_from_array(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        response = get_session().get(source, follow_redirects=True, timeout=URL_TIMEOUT_SECONDS)
        return Image.open(io.BytesIO(response.raise_for_status().content))
    if isinstance(source, (str, os.PathLike)):
        return Image.open(source)
    raise ValueError("pass a path, a URL, a PIL image, a numpy array or a torch tensor")


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()  # before the EXIF look-up, so that a truncated file is reported and not taken for broken EXIF
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF raises nearly anything; the pixels are still good
        pass
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_uint8(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_rgb_image(image: Any, name: str = "image") -> Image.Image:
    """Reads one image and makes it upright 8-bit RGB.

    EXIF orientation is applied, transparency laid over white, 16-bit and float pixels scaled to 8 bits; of an animated
    file the first frame is taken.

    Args:
        image: path, http(s) URL, PIL image of any mode, or an array or tensor of shape (height, width),
            (height, width, channels) or (channels, height, width) with 1, 3 or 4 channels; integers or floats 0…1.
        name: what error messages call the image.

    Raises:
        ValueError: the image cannot be used; one line with `name`, the file and the reason.
    """
    try:
        return _to_rgb(_open_image(image))
    except FileNotFoundError:
        reason = "no such file"
    except UnidentifiedImageError:
        reason = "not an image that Pillow can read"
    except Exception as error:  # Pillow's decoders raise nearly anything: OSError, SyntaxError, struct.error, ...
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    source = image if isinstance(image, (str, os.PathLike)) else getattr(image, "filename", None)
    raise ValueError(f"{name} ({os.fspath(source)!r}): {reason}" if source else f"{name} ({type(image)}): {reason}")


def longest_text(tokenizer: Any, config: Any) -> int:
    """The most tokens of a text, `[BOS]` and `[EOS]` counted, that both the tokenizer and the model take."""
    return min(tokenizer.model_max_length, config.max_position_embeddings)


def tokenize_texts(tokenizer: Any, texts: list[str], limit: int) -> tuple[BatchEncoding, list[int]]:
    """Texts as model inputs, those of more than `limit` tokens cut to `limit`, `[EOS]` kept; and which were cut.

    Returns:
        `input_ids`, `attention_mask` (texts, tokens) int64, padded; the numbers of the texts that were cut.
    """
    options = {"padding": True, "truncation": True, "return_tensors": "pt"}
    inputs = tokenizer(texts, max_length=limit + 1, **options)  # one token more shows what is too long
    if inputs["input_ids"].shape[1] <= limit:
        return inputs, []
    cut = (inputs["attention_mask"].sum(dim=1) > limit).nonzero().flatten().tolist()
    return tokenizer(texts, max_length=limit, **options), cut


def warn_of_cut_texts(count: int, limit: int, what: str = "text"):
    """One warning for all texts that `tokenize_texts` has cut in a call."""
    if count:
        texts = f"1 {what} has" if count == 1 else f"{count} {what}s have"
        logger.warning(f"{texts} more than {limit} tokens, the most that the model reads: the rest is cut off")


class MomeProcessor(ProcessorMixin):
    """An image processor and a tokenizer in one.

    Args:
        image_processor: CLIP's, or another that gives `pixel_values`.
        tokenizer: one that writes `[BOS] words [EOS]`, or `words [EOS]`, and pads on the right.
    """

    valid_processor_kwargs = MomeProcessorKwargs

    def __init__(self, image_processor, tokenizer):
        super().__init__(image_processor, tokenizer)

    def __call__(
        self, images: Any = None, text: str | list[str] | None = None, **kwargs: Unpack[MomeProcessorKwargs]
    ) -> BatchFeature:
        """Turns images and texts into model inputs; their numbers may differ unless `caption_prompt` pairs them.

        Args:
            images: one image or a list of images as `load_rgb_image` takes them, or a batch as a 4-d array.
            text: one text or a list of texts.
            kwargs: those of the image processor and the tokenizer (`return_tensors`, `truncation`, ...), and
                `caption_prompt`: True makes each text, or none, the beginning of a caption: `[BOS] words`, padded on
                the left; one text serves all images. By default only for images with nothing but empty texts, as the
                image-text-to-text pipeline passes them.

        Returns:
            `pixel_values` (images, 3, height, width) float32; `input_ids`, `attention_mask` (texts, tokens) int64.

        Raises:
            ValueError: nothing to process, an image that cannot be read, a text that is no string, or one of more
                than `tokenizer.model_max_length` tokens without `truncation=True`.
        """
        if images is None and text is None:
            raise ValueError("neither images nor text given: pass images=..., text=... or both")
        images = None if images is None else _load_images(images)
        texts = None if text is None else _check_texts(text)
        text_kwargs = dict(kwargs.pop("text_kwargs", {}))
        caption_prompt = kwargs.pop("caption_prompt", text_kwargs.pop("caption_prompt", None))
        if caption_prompt is None:
            caption_prompt = images is not None and texts is not None and not any(texts)
        if caption_prompt:
            texts = _one_prompt_per_image(texts or [""], images)
            kwargs["padding_side"] = "left"
        inputs = super().__call__(images=images, text=texts, text_kwargs=text_kwargs, **kwargs)
        if caption_prompt:
            self._drop_end_of_text(inputs)
            self._put_start_of_text(inputs)
        if texts is not None:
            self._check_lengths(inputs["input_ids"], texts)
        return inputs

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs
    ) -> list[str]:
        """Generated ids, (batch, tokens) or (tokens,), as stripped texts; `kwargs` go to the tokenizer's `decode`."""
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
        if bos is None or self.tokenizer("").input_ids[:1] == [bos]:
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

    def _check_lengths(self, input_ids, texts):
        limit = self.tokenizer.model_max_length
        if limit >= UNLIMITED_LENGTH or max(len(row) for row in input_ids) <= limit:
            return
        for index, (row, text) in enumerate(zip(input_ids, texts, strict=False)):
            count = sum(int(token) != self.tokenizer.pad_token_id for token in row)
            if count > limit:
                raise ValueError(
                    f"text {index} ({text[:40]!r}...) has {count} tokens, tokenizer.model_max_length is {limit}: "
                    "pass truncation=True or shorten it"
                )


def _load_images(images) -> list[Image.Image]:
    if not isinstance(images, (list, tuple)) and getattr(images, "ndim", None) != 4:
        return [load_rgb_image(images)]
    if len(images) == 0:
        raise ValueError("images is empty: pass at least one image")
    return [load_rgb_image(image, name=f"images[{index}]") for index, image in enumerate(images)]


def _check_texts(text) -> list[str]:
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or len(texts) == 0:
        raise ValueError(f"text is {str(text)[:40]!r} of type {type(text).__name__}: pass a string or some in a list")
    for index, element in enumerate(texts):
        if not isinstance(element, str):
            raise ValueError(f"text[{index}] is of type {type(element).__name__}: pass a string")
    return list(texts)


def _one_prompt_per_image(prompts, images) -> list[str]:
    if images is None or len(prompts) == len(images):
        return prompts
    if len(prompts) > 1:
        raise ValueError(f"{len(prompts)} caption prompts for {len(images)} images: pass one for each, or one for all")
    return prompts * len(images)


# `save_pretrained` then copies this module and writes its `auto_map`, whether it was imported or loaded from the Hub.
MomeProcessor.register_for_auto_class()

__all__ = [
    "MomeProcessor",
    "MomeProcessorKwargs",
    "load_rgb_image",
    "longest_text",
    "tokenize_texts",
    "warn_of_cut_texts",
]
