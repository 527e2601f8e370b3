"""What is refused before any heavy work, each in one line that names the value; pictures in any collection; and where
tokens stand.
"""

import os
from collections.abc import Iterator
from numbers import Integral
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import Dataset

from .compatibility_mome import is_exporting
from .configuration_mome import MomeConfig, listed

# Of a captioner's `forward`: what its loss needs and nothing else takes.
LOSS_OPTIONS = ("num_items_in_batch", "shift_labels", "return_loss")


def is_count(value: Any) -> bool:
    """Whether this is an integer of at least 1, NumPy's too."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


def check_pixel_values(config: MomeConfig, pixel_values: torch.Tensor):
    _check_tensor("pixel_values", pixel_values)
    expected = (config.num_channels, config.image_size, config.image_size)
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values is of {pixel_values.dtype}, not floats: prepare images with the checkpoint's processor"
        )
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}, expected (images, channels, height, width) = "
            f"(images, {', '.join(map(str, expected))}): prepare images with the checkpoint's processor"
        )


def check_ids(input_ids: torch.Tensor):
    """Refuses what are no rows of ids: pictures that were passed in their place, lists."""
    _check_tensor("input_ids", input_ids)
    if input_ids.ndim != 2 or 0 in input_ids.shape or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)} and is of {input_ids.dtype}, expected (texts, tokens) of "
            "int64, both at least 1; images are pixel_values=..."
        )


def _check_tensor(name: str, value: Any):
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f"{name} is of type {type(value).__name__}: pass a tensor, as the processor gives with return_tensors='pt'"
        )


def check_masked_patches(config: MomeConfig, bool_masked_pos: torch.Tensor, pixel_values: torch.Tensor):
    if not config.image_mask_token:
        raise ValueError("bool_masked_pos needs a mask token, got a config with image_mask_token=False")
    expected = (pixel_values.shape[0], config.grid_size**2)
    if tuple(bool_masked_pos.shape) != expected:
        raise ValueError(
            f"bool_masked_pos has shape {tuple(bool_masked_pos.shape)}, expected (images, patches) = {expected}"
        )


def check_kept_patches(config: MomeConfig, kept_patches: torch.Tensor, pixel_values: torch.Tensor):
    images, patches = pixel_values.shape[0], config.grid_size**2
    shape = tuple(kept_patches.shape)
    if len(shape) != 2 or shape[0] != images or not 1 <= shape[1] <= patches:
        raise ValueError(f"kept_patches has shape {shape}, expected (images, kept) = ({images}, 1…{patches})")


def check_joint_experts(config: MomeConfig, joint_experts: bool):
    if joint_experts and not config.joint_projection:
        raise ValueError("joint_experts=True needs their projections, got a config with joint_projection=False")


def check_input_ids(config: MomeConfig, input_ids: torch.Tensor, vocabulary: int | None):
    """A text of its own: not empty, not longer than the position table, and within the vocabulary."""
    check_ids(input_ids)
    if not config.fixed_text_length:  # else `text_tokens` counts, which leaves out padding
        _check_length(input_ids.shape[1], config.max_position_embeddings)
    check_vocabulary(input_ids, vocabulary)


def _check_length(tokens: int, longest: int):
    if tokens > longest:
        raise ValueError(
            f"input_ids has {tokens} tokens, max_position_embeddings is {longest}: shorten the text, or let the "
            "checkpoint's processor cut it"
        )


def check_no_other_inputs(options: dict):
    """Inputs that other models take and the text pass would leave out without a word."""
    for name in ("position_ids", "inputs_embeds", "head_mask", "token_type_ids"):
        given = options.get(name)
        if given is None or name == "token_type_ids" and not bool(given.any()):  # zeros: one kind of text, as here
            continue
        raise ValueError(f"{name} changes nothing in the text pass: leave it out, a row of input_ids is one text")


def check_vocabulary(input_ids: torch.Tensor, vocabulary: int | None):
    """`vocabulary`: rows of the word embedding; `None`: don't look."""
    if vocabulary is None or torch.compiler.is_compiling() or input_ids.device.type == "meta":
        return
    check_ids(input_ids)
    lowest, highest = (int(bound) for bound in input_ids.aminmax())
    if lowest < 0 or highest >= vocabulary:
        bad = lowest if lowest < 0 else highest
        raise ValueError(f"input_ids holds {bad}, vocab_size is {vocabulary}: use the checkpoint's own tokenizer")


