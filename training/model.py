"""The captioner that a recipe trains: loaded or new, with adapters, fit for sharding."""

import torch
from torch import nn
from transformers import AutoProcessor

from ..configuration_mome import MomeConfig
from ..modeling_mome import MomeForConditionalGeneration
from ..processing_mome import MomeProcessor
from .recipe import Recipe, RecipeError

LINEAR_LAYERS = r".*attention\.(query_key_value|output)\.\w+|.*feed_forward\.\w+\.(up|down)_proj"


def build_model(recipe: Recipe) -> tuple[nn.Module, MomeProcessor]:
    """The captioner to train, with adapters where the recipe wants them, and its processor.

    Raises:
        RecipeError: a folder that can't be loaded, a config that doesn't fit, LoRA keywords that peft refuses.
    """
    processor = load_processor(recipe.processor or recipe.checkpoint)
    if recipe.checkpoint is not None:
        captioner = _load(MomeForConditionalGeneration, recipe.checkpoint, dtype=torch.float32)
    else:
        captioner = MomeForConditionalGeneration(config_for(processor, dict(recipe.model)))
    if recipe.gradient_checkpointing:
        # Its name from transformers 5.23 on.
        enable = getattr(captioner, "activation_checkpointing_enable", captioner.gradient_checkpointing_enable)
        enable()
    if recipe.lora is not None:
        import peft

        try:
            lora = peft.LoraConfig(**{"target_modules": LINEAR_LAYERS} | recipe.lora)
            captioner = peft.get_peft_model(captioner, lora)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"lora={recipe.lora}: {error}") from None
    return captioner, processor


def load_processor(path: str) -> MomeProcessor:
    """Raises `RecipeError` for a folder that can't be loaded."""
    return _load(AutoProcessor, path)


def _load(auto_class, path: str, **options):
    try:
        return auto_class.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path!r} can't be loaded: {str(error).splitlines()[0]}") from None


def config_for(processor: MomeProcessor, fields: dict) -> MomeConfig:
    """A config with the vocabulary, special tokens and image size of a processor, where `fields` do not say else."""
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
        raise RecipeError(f"model={fields}: {str(error).splitlines()[0]}") from None


def give_scalars_a_dimension(model: nn.Module):
    """FSDP2 shards along the first dimension, and refuses parameters without one."""
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 0:
                setattr(module, name, nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad))


def plain_name(name: str) -> str:
    """A parameter's name without what DDP, compilation and `PairModel` put in front of it."""
    for prefix in ("module.", "_orig_mod.", "module.", "captioner."):
        name = name.removeprefix(prefix)
    return name
