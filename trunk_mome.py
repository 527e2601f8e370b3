"""The trunk: transformer layers in which every token meets the experts of its modality.

- `MomeLayer`: attention over all tokens of a pass, then the experts of each token's group;
- `MomeEncoder`: N layers and the final norm; one call is one pass.

                        ┌ image tokens ─ experts of `image` ┐
    tokens ─ attention ─┤                                   ├─ tokens          × N, then the final norm
                        └ text tokens ── experts of `text` ─┘

What goes in comes from `embeddings_mome.py`. Shapes are in the glossary of `modeling_mome.py`.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations import use_experts_implementation
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_mome import attention_function
from .compatibility_mome import CACHE_NAME, accepts_cache
from .configuration_mome import MomeConfig
from .embeddings_mome import MomeImageEmbedding, MomeRelativePositionBias, MomeTextEmbedding
from .heads_mome import MomeAttentionPooling
from .kernels_mome import MomeLinear, activated_linear, sorted_experts_forward
from .loading_mome import MomeCompleteLoading
from .outputs_mome import MomeEncoderOutput
from .routing_mome import MomeRouter, run_experts

# Runs of tokens in order, each of one group: (("image", 197), ("text", 32)). Layers slice by it, nothing is gathered.
Spans = tuple[tuple[str, int], ...]

# transformers lets a model choose its attention if its file says `ALL_ATTENTION_FUNCTIONS.get_interface(`: the call is
# in attention_mome.py.

# Up to so many experts of a group, a GPU takes all of them as one product. On an H200 with 4 experts: 1.8 times the
# pairs a second of `eager` in training, 0.8 times the images in a pass without gradients.
FEW_EXPERTS_ON_CUDA = 8

# ------------------------------------------------------------------------------------------------- attention


class MomePerGroup(nn.ModuleDict):
    """One module for each group of tokens, or one under the name `shared` for all.

    Its input (batch, tokens, width) holds the groups one after the other, as `spans` tells.
    """

    def forward(self, hidden_states: torch.Tensor, spans: Spans) -> torch.Tensor:
        if "shared" in self:
            return self["shared"](hidden_states)
        if len(spans) == 1:
            return self[spans[0][0]](hidden_states)
        parts = hidden_states.split([length for _, length in spans], dim=1)
        return torch.cat([self[group](part) for (group, _), part in zip(spans, parts)], dim=1)


def _attention_groups(config: MomeConfig) -> tuple[str, ...]:
    return ("shared",) if config.share_attention else config.token_groups


def _layer_norms(config: MomeConfig, groups: tuple[str, ...]) -> MomePerGroup:
    return MomePerGroup({group: nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for group in groups})


class MomeAttention(nn.Module):
    """Self-attention over the tokens of a pass and, in the caption pass, over the image's keys and values."""

    def __init__(self, config: MomeConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        groups, width = _attention_groups(config), config.hidden_size
        self.query_key_value = MomePerGroup({group: MomeLinear(width, 3 * width) for group in groups})
        self.output = MomePerGroup({group: MomeLinear(width, width) for group in groups})
        self.output_norm = _layer_norms(config, groups) if config.sub_layernorm else None

    @accepts_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        spans: Spans,
        attention_mask: torch.Tensor | None = None,
        prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
        key_order: torch.Tensor | None = None,
        num_mask_tokens: int = 0,
        causal: bool = False,
        cache: Cache | None = None,
        **kwargs: Unpack[FlashAttentionKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """See `MomeEncoder.forward`. Returns states, attention weights, and keys and values of these tokens."""
        batch, tokens, _ = hidden_states.shape
        # (batch, tokens, 3 · width) → 3 × (batch, heads, tokens, head_dim)
        query, key, value = (
            states.view(batch, tokens, -1, self.head_dim).transpose(1, 2)
            for states in self.query_key_value(hidden_states, spans).chunk(3, dim=-1)
        )
        keys, values = self._gather_context(key, value, prefix, key_order, num_mask_tokens, cache)
        states, weights = attention_function(self.config, query, keys, kwargs.get("output_attentions"))(
            self,
            query,
            keys,
            values,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            is_causal=causal,
            **kwargs,
        )
        states = states.reshape(batch, tokens, -1)
        if self.output_norm is not None:
            states = self.output_norm(states, spans)
        return self.output(states, spans), weights, key, value

    def _gather_context(self, key, value, prefix, key_order, num_mask_tokens, cache):
        """Image, cache and tokens one after the other; `[MASK]` tokens come last and are never cached."""
        if prefix is None and cache is None:
            return key, value
        kept = key.shape[2] - num_mask_tokens
        pairs = []
        for index, states in enumerate((key, value)):
            context, masks = states[:, :, :kept], states[:, :, kept:]
            if prefix is not None:
                context = torch.cat([prefix[index], context], dim=2)
            if key_order is not None:
                order = key_order[:, None, :, None].expand(-1, context.shape[1], -1, context.shape[3])
                context = context.gather(2, order)
            pairs.append((context, masks))
        (keys, mask_keys), (values, mask_values) = pairs
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx)
        if num_mask_tokens:
            keys, values = torch.cat([keys, mask_keys], dim=2), torch.cat([values, mask_values], dim=2)
        return keys, values


# --------------------------------------------------------------------------------------------------- experts


class MomeFeedForward(nn.Module):
    """The dense expert: a feed-forward."""

    def __init__(self, config: MomeConfig, intermediate_size: int):
        super().__init__()
        self.up_proj = MomeLinear(config.hidden_size, intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(intermediate_size, eps=config.layer_norm_eps) if config.sub_layernorm else None
        self.down_proj = MomeLinear(intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = activated_linear(self.up_proj, self.act_fn, hidden_states)
        if self.norm is not None:
            hidden_states = self.norm(hidden_states)
        return self.down_proj(hidden_states)


@use_experts_implementation(has_gate=False, has_bias=True)
class MomeExperts(nn.Module):
    """The routed experts of one group, as stacked matrices; with sub-LayerNorm they share one norm.

        y = Σ_e w_e (down_e act(up_e x)) over the k experts e that the router has chosen for x, with its weights w_e

    This forward is `experts_implementation="eager"`; `all_experts` is `kernels_mome.all_experts_forward`, the others
    are transformers' own.
    """

    def __init__(self, config: MomeConfig):
        super().__init__()
        self.num_experts = config.experts_per_group
        inner, width = config.expert_intermediate_size or config.intermediate_size, config.hidden_size
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, inner, width))
        self.up_proj_bias = nn.Parameter(torch.empty(self.num_experts, inner))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, width, inner))
        self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, width))
        self.act_fn = ACT2FN[config.hidden_act]
        if config.sub_layernorm:
            self.act_fn = nn.Sequential(self.act_fn, nn.LayerNorm(inner, eps=config.layer_norm_eps))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states (tokens, width), expert ids and weights (tokens, k) → (tokens, width)."""
        return sorted_experts_forward(self, hidden_states, top_k_index, top_k_weights)


class MomeRoutedFeedForward(nn.Module):
    """A group's router, its experts and, where the config asks for it, an expert that every token uses."""

    def __init__(self, config: MomeConfig):
        super().__init__()
        self.router = MomeRouter(config)
        self.experts = MomeExperts(config)
        inner = config.expert_intermediate_size or config.intermediate_size
        self.shared_expert = MomeFeedForward(config, inner) if config.shared_expert else None

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, tokens, width) → the same, and router logits (batch, tokens, experts)."""
        batch, tokens, width = hidden_states.shape
        flat = hidden_states.reshape(-1, width)
        logits, top_k_weights, top_k_index = self.router(flat)
        outputs = run_experts(self.experts, flat, top_k_index, top_k_weights)
        if self.shared_expert is not None:
            outputs = outputs + self.shared_expert(flat)
        return outputs.view(batch, tokens, width), logits.view(batch, tokens, -1)


# ----------------------------------------------------------------------------------------------------- trunk


class MomeLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + expert(norm(x)) with the experts of each token's group."""

    def __init__(self, config: MomeConfig, layer_idx: int):
        super().__init__()
        groups = config.token_groups
        if config.fusion_start_layer is not None and layer_idx >= config.fusion_start_layer:
            groups += ("joint",)
        self.routed = config.experts_per_group > 1
        self.attention_norm = _layer_norms(config, _attention_groups(config))
        self.attention = MomeAttention(config, layer_idx)
        self.feed_forward_norm = _layer_norms(config, groups)
        if self.routed:
            experts = {group: MomeRoutedFeedForward(config) for group in groups}
        else:
            experts = {group: MomeFeedForward(config, config.intermediate_size) for group in groups}
        self.feed_forward = MomePerGroup(experts)
        self.attention_scale, self.feed_forward_scale = None, None
        if config.layer_scale_init_value is not None:
            self.attention_scale = nn.Parameter(torch.empty(config.hidden_size))
            self.feed_forward_scale = nn.Parameter(torch.empty(config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        prefix_key: torch.Tensor | None,
        prefix_value: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        modality_spans: Spans,
        expert_spans: Spans,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(batch, tokens, width) → the same; keys and values of these tokens; router logits if routed.

        What needs a gradient comes by position: checkpointing with `use_reentrant=True` sees no other.
        """
        residual = hidden_states
        hidden_states, _, key, value = self.attention(
            self.attention_norm(hidden_states, modality_spans),
            modality_spans,
            attention_mask,
            prefix=None if prefix_key is None else (prefix_key, prefix_value),
            **kwargs,
        )
        hidden_states = residual + self._scale(hidden_states, self.attention_scale)

        residual = hidden_states
        hidden_states = self.feed_forward_norm(hidden_states, expert_spans)
        router_logits = None
        if self.routed:
            hidden_states, router_logits = self._route(hidden_states, expert_spans)
        else:
            hidden_states = self.feed_forward(hidden_states, expert_spans)
        hidden_states = residual + self._scale(hidden_states, self.feed_forward_scale)
        return hidden_states, key, value, router_logits

    def _scale(self, hidden_states: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        return self.dropout(hidden_states if scale is None else hidden_states * scale)

    def _route(self, hidden_states: torch.Tensor, spans: Spans) -> tuple[torch.Tensor, torch.Tensor]:
        parts = hidden_states.split([length for _, length in spans], dim=1)
        routed = [self.feed_forward[group](part) for (group, _), part in zip(spans, parts)]
        if len(routed) == 1:
            return routed[0]
        states, logits = zip(*routed)
        return torch.cat(states, dim=1), torch.cat(logits, dim=1)


class MomePreTrainedModel(MomeCompleteLoading, PreTrainedModel):
    config: MomeConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MomeLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: MomeConfig, *args, **kwargs):
        config.check()  # it may have been changed since it was made: `from_pretrained(path, experts_per_token=1)`
        super().__init__(config, *args, **kwargs)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The default is `eager` without a GPU, `all_experts` for few experts on one, else transformers' own."""
        if requested_experts is None and not torch.cuda.is_available():
            requested_experts = "eager"
        elif requested_experts is None and self.config.experts_per_group <= FEW_EXPERTS_ON_CUDA:
            requested_experts = "all_experts"
        return super().get_correct_experts_implementation(requested_experts)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Every weight that does not start as a linear layer, an embedding or a norm does."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, (MomeImageEmbedding, MomeTextEmbedding)):
            for name in ("cls_token", "mask_token", "position_embedding", "modality_embedding"):
                if isinstance(parameter := getattr(module, name, None), nn.Parameter):
                    init.normal_(parameter, std=std)
        elif isinstance(module, MomeAttentionPooling):
            init.normal_(module.probe, std=std)
        elif isinstance(module, MomeRelativePositionBias):
            init.zeros_(module.table)
        elif isinstance(module, MomeExperts):
            for matrix, bias in ((module.up_proj, module.up_proj_bias), (module.down_proj, module.down_proj_bias)):
                init.normal_(matrix, std=std)
                init.zeros_(bias)
        elif isinstance(module, MomeRouter):
            init.normal_(module.weight, std=std)
        elif isinstance(module, MomeLayer) and module.attention_scale is not None:
            init.constant_(module.attention_scale, self.config.layer_scale_init_value)
            init.constant_(module.feed_forward_scale, self.config.layer_scale_init_value)


class MomeEncoder(MomePreTrainedModel):
    """The trunk: N layers and the final norm."""

    _can_record_outputs = {
        "hidden_states": OutputRecorder(MomeLayer, index=0),
        "attentions": OutputRecorder(MomeAttention, index=1),
    }  # router logits need no hook, which would break the graphs of layers that are compiled: `forward` returns them

    def __init__(self, config: MomeConfig):
        super().__init__(config)
        self.layers = nn.ModuleList([MomeLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = _layer_norms(config, _attention_groups(config)) if config.final_norm else None
        self.position_bias = MomeRelativePositionBias(config) if config.position_embedding_type == "relative" else None
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        hidden_states: torch.Tensor,
        spans: Spans,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        joint: bool = False,
        prefix: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None = None,
        cache: Cache | None = None,
        return_key_values: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MomeEncoderOutput:
        """One pass.

        Args:
            hidden_states: (batch, tokens, width).
            spans: modality of each run of tokens, image first.
            attention_mask: as the attention implementation wants it.
            position_bias: (layers, 1 or batch, heads, tokens, keys), added to the attention scores.
            joint: from `fusion_start_layer` up, every token uses the joint experts.
            prefix: per layer, keys and values that come before these tokens: the image of a caption.
            cache: cache that prefix and tokens are written to.
            return_key_values: hand out the keys and values of these tokens, for the pass that they come before.
            kwargs: for the attention: `causal` where `attention_mask` may be `None`; `key_order` (batch, keys) by
                which prefix and tokens are put in the order of the caller's `input_ids`; `num_mask_tokens` at the
                end that are not cached.
        """
        if position_bias is not None and self.config._attn_implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"attn_implementation={self.config._attn_implementation!r} has no attention bias, which "
                "position_embedding_type='relative' needs: load the model with attn_implementation='sdpa'"
            )
        key_values, router_logits = (), ()
        for index, layer in enumerate(self.layers):
            fused = joint and self.config.fusion_start_layer is not None and index >= self.config.fusion_start_layer
            expert_spans = (("joint", hidden_states.shape[1]),) if fused else spans
            mask = attention_mask if position_bias is None else _add_bias(position_bias[index], attention_mask)
            prefix_key, prefix_value = (None, None) if prefix is None else prefix[index]
            hidden_states, key, value, logits = layer(
                hidden_states,
                prefix_key,
                prefix_value,
                mask,
                spans,
                expert_spans,
                **{CACHE_NAME: cache},  # where checkpointing looks for it
                **kwargs,
            )
            key_values += ((key, value),) if return_key_values else ()
            router_logits += (logits,) if logits is not None else ()
        return MomeEncoderOutput(
            last_hidden_state=hidden_states if self.norm is None else self.norm(hidden_states, spans),
            key_values=key_values or None,
            router_logits=router_logits or None,
        )


def _add_bias(bias: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
    return bias + mask