def check_text_mask(attention_mask: torch.Tensor, input_ids: torch.Tensor):
    """Refuses a mask of another shape than the texts have: one of a single row would hide the words of the others."""
    _check_tensor("attention_mask", attention_mask)
    if not is_exporting() and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}: they must "
            "be equal"
        )


def check_rows_of_mask(attention_mask: torch.Tensor | None, tokens: torch.Tensor):
    """Refuses a 2D mask of another number of texts; it may be longer than they are, by what a cache holds."""
    if attention_mask is None or attention_mask.ndim != 2 or is_exporting():
        return
    if attention_mask.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, the tokens {tuple(tokens.shape[:2])}: a row for "
            "each text is needed"
        )


def check_positions(config: MomeConfig, positions: torch.Tensor, tokens: int):
    """Refuse a text beyond the position table; look at values only where the number of tokens allows for one.

    Args:
        positions: (batch, tokens) int64, those of this call.
        tokens: of the text so far, padding included: no position can be higher.
    """
    longest = config.max_position_embeddings
    if torch.compiler.is_compiling() or positions.device.type == "meta" or tokens <= longest:
        return
    if (highest := int(positions.max())) >= longest:
        raise ValueError(
            f"the text has {highest + 1} tokens, max_position_embeddings is {longest}: shorten the text or ask "
            "for fewer new tokens"
        )


def check_text_positions(positions: torch.Tensor, mask: torch.Tensor | None, counted: int = 0):
    """Refuse rows that hold several texts, which would see each other, and positions that leave out the image.

    Args:
        positions: (batch, tokens) int64, the caller's, less what is counted before a text.
        mask: (batch, tokens), 0 where padding; `None`: no padding.
        counted: tokens of the image that the caller's positions count.
    """
    if torch.compiler.is_compiling() or positions.device.type == "meta":
        return
    if positions.shape[1] == 1 and positions.device.type != "cpu":  # a step of decoding must not wait for a device
        return
    is_text = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask.bool()
    if bool((is_text & (positions < 0)).any()):
        found = int(positions[is_text].min()) + counted
        if not counted:
            raise ValueError(f"position_ids holds {found}: the text starts at 0")
        raise ValueError(
            f"position_ids holds {found}, but the {counted} tokens of the image come before the text: count them, the "
            f"text starts at {counted}"
        )
    if bool((is_text[:, 1:] & is_text[:, :-1] & (positions.diff(dim=1) <= 0)).any()):
        raise ValueError(
            "position_ids start again within a row: texts packed in a row would see each other, pass a row for "
            "each or a 4D attention_mask"
        )


def check_pairs(pixel_values: torch.Tensor | None, input_ids: torch.Tensor | None):
    images, texts = (0 if given is None else given.shape[0] for given in (pixel_values, input_ids))
    if images != texts or not images:
        raise ValueError(f"{images} images and {texts} texts: pass one text for each image")


def check_modalities(
    pixel_values: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    return_loss: bool | None,
    options: dict[str, Any],
):
    """Refuses nothing to embed, and a loss of what is no pairs or of labels, which would be left out."""
    if pixel_values is None and input_ids is None:
        raise ValueError("MomeModel got neither pixel_values nor input_ids: pass at least one")
    if return_loss:
        check_pairs(pixel_values, input_ids)
    elif options.get("labels") is not None:
        raise ValueError(
            "labels are captions to learn, and this model learns embeddings: pass return_loss=True, or load a "
            "captioner with AutoModelForImageTextToText"
        )


