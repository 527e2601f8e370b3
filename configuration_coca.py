"""CoCa configuration: one flat, strict record of the architecture, as open_clip builds it (2205.01917).

- `COCA_SIZES`, the two published sizes, read by `CocaConfig.from_size`;
- what every config of this package has: the code beside the weights, and no unknown keys (`configuration_mome.py`).
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_mome import MomePublishedConfig, checked_in_one_line, quoted

# open_clip's `coca_ViT-B-32` and `coca_ViT-L-14`. The poolers of both have 8 heads.
COCA_SIZES: dict[str, dict[str, int]] = {
    "base": {
        "patch_size": 32,
        "vision_hidden_size": 768,
        "vision_intermediate_size": 3072,
        "vision_num_hidden_layers": 12,
        "vision_num_attention_heads": 12,
        "hidden_size": 512,
        "text_intermediate_size": 2048,
        "text_num_attention_heads": 8,
        "decoder_intermediate_size": 2048,
        "decoder_num_attention_heads": 8,
        "projection_dim": 512,
    },
    "large": {
        "patch_size": 14,
        "vision_hidden_size": 1024,
        "vision_intermediate_size": 4096,
        "vision_num_hidden_layers": 24,
        "vision_num_attention_heads": 16,
        "hidden_size": 768,
        "text_intermediate_size": 3072,
        "text_num_attention_heads": 12,
        "decoder_intermediate_size": 3072,
        "decoder_num_attention_heads": 12,
        "projection_dim": 768,
    },
}

# Where a folder without the installed package finds the code, all of it whatever class was saved.
COCA_AUTO_MAP: dict[str, str] = {
    "AutoConfig": "configuration_coca.CocaConfig",
    "AutoModel": "modeling_coca.CocaModel",
    "AutoModelForImageTextToText": "modeling_coca.CocaForConditionalGeneration",
    "AutoModelForZeroShotImageClassification": "modeling_coca.CocaModel",
}


@checked_in_one_line
@strict
class CocaConfig(MomePublishedConfig, PreTrainedConfig):
    r"""Architecture of a contrastive captioner (CoCa).

    Args:
        vocab_size: rows of the word embedding and of the caption head.
        image_size: side of the square input image in pixels.
        patch_size: side of a patch in pixels; must divide `image_size`.
        num_channels: channels of `pixel_values`.
        vision_hidden_size, vision_intermediate_size, vision_num_hidden_layers, vision_num_attention_heads: of the
            image encoder.
        pooler_num_queries: learned queries that read the image; the state of the first becomes the embedding, the
            others are what captions look at.
        pooler_num_attention_heads: of the attention that pools.
        hidden_size: width of the pooled image, the text encoder and the caption decoder.
        text_intermediate_size, text_num_hidden_layers, text_num_attention_heads: of the text encoder.
        decoder_intermediate_size, decoder_num_hidden_layers, decoder_num_attention_heads: of the caption decoder.
        max_position_embeddings: longest text in tokens, `[BOS]` and `[EOS]` counted. The table has one row more, for
            the `[CLS]` that is put behind the text.
        correct_cls_mask: who `[CLS]` and the words don't see, see `modeling_coca.py`. `False`: as all published
            weights were trained, where `[CLS]` sees one padding token and not itself; `True`: no padding and itself.
        projection_dim: dimension of `image_embeds` and `text_embeds`.
        hidden_act: activation of the feed-forwards, a key of `transformers.activations.ACT2FN`.
        layer_norm_eps: epsilon of every LayerNorm.
        attention_dropout: dropout on the attention weights.
        initializer_range: standard deviation of the normal initialisation.
        logit_scale_init_value: start value of the log of the inverse temperature (CLIP: ln(1/0.07)).
        contrastive_loss_weight, caption_loss_weight: weights of the two parts of the joint loss (2205.01917: 1 and 2).
        use_cache: keep keys and values while generating.
        bos_token_id, eos_token_id: special tokens of the text; several may end it.
        pad_token_id: what tokenizer and `generate()` fill a batch with. The model looks at the mask, not at the id,
            and tells padding from text without a mask only at the ends of a text.
        filler_token_id: what stands behind a text in the model, as in open_clip's training. In CLIP's vocabulary the
            id is also a piece of words with `!`, and as such hides the token behind it, as it does upstream.
        tie_word_embeddings: share the matrix of the caption head with the word embedding; no published model does.

    Raises:
        ValueError: an unknown key or an impossible combination, with the value.
    """

    model_type = "coca"
    code = COCA_AUTO_MAP

    # What the rest of the package asks any model: here nothing is routed, and an image has no places among the tokens.
    experts_per_group: ClassVar[int] = 1
    num_image_tokens: ClassVar[int] = 0
    image_token_id: ClassVar[None] = None
    token_groups: ClassVar[tuple[str, ...]] = ("image", "text")
    text_start_token: ClassVar[bool] = True
    fixed_text_length: ClassVar[bool] = False
    contrastive_objective: ClassVar[str] = "softmax"

    vocab_size: int = 49408
    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3
    vision_hidden_size: int = 768
    vision_intermediate_size: int = 3072
    vision_num_hidden_layers: int = 12
    vision_num_attention_heads: int = 12
    pooler_num_queries: int = 256
    pooler_num_attention_heads: int = 8
    hidden_size: int = 512
    text_intermediate_size: int = 2048
    text_num_hidden_layers: int = 12
    text_num_attention_heads: int = 8
    decoder_intermediate_size: int = 2048
    decoder_num_hidden_layers: int = 12
    decoder_num_attention_heads: int = 8
    max_position_embeddings: int = 76
    correct_cls_mask: bool = False
    projection_dim: int = 512
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    logit_scale_init_value: float = 2.6592
    contrastive_loss_weight: float | int = 1.0
    caption_loss_weight: float | int = 2.0
    use_cache: bool = True
    bos_token_id: int = 49406
    eos_token_id: int | list[int] | None = 49407
    pad_token_id: int = 49407
    filler_token_id: int = 0
    tie_word_embeddings: bool = False

    @classmethod
    def from_size(cls, size: str, **overrides) -> "CocaConfig":
        """A config of one of the published sizes (`base`, `large`); `overrides` win over the table."""
        if size not in COCA_SIZES:
            raise ValueError(f"unknown size {quoted(size)}: choose one of {', '.join(COCA_SIZES)}")
        return cls(**{**COCA_SIZES[size], **overrides})

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the cache: those of text encoder and decoder, and one that tells which tokens are the filler."""
        return self.text_num_hidden_layers + self.decoder_num_hidden_layers + 1

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    def check(self):
        """Raises a ValueError with the value if sizes and heads don't fit one another."""
        self._check_positive(
            "vocab_size image_size patch_size num_channels vision_hidden_size vision_intermediate_size "
            "vision_num_hidden_layers vision_num_attention_heads pooler_num_attention_heads hidden_size "
            "text_intermediate_size text_num_hidden_layers text_num_attention_heads decoder_intermediate_size "
            "decoder_num_hidden_layers decoder_num_attention_heads max_position_embeddings projection_dim"
        )
        if self.pooler_num_queries < 2:
            raise ValueError(
                f"pooler_num_queries={self.pooler_num_queries} must be at least 2: the first makes the embedding, "
                "the others are what captions look at"
            )
        for width, heads in (
            ("vision_hidden_size", "vision_num_attention_heads"),
            ("hidden_size", "pooler_num_attention_heads"),
            ("hidden_size", "text_num_attention_heads"),
            ("hidden_size", "decoder_num_attention_heads"),
        ):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(f"{width}={getattr(self, width)} is not a multiple of {heads}={getattr(self, heads)}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}")
        self._check_activation()
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout={self.attention_dropout} must be in [0, 1)")


__all__ = ["COCA_AUTO_MAP", "COCA_SIZES", "CocaConfig"]
