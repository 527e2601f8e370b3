"""Tiny random models of every kind, for all tests."""

import torch

from mome import CocaConfig, CocaForConditionalGeneration, MomeConfig, MomeForConditionalGeneration

TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "max_position_embeddings": 24,
    "projection_dim": 16,
    "initializer_range": 0.2,  # large enough that wrong routing, masks or positions show
}
VARIANTS = {
    "dense": {},
    "routed": {"experts_per_group": 4, "experts_per_token": 2, "expert_intermediate_size": 32, "shared_expert": True},
    "top1": {"experts_per_group": 3, "experts_per_token": 1, "sub_layernorm": True},
    "unshared": {"share_attention": False, "sub_layernorm": True},
    "relative": {"position_embedding_type": "relative", "layer_scale_init_value": 0.5},
    "masked": {"caption_objective": "masked", "mask_token_id": 5},
    "masked_relative": {"caption_objective": "masked", "mask_token_id": 5, "position_embedding_type": "relative"},
    "siglip": {
        "lm_head_transform": True,
        "share_attention": False,
        "image_cls_token": False,
        "image_pooling": "attention",
        "text_pooling": "last",
        "text_start_token": False,
        "fixed_text_length": True,
        "projection_dim": 32,
        "image_projection": False,
        "projection_bias": True,
        "contrastive_objective": "sigmoid",
    },
    "vlmo": {
        "fusion_start_layer": 1,
        "text_embedding_norm": True,
        "modality_embedding": True,
        "lm_head_transform": True,
        "patch_embedding_type": "conv_stem",
    },
}


def tiny_config(variant: str = "dense", **overrides) -> MomeConfig:
    return MomeConfig(**{**TINY, **VARIANTS[variant], **overrides})


def tiny_captioner(variant: str = "dense", seed: int = 0, **overrides) -> MomeForConditionalGeneration:
    """A captioner in eval mode, random in every weight (norms and biases too, so that no test passes by luck)."""
    torch.manual_seed(seed)
    model = MomeForConditionalGeneration(tiny_config(variant, **overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 and "logit_scale" not in name or name.endswith("position_bias.table"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def random_batch(config: MomeConfig, size: int = 3, tokens: int = 7, seed: int = 1) -> dict[str, torch.Tensor]:
    """`pixel_values`, `input_ids` and an `attention_mask` whose rows have 0, 2, 0, 2, … tokens of right padding."""
    generator = torch.Generator().manual_seed(seed)
    side = config.image_size
    pixel_values = torch.randn(size, config.num_channels, side, side, generator=generator)
    input_ids = torch.randint(6, config.vocab_size, (size, tokens), generator=generator)
    input_ids[:, 0] = config.bos_token_id
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1::2, -2:] = 0
    input_ids = input_ids.masked_fill(attention_mask == 0, config.pad_token_id)
    return {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}


def pad_left(tensor: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(batch, tokens) padded on the right → the same padded on the left."""
    return tensor.gather(1, attention_mask.argsort(dim=1, stable=True))


TINY_COCA = {
    "vocab_size": 99,
    "image_size": 16,
    "patch_size": 8,
    "vision_hidden_size": 48,
    "vision_intermediate_size": 64,
    "vision_num_hidden_layers": 2,
    "vision_num_attention_heads": 3,
    "pooler_num_queries": 5,
    "pooler_num_attention_heads": 2,
    "hidden_size": 32,
    "text_intermediate_size": 64,
    "text_num_hidden_layers": 2,
    "text_num_attention_heads": 4,
    "decoder_intermediate_size": 48,
    "decoder_num_hidden_layers": 3,
    "decoder_num_attention_heads": 8,
    "max_position_embeddings": 24,
    "projection_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "initializer_range": 0.2,
}


def tiny_coca(seed: int = 0, **overrides) -> CocaForConditionalGeneration:
    """A CoCa captioner in eval mode, random in every weight."""
    torch.manual_seed(seed)
    model = CocaForConditionalGeneration(CocaConfig(**{**TINY_COCA, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 and "logit_scale" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def coca_batch(config: CocaConfig, size: int = 4, tokens: int = 7) -> dict[str, torch.Tensor]:
    """As `random_batch`; padding is `[EOS]`, and in the first row a word in the middle is the filler."""
    batch = random_batch(config, size, tokens)
    batch["input_ids"][0, 2] = config.filler_token_id
    return batch