def check_labels(
    labels: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    pixel_values: torch.Tensor | None,
    loss_options: dict[str, Any],
):
    """Refuses labels that don't fit, and their number without them, as transformers' `Trainer` passes it."""
    if labels is None:
        if loss_options.get("return_loss"):
            raise ValueError("return_loss=True without labels: pass labels=input_ids, -100 where padding")
        if loss_options.get("num_items_in_batch") is not None:
            raise ValueError(
                "num_items_in_batch without labels: Trainer's label_smoothing_factor has taken them and would compare "
                "each token with itself: set it to 0; for a compute_loss_func set model.accepts_loss_kwargs = False"
            )
        return
    if pixel_values is None:
        raise ValueError(f"labels of shape {tuple(labels.shape)} without images: pass pixel_values as well")
    if input_ids is None:
        raise ValueError("labels without input_ids: the joint loss compares captions, pass input_ids")
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}: they must be equal"
        )
    check_pairs(pixel_values, input_ids)


def check_position_ids(position_ids: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """`position_ids` (batch or 1, tokens) for a prompt (batch, tokens, …), as they are."""
    batch, tokens = prompt.shape[:2]
    if position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != tokens:
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}, expected one for each token of the prompt: "
            f"{(batch, tokens)}"
        )
    return position_ids


def check_number_of_labels(num_items: int | torch.Tensor | None):
    if num_items is None or torch.compiler.is_compiling():
        return
    if not (torch.as_tensor(num_items).device.type == "meta" or bool((torch.as_tensor(num_items) > 0).all())):
        raise ValueError(
            "num_items_in_batch=0: all labels are -100, so no caption is learnt; to learn embeddings alone train a "
            "MomeModel with return_loss=True"
        )


def image_places(config: MomeConfig, kept_patches: torch.Tensor) -> torch.Tensor:
    """Places of patches in the grid (images, kept) → of tokens in the image, `[CLS]` first if there is one."""
    return F.pad(kept_patches + 1, (1, 0)) if config.image_cls_token else kept_patches


