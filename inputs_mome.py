"""What is refused before any heavy work, each in one line that names the value; and where tokens stand."""

import torch
from torch.nn import functional as F

from .configuration_mome import MomeConfig


def check_pixel_values(config: MomeConfig, pixel_values: torch.Tensor):
    expected = (config.num_channels, config.image_size, config.image_size)
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}, expected (images, channels, height, width) = "
            f"(images, {', '.join(map(str, expected))}): prepare images with the checkpoint's processor"
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
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected (texts, tokens), both at least 1")
    if input_ids.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"input_ids has {input_ids.shape[1]} tokens, max_position_embeddings is "
            f"{config.max_position_embeddings}: shorten the text or tokenize it with truncation=True"
        )
    check_vocabulary(input_ids, vocabulary)


def check_vocabulary(input_ids: torch.Tensor, vocabulary: int | None):
    """`vocabulary`: rows of the word embedding; `None`: don't look."""
    if vocabulary is None or torch.compiler.is_compiling() or input_ids.device.type == "meta":
        return
    lowest, highest = (int(bound) for bound in input_ids.aminmax())
    if lowest < 0 or highest >= vocabulary:
        bad = lowest if lowest < 0 else highest
        raise ValueError(f"input_ids holds {bad}, vocab_size is {vocabulary}: use the checkpoint's own tokenizer")


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


def check_pairs(pixel_values: torch.Tensor | None, input_ids: torch.Tensor | None):
    images, texts = (0 if given is None else given.shape[0] for given in (pixel_values, input_ids))
    if images != texts or not images:
        raise ValueError(f"{images} images and {texts} texts: pass one text for each image")


def check_labels(labels: torch.Tensor, input_ids: torch.Tensor | None, pixel_values: torch.Tensor | None):
    if pixel_values is None:
        raise ValueError(f"labels of shape {tuple(labels.shape)} without images: pass pixel_values as well")
    if input_ids is None:
        raise ValueError("labels without input_ids: the joint loss compares captions, pass input_ids")
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}: they must be equal"
        )
    check_pairs(pixel_values, input_ids)


def image_places(kept_patches: torch.Tensor) -> torch.Tensor:
    """Places of patches in the grid (images, kept) → of tokens in the image (images, 1 + kept), `[CLS]` first."""
    return F.pad(kept_patches + 1, (1, 0))


def text_positions(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(texts, tokens) → position of each token in its text, padding on either side not counted."""
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape[0], -1)
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
