"""The captioner that a recipe trains: loaded or new, with adapters if wanted, ready for sharding."""

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..configuration_mome import MomeConfig, quoted
from ..errors import RecipeError, first_line
from ..families import FAMILIES, FAMILY_NAMES
from ..modeling_mome import MomeForConditionalGeneration
from ..processing_mome import MomeProcessor
from .recipe import Recipe

LORA_TARGETS = {
    "mome": r".*attention\.(query_key_value|output)\.\w+|.*feed_forward\.\w+\.(up|down)_proj",
    "coca": r".*attention\.(query_key_value|query|key_value|output)|.*feed_forward\.(up|down)_proj",
}


def build_model(recipe: Recipe) -> tuple[nn.Module, MomeProcessor]:
    """The captioner to train, with adapters if the recipe has `lora`, and its processor.

    Raises:
        RecipeError: a folder that can't be loaded, an invalid config, LoRA keywords that peft refuses.
    """
    processor = load_processor(recipe.processor or recipe.checkpoint)
    if recipe.checkpoint is not None:
        captioner = _load(AutoModelForImageTextToText, recipe.checkpoint, dtype=torch.float32)
        _check_family(captioner, recipe)
    else:
        captioner = MomeForConditionalGeneration(config_for(processor, dict(recipe.model)))
    if recipe.gradient_checkpointing:
        # The first name is that of transformers 5.23 and later.
        enable = getattr(captioner, "activation_checkpointing_enable", captioner.gradient_checkpointing_enable)
        enable()
    if recipe.lora is not None:
        import peft

        try:
            lora = peft.LoraConfig(**{"target_modules": LORA_TARGETS[type(captioner.config).model_type]} | recipe.lora)
            captioner = peft.get_peft_model(captioner, lora)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"lora={quoted(recipe.lora)}: {first_line(error)}") from None
    return captioner, processor


def _check_family(captioner: nn.Module, recipe: Recipe):
    kind = type(captioner.config).model_type
    if kind not in FAMILIES:
        raise RecipeError(f"{quoted(recipe.checkpoint)} is of type {quoted(kind)}, not {FAMILY_NAMES}")
    if kind == "coca" and recipe.image_dropout:
        raise RecipeError(
            f"image_dropout={recipe.image_dropout}: CoCa writes no captions without an image, set it to 0"
        )


def load_processor(path: str) -> MomeProcessor:
    """Raises `RecipeError` for a folder that can't be loaded."""
    return _load(AutoProcessor, path)


def _load(auto_class, path: str, **options):
    try:
        return auto_class.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{quoted(path)} can't be loaded: {first_line(error)}") from None


def config_for(processor: MomeProcessor, fields: dict) -> MomeConfig:
    """A config with a processor's vocabulary, special tokens and image size; `fields` take precedence."""
    tokenizer, size = processor.tokenizer, processor.image_processor.size
    image_token = tokenizer.convert_tokens_to_ids(getattr(tokenizer, "image_token", None) or "<image>")
    found = {
        "vocab_size": len(tokenizer),
        "image_size": size["height"] if "height" in size else size["shortest_edge"],
        "max_position_embeddings": min(tokenizer.model_max_length, 512),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "mask_token_id": tokenizer.mask_token_id,
        "image_token_id": image_token,
    }
    try:
        build = MomeConfig.from_size if "size" in fields else MomeConfig
        return build(**found | fields)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"model={quoted(fields)}: {first_line(error)}") from None


def give_scalars_a_dimension(model: nn.Module):
    """Makes scalar parameters (1,): FSDP2 shards along the first dimension."""
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 0:
                setattr(module, name, nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad))


def captioner_name(name: str) -> str:
    """A parameter's name in the captioner, without the prefixes of DDP, compilation and `PairModel`."""
    for prefix in ("module.", "_orig_mod.", "module.", "captioner."):
        name = name.removeprefix(prefix)
    return name