def text_mask(config: MomeConfig, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Where a text has words: the caller's mask, or else all but the padding at its ends.

        [PAD] [BOS] a cat [EOS] [PAD]  →  0 1 1 1 1 0

    `pad_token_id` inside a text is a token like others. A tokenizer that pads with its `[EOS]` or `[BOS]` has one of
    them at the end of each text that is none. A row of nothing but padding counts as a text.

    Args:
        input_ids: (texts, tokens) int64.
        attention_mask: (texts, tokens), or `None`.

    Returns:
        (texts, tokens) int64, 0 where padding; `None` without any, unless the call is traced.
    """
    if attention_mask is not None:
        check_text_mask(attention_mask, input_ids)
        return attention_mask
    is_pad = input_ids == config.pad_token_id
    traced = torch.compiler.is_compiling() or input_ids.device.type == "meta"
    if not traced and not is_pad.any():
        return None
    is_word = (~is_pad).long()  # of which there are none so far, as ONNX has no running product
    before, behind = ((each.cumsum(dim=1) == 0).long() for each in (is_word, is_word.flip(1)))
    behind = behind.flip(1)
    if config.pad_token_id == config.bos_token_id:
        before = before * F.pad(before[:, 1:], (0, 1))
    ends = config.eos_token_id
    if config.pad_token_id in (ends if isinstance(ends, (list, tuple)) else [ends]):
        behind = behind * F.pad(behind[:, :-1], (1, 0))
    return 1 - torch.maximum(before, behind) * (1 - is_pad.long().amin(dim=1, keepdim=True))


def text_tokens(
    config: MomeConfig, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A text as the text pass sees it, with the mask of `text_mask`; SigLIP's is the same whatever it comes with.

        text_start_token=False      [BOS] a cat [EOS]  →  a cat [EOS]
        fixed_text_length=True      a cat [EOS]        →  a cat [EOS] [PAD] … [PAD], `max_position_embeddings` tokens

    Args:
        input_ids: (texts, tokens).
        attention_mask: (texts, tokens), or `None`.

    Returns:
        Ids (texts, tokens) and their mask, `None` for all.
    """
    attention_mask = text_mask(config, input_ids, attention_mask)
    if not config.text_start_token:
        is_text = input_ids != config.bos_token_id
        attention_mask = is_text.long() if attention_mask is None else attention_mask * is_text
    if not config.fixed_text_length:
        return input_ids, attention_mask
    is_text = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
    length = config.max_position_embeddings
    # An exported graph has no place for an error: it reads the beginning of a text that is too long.
    if not is_exporting() and input_ids.shape[1] > length:
        _check_length(int(is_text.sum(dim=1).max()), length)
    return filled_texts(input_ids, is_text, length, config.pad_token_id), None


def filled_texts(input_ids: torch.Tensor, is_text: torch.Tensor, length: int, filler: int) -> torch.Tensor:
    """Texts (texts, tokens) as (texts, length): their words from the left in their order, then `filler`.

    Args:
        input_ids: (texts, tokens).
        is_text: (texts, tokens) int64, 1 where a word is.
        length: of the result; words beyond it are left out.
        filler: id of what stands behind the words.
    """
    # All else goes to a place behind the last, which is left out.
    place = torch.where(is_text == 1, is_text.cumsum(dim=1) - 1, length).clamp(max=length)
    return input_ids.new_full((input_ids.shape[0], length + 1), filler).scatter(1, place, input_ids)[:, :length]


def text_positions(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(texts, tokens) → position of each token in its text, padding on either side not counted."""
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape[0], -1)
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


class Pictures(Dataset):
    """Pictures of a data set, one by one; one that can't be decoded is the error, so that the others can be read.

    Args:
        values: anything that has a length and is indexed by numbers.
    """

    def __init__(self, values: Any):
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        try:
            return self.values[place]
        except IndexError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything
            return error


def pictures_of(images: Any) -> list | Pictures | Iterator | None:
    """Several pictures in whatever form they come, or `None` if `images` is a single one.

    Args:
        images: a list or tuple; an array or tensor of four dimensions, or an array of paths; a data set of `datasets`,
            with the first column of type Image or else the one called `image`; a column of one; a data set of torch or
            of transformers' pipelines; a stream, generator or other iterable. Nothing is decoded before its turn.

    Raises:
        ValueError: a dict of splits, or a data set without images.
    """
    if isinstance(images, np.ndarray) and images.ndim == 1 and images.dtype.kind in "OSU":
        return images.tolist()
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return list(images) if images.ndim == 4 else None
    if hasattr(images, "column_names") and hasattr(images, "cast_column"):
        return _pictures_of_data_set(images)
    single = str, bytes, bytearray, memoryview, os.PathLike, Image.Image, dict
    if isinstance(images, (*single, set, frozenset)) or hasattr(images, "read"):  # a set would lose which is which
        return None
    if hasattr(images, "__array__") and getattr(images, "ndim", 1) > 1:  # an array of another library
        return pictures_of(np.asarray(images))
    if isinstance(images, (list, tuple)):
        return list(images)
    if isinstance(images, Dataset) or _is_column(images):
        return Pictures(images) if hasattr(images, "__len__") else iter(images)
    return iter(images) if hasattr(images, "__iter__") else None


def _is_column(images: Any) -> bool:
    """Whether this is a column of a data set, or a slice of one, which is indexed by row numbers."""
    return type(images).__module__.partition(".")[0] == "datasets" and hasattr(images, "__getitem__")


def _pictures_of_data_set(data: Any) -> Pictures | Iterator:
    if isinstance(data, dict):
        raise ValueError(f"this is a dict of splits, {listed(data)}: pass one of them")
    features = data.features or {}
    names = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    column = (names or ["image"])[0]
    if features and column not in features:
        raise ValueError(f"the data set has no column of images among {listed(features)}: pass one, data['...']")
    if names:
        data = data.cast_column(column, type(features[column])(decode=False))
    if hasattr(data, "__len__"):
        return Pictures(data[column])
    return (row[column] for row in data)
