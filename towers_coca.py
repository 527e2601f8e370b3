"""What CoCa is made of: an image encoder with a pooler, a text encoder, a caption decoder.

- `CocaLayer`: self-attention and a feed-forward, as in CLIP (norms first), for image and text;
- `CocaDecoderLayer`: the same, then attention to the image and a feed-forward of its own;
- `CocaAttentionPooler`: learned queries that read the patches;
- `CocaEncoder`, `CocaDecoder`: stacks of layers.

Keys and values of an image are made once, and all captions of the image share them. Shapes are in the glossary of
`modeling_coca.py`.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_mome import attention_function
from .compatibility_mome import CACHE_NAME, NUMBERS_COUNT_THE_INPUT, accepts_cache
from .configuration_coca import CocaConfig
from .kernels_mome import MomeLinear, activated_linear
from .loading_mome import MomeCompleteLoading
from .outputs_mome import MomeEncoderOutput

# transformers lets a model choose its attention if its file says `ALL_ATTENTION_FUNCTIONS.get_interface(`: the call is
# in attention_mome.py.

KeyValues = tuple[torch.Tensor, torch.Tensor]


def all_states(options: dict) -> dict:
    """Options of a pass that ask for all hidden states where the caller asks for some, see `asked_for`."""
    wanted = options.get("output_hidden_states")
    return options if wanted is None or isinstance(wanted, bool) else {**options, "output_hidden_states": True}


def asked_for(states: tuple[torch.Tensor, ...] | None, options: dict) -> tuple[torch.Tensor | None, ...] | None:
    """Hidden states with `None` for those that `output_hidden_states=[…]` leaves out; indices may be negative.

    They count as those of the installed transformers do, see `NUMBERS_COUNT_THE_INPUT`.
    """
    wanted = options.get("output_hidden_states")
    if states is None or wanted is None or isinstance(wanted, bool):
        return states
    states = states if NUMBERS_COUNT_THE_INPUT else states[1:]
    count, wanted = len(states), [wanted] if isinstance(wanted, int) else wanted
    kept = {index % count for index in wanted if -count <= index < count}
    return tuple(each if index in kept else None for index, each in enumerate(states))


@dataclass
class CocaDecoderOutput(MomeEncoderOutput):
    """As `MomeEncoderOutput`, and `cross_attentions`: per layer, (rows, heads, tokens, image tokens)."""

    cross_attentions: tuple[torch.Tensor, ...] | None = None


# ---------------------------------------------------------------------------------------------------- embeddings


class CocaImageEmbedding(nn.Module):
    """Pixels (images, channels, height, width) → (images, 1 + patches, vision width): `[CLS]`, then row by row."""

    def __init__(self, config: CocaConfig):
        super().__init__()
        self.config = config
        width = config.vision_hidden_size
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, width, bias=False)
        self.cls_token = nn.Parameter(torch.empty(width))
        self.position_embedding = nn.Parameter(torch.empty(config.grid_size**2 + 1, width))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        images, channels, _, _ = pixel_values.shape
        grid, patch = self.config.grid_size, self.config.patch_size
        # (images, channels, grid · patch, grid · patch) → (images, grid · grid, channels · patch · patch)
        patches = pixel_values.reshape(images, channels, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
        patches = self.patch_embedding(patches.reshape(images, grid * grid, -1))
        cls_token = self.cls_token.expand(images, 1, -1)
        return self.norm(torch.cat([cls_token.to(patches.dtype), patches], dim=1) + self.position_embedding)


class CocaTextEmbedding(nn.Module):
    """Words and their positions; the last position of the table is that of `[CLS]`."""

    def __init__(self, config: CocaConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.cls_token = nn.Parameter(torch.empty(config.hidden_size))
        self.position_embedding = nn.Parameter(torch.empty(config.max_position_embeddings + 1, config.hidden_size))

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, width), (batch or 1, tokens) → (batch, tokens, width)"""
        return inputs_embeds + self.position_embedding[position_ids]

    def with_cls(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(texts, tokens, width) → (texts, tokens + 1, width): `[CLS]` last, at the end of the position table."""
        cls_token = (self.cls_token + self.position_embedding[-1]).to(hidden_states.dtype)
        return torch.cat([hidden_states, cls_token.expand(hidden_states.shape[0], 1, -1)], dim=1)


# ----------------------------------------------------------------------------------------------------- attention


class CocaAttention(nn.Module):
    """Self-attention. `layer_idx` is its place in the cache."""

    def __init__(self, config: CocaConfig, width: int, heads: int, layer_idx: int):
        super().__init__()
        self.config, self.heads, self.layer_idx = config, heads, layer_idx
        self.head_dim = width // heads
        self.is_causal = False
        self.query_key_value = MomeLinear(width, 3 * width)
        self.output = MomeLinear(width, width)

    @accepts_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        causal: bool = False,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, tokens, width) → the same, and the weights (batch, heads, tokens, keys) if they are written down."""
        batch, tokens, _ = hidden_states.shape
        # (batch, tokens, 3 · width) → 3 × (batch, heads, tokens, head_dim)
        query, key, value = (
            states.view(batch, tokens, self.heads, self.head_dim).transpose(1, 2)
            for states in self.query_key_value(hidden_states).chunk(3, dim=-1)
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        states, weights = _attend(self, query, key, value, attention_mask, causal, **kwargs)
        return self.output(states), weights


class CocaCrossAttention(nn.Module):
    """Attention of some tokens to others, whose keys and values are made beforehand."""

    def __init__(self, config: CocaConfig, heads: int, source_width: int):
        super().__init__()
        width = config.hidden_size
        self.config, self.heads, self.head_dim = config, heads, width // heads
        self.is_causal = False
        self.query = MomeLinear(width, width)
        self.key_value = MomeLinear(source_width, 2 * width)
        self.output = MomeLinear(width, width)

    def keys_and_values(self, source: torch.Tensor) -> KeyValues:
        """(images, source tokens, source width) → 2 × (images, heads, source tokens, head_dim)"""
        images, tokens, _ = source.shape
        key, value = (
            states.view(images, tokens, self.heads, self.head_dim).transpose(1, 2)
            for states in self.key_value(source).chunk(2, dim=-1)
        )
        return key, value

    def forward(
        self, hidden_states: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(rows, tokens, width) → the same, and the weights (rows, heads, tokens, source tokens).

        There may be several rows for each image, one after the other: its captions or beams.
        """
        rows, tokens, _ = hidden_states.shape
        images = key.shape[0]
        # (rows, tokens, width) → (images, heads, rows of an image · tokens, head_dim)
        query = self.query(hidden_states).view(images, -1, self.heads, self.head_dim).transpose(1, 2)
        states, weights = _attend(self, query, key, value, None, False, **kwargs)
        if weights is not None:  # (images, heads, rows of an image · tokens, keys) → (rows, heads, tokens, keys)
            weights = weights.unflatten(2, (-1, tokens)).transpose(1, 2).flatten(0, 1)
        return self.output(states.reshape(rows, tokens, -1)), weights


def _attend(module, query, key, value, attention_mask, causal: bool, **kwargs):
    """(batch, heads, tokens, head_dim) → (batch, tokens, width), weights."""
    states, weights = attention_function(module.config, query, key, kwargs.get("output_attentions"))(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=module.head_dim**-0.5,
        dropout=module.config.attention_dropout if module.training else 0.0,
        is_causal=causal,
        **kwargs,
    )
    return states.flatten(2), weights


# -------------------------------------------------------------------------------------------------------- layers


class CocaFeedForward(nn.Module):
    def __init__(self, config: CocaConfig, width: int, intermediate_size: int):
        super().__init__()
        self.up_proj = MomeLinear(width, intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = MomeLinear(intermediate_size, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(activated_linear(self.up_proj, self.act_fn, hidden_states))


class CocaLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: CocaConfig, width: int, intermediate_size: int, heads: int, layer_idx: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = CocaAttention(config, width, heads, layer_idx)
        self.feed_forward_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.feed_forward = CocaFeedForward(config, width, intermediate_size)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
    ) -> tuple[torch.Tensor]:
        """(batch, tokens, width) → the same"""
        return (self._look_around(hidden_states, attention_mask, **kwargs),)

    def _look_around(self, hidden_states, attention_mask, **kwargs) -> torch.Tensor:
        attended, _ = self.attention(self.attention_norm(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.feed_forward(self.feed_forward_norm(hidden_states))


class CocaDecoderLayer(CocaLayer):
    """A `CocaLayer`, then x + attention to the image(norm(x)), then x + another feed_forward(norm(x))."""

    def __init__(self, config: CocaConfig, layer_idx: int):
        width, intermediate_size = config.hidden_size, config.decoder_intermediate_size
        super().__init__(config, width, intermediate_size, config.decoder_num_attention_heads, layer_idx)
        self.image_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.cross_attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.cross_attention = CocaCrossAttention(config, config.decoder_num_attention_heads, width)
        self.cross_feed_forward_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.cross_feed_forward = CocaFeedForward(config, width, intermediate_size)

    def keys_and_values(self, image_states: torch.Tensor) -> KeyValues:
        """(images, queries but the first, width) → 2 × (images, heads, the same, head_dim), each head in one piece.

        Every step of a caption reads all of it.
        """
        key, value = self.cross_attention.keys_and_values(self.image_norm(image_states))
        return key.contiguous(), value.contiguous()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_key: torch.Tensor,
        image_value: torch.Tensor,
        **kwargs,
    ) -> tuple[torch.Tensor]:
        """(rows, tokens, width) → the same.

        What needs a gradient comes by position: checkpointing with `use_reentrant=True` sees no other.
        """
        hidden_states = self._look_around(hidden_states, attention_mask, **kwargs)
        normed, weights_too = self.cross_attention_norm(hidden_states), kwargs.get("output_attentions")
        attended, _ = self.cross_attention(normed, image_key, image_value, output_attentions=weights_too)
        hidden_states = hidden_states + attended
        return (hidden_states + self.cross_feed_forward(self.cross_feed_forward_norm(hidden_states)),)


class CocaAttentionPooler(nn.Module):
    """Patches (images, 1 + patches, vision width) → (images, queries, width)."""

    def __init__(self, config: CocaConfig):
        super().__init__()
        self.query = nn.Parameter(torch.empty(config.pooler_num_queries, config.hidden_size))
        self.query_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.patch_norm = nn.LayerNorm(config.vision_hidden_size, eps=config.layer_norm_eps)
        self.attention = CocaCrossAttention(config, config.pooler_num_attention_heads, config.vision_hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        key, value = self.attention.keys_and_values(self.patch_norm(patches))
        queries = self.query_norm(self.query).expand(patches.shape[0], -1, -1)
        return self.norm(self.attention(queries, key, value)[0])


# -------------------------------------------------------------------------------------------------------- stacks


class CocaPreTrainedModel(MomeCompleteLoading, PreTrainedModel):
    config: CocaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["CocaLayer", "CocaDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _can_compile_fullgraph = True

    def __init__(self, config: CocaConfig, *args, **kwargs):
        config.check()  # it may have been changed since it was made: `from_pretrained(path, image_size=384)`
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Every weight that does not start as a linear layer, an embedding or a norm does."""
        super()._init_weights(module)
        if isinstance(module, (CocaImageEmbedding, CocaTextEmbedding, CocaAttentionPooler)):
            for name in ("cls_token", "position_embedding", "query"):
                if isinstance(parameter := getattr(module, name, None), nn.Parameter):
                    init.normal_(parameter, std=self.config.initializer_range)


class CocaEncoder(CocaPreTrainedModel):
    """A stack of `CocaLayer`, of the image or of the text. Neither has a norm behind it."""

    _can_record_outputs = {
        "hidden_states": OutputRecorder(CocaLayer, index=0),
        "attentions": OutputRecorder(CocaAttention, index=1),
    }

    def __init__(self, config: CocaConfig, width: int, intermediate_size: int, heads: int, layers: int):
        super().__init__(config)
        sizes = width, intermediate_size, heads
        self.layers = nn.ModuleList([CocaLayer(config, *sizes, index) for index in range(layers)])
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def of_images(cls, config: CocaConfig) -> "CocaEncoder":
        sizes = config.vision_hidden_size, config.vision_intermediate_size, config.vision_num_attention_heads
        return cls(config, *sizes, config.vision_num_hidden_layers)

    @classmethod
    def of_texts(cls, config: CocaConfig) -> "CocaEncoder":
        sizes = config.hidden_size, config.text_intermediate_size, config.text_num_attention_heads
        return cls(config, *sizes, config.text_num_hidden_layers)

    @capture_outputs
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        causal: bool = False,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MomeEncoderOutput:
        """(batch, tokens, width) → the same

        Args:
            hidden_states: (batch, tokens, width).
            attention_mask: as the attention implementation wants it.
            causal: a token sees none behind it, where `attention_mask` is `None`.
            cache: cache that the tokens are written to.
        """
        # {CACHE_NAME: …}: where checkpointing looks for it
        options = {"causal": causal, CACHE_NAME: cache, "output_attentions": kwargs.get("output_attentions")}
        for layer in self.layers:
            (hidden_states,) = layer(hidden_states, attention_mask, **options)
        return MomeEncoderOutput(last_hidden_state=hidden_states)


class CocaDecoder(CocaPreTrainedModel):
    """The caption decoder: states of the text encoder and an image → states that the caption head reads."""

    _can_record_outputs = {
        "hidden_states": OutputRecorder(CocaDecoderLayer, index=0),
        "attentions": OutputRecorder(CocaAttention, index=1),
        "cross_attentions": OutputRecorder(CocaCrossAttention, index=1),
    }

    def __init__(self, config: CocaConfig):
        super().__init__(config)
        first, layers = config.text_num_hidden_layers, config.decoder_num_hidden_layers
        self.layers = nn.ModuleList([CocaDecoderLayer(config, first + index) for index in range(layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def keys_and_values(self, image_states: torch.Tensor) -> tuple[KeyValues, ...]:
        """(images, queries, width) → per layer, keys and values of all queries but the first."""
        return tuple(layer.keys_and_values(image_states[:, 1:]) for layer in self.layers)

    @capture_outputs
    def forward(
        self,
        hidden_states: torch.Tensor,
        image_key_values: tuple[KeyValues, ...],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MomeEncoderOutput:
        """(rows, tokens, width) → the same; `image_key_values` are those of `keys_and_values`."""
        options = {"causal": True, CACHE_NAME: cache, "output_attentions": kwargs.get("output_attentions")}
        for layer, (key, value) in zip(self.layers, image_key_values):
            (hidden_states,) = layer(hidden_states, attention_mask, key, value, **options)
        return CocaDecoderOutput(last_hidden_state=self.norm(hidden_states))


__all__ = [
    "CocaAttentionPooler",
    "CocaDecoder",
    "CocaEncoder",
    "CocaImageEmbedding",
    "CocaPreTrainedModel",
    "CocaTextEmbedding",
    "KeyValues",
    "all_states",
    "asked_for",
]
