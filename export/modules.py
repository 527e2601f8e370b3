"""The parts of a model that are exported, as modules with plain tensors for inputs and outputs.

    pixel_values ─ ImageTower ─ image_embeds
                       └─ present.{layer}.key, .value: what the image's tokens leave in the cache ─┐
                                                                                                   │
                    ┌─ past_key_values.{layer}.key, .value ────────────────────────────────────────┤
    input_ids ──────┴─ CaptionStep ─ logits of the next token                                      │
    attention_mask ──┘      └─ present.{layer}.key, .value: the cache and these tokens ────────────┘

    input_ids, attention_mask ─ TextTower ─ text_embeds

One `CaptionStep` serves the prompt and every token after it: its first cache is the image's. Batch, tokens and cache
are dynamic; nothing but the sizes of the model is fixed.

CoCa's image has no place among the tokens. `CocaImageTower` gives what the decoder's layers look at,
`present.{layer}.encoder.key` and `.value`, which stays as it is; what `CocaCaptionStep` gives starts empty and grows:
keys and values of both stacks, and `present.filler`, which tells the filler from words.

So for both, who writes captions starts with what the image's file gives, and with nothing where it gives nothing,
takes over what each step gives, and has in `attention_mask` a place for all that has grown.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from ..captioning_mome import MomeCache
from ..configuration_coca import CocaConfig
from ..configuration_mome import quoted

KeyValues = tuple[tuple[torch.Tensor, torch.Tensor], ...]
ANY = Dim.DYNAMIC(min=1)  # a size that may be anything


def key_value_names(prefix: str, layers: int) -> tuple[str, ...]:
    """`past_key_values` or `present` → the names of keys and values, layer by layer."""
    return tuple(f"{prefix}.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value"))


def coca_image_names(prefix: str, config: CocaConfig) -> tuple[str, ...]:
    """Names of the image's keys and values, which the layers of a CoCa's decoder look at."""
    first, layers = config.text_num_hidden_layers, config.decoder_num_hidden_layers
    return tuple(
        f"{prefix}.{layer}.encoder.{kind}" for layer in range(first, first + layers) for kind in ("key", "value")
    )


class Exportable(nn.Module):
    """A part of a model that can be exported.

    Attributes:
        input_names, output_names: of the tensors, pairs of keys and values taken apart, in order.
    """

    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    def sample_inputs(self) -> tuple:
        """Arguments of `forward` to trace it with: sizes apart from each other, none of them 1."""
        raise NotImplementedError

    def dynamic_shapes(self, named: bool = False) -> tuple:
        """What of the sample inputs may have another size, in their order.

        Args:
            named: by name, as torch.onnx takes them, instead of as `torch.export.Dim`.
        """
        raise NotImplementedError

    def to_program(self) -> ExportedProgram:
        """The graph: `.module()` of it is called as `forward` is, `torch.export.save` writes it.

        Raises:
            torch.export's own errors: for what a graph can't hold.
        """
        self.eval()
        with torch.no_grad():
            return torch.export.export(self, self.sample_inputs(), dynamic_shapes=self.dynamic_shapes(), strict=False)

    def to_onnx(self, opset_version: int = 20):
        """The graph as a `torch.onnx.ONNXProgram`, whose `.save(path)` writes it. Needs onnx and onnxscript."""
        self.eval()
        with torch.no_grad(), attention_written_out(self):
            return torch.onnx.export(
                self,
                self.sample_inputs(),
                dynamo=True,
                verbose=False,
                input_names=list(self.input_names),
                output_names=list(self.output_names),
                dynamic_shapes=self.dynamic_shapes(named=True),
                opset_version=opset_version,
            )


@contextmanager
def attention_written_out(module: nn.Module) -> Iterator[None]:
    """Within it attention is `softmax(q kᵀ) v` and no more, which an ONNX runtime has products for.

    torch exports SDPA with a product of all keys and their scale, which a caption step would repeat for the whole
    cache, and with copies of them.
    """
    configs = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    implementations = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = implementations[key]


def _check_family(part: Exportable, model: nn.Module, *families: str):
    """Raises ValueError for a model of another family than these."""
    kind = type(model.config).model_type
    if kind not in families:
        raise ValueError(f"{type(part).__name__} takes {' and '.join(families)} models, this one is {quoted(kind)}")


class ImageTower(Exportable):
    """Pixels (images, channels, image_size, image_size) → embeddings (images, projection_dim), L2-normalised.

    Args:
        model: a `MomeModel` or `CocaModel`.
        key_values: also return, per layer, keys and values (images, heads, image tokens, head_dim): the cache that a
            `CaptionStep` starts from. Of a CoCa a `CocaImageTower` returns them.
    """

    def __init__(self, model: nn.Module, key_values: bool = False):
        super().__init__()
        _check_family(self, model, *(["mome"] if key_values else ["mome", "coca"]))
        self.model, self.key_values = model, key_values
        self.input_names, self.output_names = ("pixel_values",), ("image_embeds",)
        if key_values:
            self.output_names += key_value_names("present", model.config.num_hidden_layers)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, KeyValues]:
        options = {"return_key_values": True} if self.key_values else {}
        image = self.model.image_pass(pixel_values, **options)
        image_embeds = self.model.project_image(image.last_hidden_state)
        return (image_embeds, image.key_values) if self.key_values else image_embeds

    def sample_inputs(self) -> tuple[torch.Tensor]:
        config, weight = self.model.config, self.model.text_projection.weight
        return (weight.new_zeros(3, config.num_channels, config.image_size, config.image_size),)

    def dynamic_shapes(self, named: bool = False) -> tuple:
        return ({0: "images" if named else ANY},)


class CocaImageTower(ImageTower):
    """As `ImageTower`, of a captioner: also, per layer of the decoder, keys and values (images, heads, queries but the
    first, head_dim), which every `CocaCaptionStep` looks at.

    Args:
        captioner: a `CocaForConditionalGeneration`.
    """

    def __init__(self, captioner: nn.Module):
        super().__init__(captioner.model)
        _check_family(self, captioner, "coca")
        self.decoder = captioner.decoder
        self.output_names += coca_image_names("present", captioner.config)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, KeyValues]:
        states = self.model.image_pass(pixel_values).last_hidden_state
        return self.model.project_image(states), self.decoder.keys_and_values(states)


class TextTower(Exportable):
    """Token ids and mask (texts, tokens), both int64 → embeddings (texts, projection_dim), L2-normalised.

    Args:
        model: a `MomeModel` or `CocaModel`.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        _check_family(self, model, "mome", "coca")
        self.model = model
        self.input_names, self.output_names = ("input_ids", "attention_mask"), ("text_embeds",)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model.get_text_features(input_ids, attention_mask).pooler_output

    def sample_inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = min(7, self.model.config.max_position_embeddings)
        device = self.model.text_projection.weight.device
        input_ids = torch.full((3, tokens), self.model.config.bos_token_id, device=device)
        return input_ids, torch.ones_like(input_ids)

    def dynamic_shapes(self, named: bool = False) -> tuple:
        shape = {0: "texts", 1: "tokens"} if named else dict.fromkeys((0, 1), ANY)
        return shape, dict(shape)


class BothTowers(Exportable):
    """Pixels, token ids and mask → what `MomeModel` gives: each image with each text; see the two towers.

    Returns of `forward`: `logits_per_image` (images, texts), `logits_per_text` (texts, images), `text_embeds` and
    `image_embeds`.

    Args:
        model: a `MomeModel` or `CocaModel`.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.image, self.text = ImageTower(model), TextTower(model)
        self.input_names = self.image.input_names + self.text.input_names
        self.output_names = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")

    def forward(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        image_embeds, text_embeds = self.image(pixel_values), self.text(input_ids, attention_mask)
        logits = self.image.model.similarity(image_embeds, text_embeds)
        return logits, logits.T, text_embeds, image_embeds

    def sample_inputs(self) -> tuple[torch.Tensor, ...]:
        pixel_values, ids = self.image.sample_inputs()[0], self.text.sample_inputs()
        return torch.cat([pixel_values] * 2)[:5], *ids  # five images, three texts

    def dynamic_shapes(self, named: bool = False) -> tuple:
        return self.image.dynamic_shapes(named) + self.text.dynamic_shapes(named)


class CaptionStep(Exportable):
    """The next token of captions: the tokens of a prompt, or the one that was chosen last, behind a cache.

    Args:
        captioner: a `MomeForConditionalGeneration`.

    Arguments of `forward`:
        input_ids: (batch, tokens) int64: `[BOS]` or another prompt, padded on the left; then one token at a time.
        attention_mask: (batch, cached + tokens) int64: 1 for the image and every token, 0 for padding.
        past_key_values: per layer, keys and values (batch, heads, cached, head_dim): those that `ImageTower` returns
            for the first call, then those of the call before.

    Returns:
        logits (batch, 1, vocabulary) of the token that follows the last one, and the keys and values to go on with.
    """

    def __init__(self, captioner: nn.Module):
        super().__init__()
        _check_family(self, captioner, "mome")
        self.captioner = captioner
        layers = captioner.config.num_hidden_layers
        self.input_names = ("input_ids", "attention_mask", *key_value_names("past_key_values", layers))
        self.output_names = ("logits", *key_value_names("present", layers))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past_key_values: KeyValues
    ) -> tuple[torch.Tensor, KeyValues]:
        cache = MomeCache.holding(self.captioner.config, past_key_values)
        outputs = self.captioner(
            input_ids, attention_mask=attention_mask, cache=cache, use_cache=True, logits_to_keep=1
        )
        return outputs.logits, tuple((layer.keys, layer.values) for layer in cache.layers)

    def sample_inputs(self) -> tuple[torch.Tensor, torch.Tensor, KeyValues]:
        config, weight = self.captioner.config, self.captioner.model.text_projection.weight
        cached = config.num_image_tokens + 2
        input_ids = torch.full((3, 4), config.bos_token_id, device=weight.device)
        heads = config.num_attention_heads
        states = weight.new_zeros(3, heads, cached, config.hidden_size // heads)
        key_values = tuple((states.clone(), states.clone()) for _ in range(config.num_hidden_layers))
        return input_ids, input_ids.new_ones(3, cached + 4), key_values

    def dynamic_shapes(self, named: bool = False) -> tuple:
        names = ("batch", "tokens", "cached", "cached + tokens")
        batch, tokens, cached, seen = names if named else (ANY,) * 4
        states = {0: batch, 2: cached}
        key_values = tuple((dict(states), dict(states)) for _ in range(self.captioner.config.num_hidden_layers))
        return {0: batch, 1: tokens}, {0: batch, 1: seen}, key_values


class CocaCaptionStep(Exportable):
    """As `CaptionStep`, of a CoCa.

    Args:
        captioner: a `CocaForConditionalGeneration`.

    Arguments of `forward`:
        input_ids: (batch, tokens) int64: `[BOS]` or another prompt, padded on the left; then one token at a time.
        attention_mask: (batch, cached + tokens) int64: 1 for every token, 0 for padding.
        past_key_values: per layer of the text encoder and then of the decoder, keys and values (batch, heads, cached,
            head_dim): of no tokens for the first call, then those of the call before.
        filler: (batch, 1, cached, 1), not 0 where a token is the filler; of no tokens for the first call.
        image_key_values: what `CocaImageTower` returns.

    Returns:
        logits (batch, 1, vocabulary) of the token that follows the last one; keys, values and filler to go on with.
    """

    def __init__(self, captioner: nn.Module):
        super().__init__()
        _check_family(self, captioner, "coca")
        self.captioner, config = captioner, captioner.config
        self.layers = config.text_num_hidden_layers + config.decoder_num_hidden_layers
        past, present = (
            (*key_value_names(prefix, self.layers), f"{prefix}.filler") for prefix in ("past_key_values", "present")
        )
        image = coca_image_names("past_key_values", config)
        self.input_names = ("input_ids", "attention_mask", *past, *image)
        self.output_names = ("logits", *present)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: KeyValues,
        filler: torch.Tensor,
        image_key_values: KeyValues,
    ) -> tuple[torch.Tensor, KeyValues, torch.Tensor]:
        torch._check(image_key_values[0][0].shape[0] == input_ids.shape[0])  # one image a row
        cache = MomeCache.holding(self.captioner.config, (*past_key_values, (filler, filler)))
        # By index: a graph would take the length of a mask as it comes for that of two sizes of at least 2.
        seen = torch.arange(filler.shape[2] + input_ids.shape[1], device=input_ids.device)
        attention_mask = attention_mask[:, seen]
        positions = (attention_mask.cumsum(dim=1)[:, -input_ids.shape[1] :] - 1).clamp(min=0)
        words = input_ids, None, positions, attention_mask
        _, caption = self.captioner.caption_pass(*words, image_key_values, cache)
        logits = self.captioner.lm_head(caption.last_hidden_state[:, -1:])
        *layers, marks = ((layer.keys, layer.values) for layer in cache.layers)
        return logits, tuple(layers), marks[0]

    def sample_inputs(self) -> tuple[torch.Tensor, torch.Tensor, KeyValues, torch.Tensor, KeyValues]:
        config, weight = self.captioner.config, self.captioner.lm_head.weight

        def states(heads: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
            keys = weight.new_zeros(3, heads, tokens, config.hidden_size // heads)
            return keys, keys.clone()

        input_ids = torch.full((3, 4), config.bos_token_id, device=weight.device)
        heads = [config.text_num_attention_heads] * config.text_num_hidden_layers
        decoder_heads = [config.decoder_num_attention_heads] * config.decoder_num_hidden_layers
        key_values = tuple(states(each, 2) for each in heads + decoder_heads)
        image = tuple(states(each, config.pooler_num_queries - 1) for each in decoder_heads)
        return input_ids, input_ids.new_ones(3, 6), key_values, weight.new_zeros(3, 1, 2, 1), image

    def dynamic_shapes(self, named: bool = False) -> tuple:
        names = ("batch", "tokens", "cached", "cached + tokens")
        batch, tokens, cached, seen = names if named else (ANY, ANY, Dim.DYNAMIC, ANY)
        states, image = {0: batch, 2: cached}, {0: batch}
        key_values = tuple((dict(states), dict(states)) for _ in range(self.layers))
        images = tuple((dict(image), dict(image)) for _ in range(self.captioner.config.decoder_num_hidden_layers))
        return {0: batch, 1: tokens}, {0: batch, 1: seen}, key_values, states, images
