"""The caption pass: where image and caption are, who sees whom, and what `generate()` starts from.

- `MomeCache`: keys and values of an image and its caption, with room to grow;
- `MomeStaticLayer`: a layer of transformers' static cache that may go with weights as constants;
- `CaptionInputs`, `CaptionContext`: one call's tokens as the trunk wants them (image first, then text), and the way
  back;
- `additive_mask`: a mask as numbers;
- `extend_mask`: the rows and columns of the `[MASK]` tokens of the masked caption objective;
- `start_captions`: `[BOS]` before captions, for models whose texts have none;
- `prepare_prompt`: a prompt as `generate()` wants it: image tokens, padding on the left, no `[EOS]`.

`input_ids` comes in three layouts (P padding, I image token, w text), the cache in the same order:

    I I I w w w      what generate() makes: sliced
    P P I I I w      image tokens behind padding: gathered, and put back before the cache
    w w w            text only: the image, if there is one, comes before it
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer
from transformers.masking_utils import create_causal_mask

from .compatibility_mome import is_exporting
from .configuration_mome import MomeConfig
from .inputs_mome import check_positions, check_rows_of_mask, check_text_positions, text_mask
from .outputs_mome import MomeEncoderOutput


class MomeCacheLayer(DynamicLayer):
    """A growing layer whose buffers have room for the next tokens.

    `DynamicLayer` copies the whole cache for every token, which at 200 image tokens costs more than the attention.
    `keys` and `values` are views of the buffers, so that cropping and the like work as inherited: what such a method
    leaves behind is either still such a view or is taken as a new start.
    """

    room = 64
    buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (batch, heads, tokens, head_dim) and return all keys and values so far."""
        # A buffer that is written to again has no gradient, and a graph can't ask where in memory a tensor lies.
        if key_states.requires_grad or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        length = past + key_states.shape[2]
        if not self._has_room_for(length):
            shape = (*key_states.shape[:2], length + self.room, key_states.shape[3])
            self.buffers = key_states.new_empty(shape), value_states.new_empty(shape)
            if past:
                self.buffers[0][:, :, :past], self.buffers[1][:, :, :past] = self.keys, self.values
        self.buffers[0][:, :, past:length], self.buffers[1][:, :, past:length] = key_states, value_states
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor):
        """Give each beam the cache of the beam that it goes on from; the room behind it holds nothing to be copied."""
        length = self.get_seq_length()
        if not self._has_room_for(length):
            return super().reorder_cache(beam_idx)
        index, reordered = beam_idx.to(self.buffers[0].device), []
        for buffer in self.buffers:
            target = buffer.new_empty(index.shape[0], *buffer.shape[1:])
            torch.index_select(buffer[:, :, :length], 0, index, out=target[:, :, :length])
            reordered.append(target)
        self.buffers = tuple(reordered)
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)

    def _has_room_for(self, length: int) -> bool:
        """Whether `keys` still is a view of the buffer's start, and the buffer is long enough."""
        if self.buffers is None or not self.get_seq_length():
            return False
        buffer = self.buffers[0]
        is_view = self.keys.data_ptr() == buffer.data_ptr() and self.keys.shape[0] == buffer.shape[0]
        return is_view and length <= buffer.shape[2]


class MomeCache(DynamicCache):
    """Keys and values of an image and its caption; `num_image_tokens` of them are the image's."""

    def __init__(self, config: MomeConfig):
        super().__init__(config=config)
        self.layers = [MomeCacheLayer() for _ in range(config.num_hidden_layers)]
        self.num_image_tokens = 0

    @classmethod
    def holding(cls, config: MomeConfig, key_values: tuple[tuple[torch.Tensor, torch.Tensor], ...]) -> "MomeCache":
        """A cache that has seen an image and what came after it.

        Args:
            key_values: per layer, keys and values (batch, heads, tokens, head_dim), those of the image first, as
                `image_pass(…, return_key_values=True)` gives them.
        """
        cache = cls(config)
        for layer, (keys, values) in zip(cache.layers, key_values, strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        cache.num_image_tokens = config.num_image_tokens
        return cache


class MomeStaticLayer(StaticLayer):
    """A layer of a static cache for a CPU, whose tensors are inputs of a compiled step like all others.

    `StaticLayer` marks them as tensors that stay where they are, which only a GPU's graphs need. Inductor's `freezing`
    takes what is marked so for constants: captions would go on from what the cache held when the step was compiled.
    """

    @classmethod
    def in_place_of(cls, layer: StaticLayer) -> "MomeStaticLayer":
        """The same layer, whether it holds anything or not."""
        unmarked = cls(layer.max_cache_len)
        vars(unmarked).update(vars(layer))
        if layer.is_initialized:
            unmarked._unmark()
        return unmarked

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor):
        super().lazy_initialization(key_states, value_states)
        self._unmark()

    def _unmark(self):
        for name in ("keys", "values", "cumulative_length"):
            if isinstance(tensor := getattr(self, name, None), torch.Tensor):
                setattr(self, name, tensor.detach())  # of the same memory, without the mark


def cached_image_tokens(cache: Cache | None) -> int:
    """Image tokens that a cache holds: none if it was reset for another call, whatever it says."""
    tokens = getattr(cache, "num_image_tokens", 0)
    if not tokens or torch.compiler.is_compiling():
        return tokens
    return tokens if int(cache.get_seq_length()) else 0


@dataclass
class CaptionInputs:
    """What one call of the captioner was given.

    Args:
        input_ids: (batch, tokens) int64.
        inputs_embeds: (batch, tokens, width), in place of `input_ids`.
        pixel_values: (images, channels, image_size, image_size); each image may serve `batch / images` rows.
        attention_mask: (batch, tokens seen so far), 0 where padding; image tokens may be left out. `None`: padding is
            where `pad_token_id` stands at either end, in a call without a cache.
        position_ids: (batch, tokens), counting image tokens if `input_ids` or the cache holds them.
        cache: what earlier calls have seen, the image included; callers may say `past_key_values`.
        logits_to_keep: logits of the last so many tokens only, or of these positions; 0: all.
        image_tokens_in_input: whether `input_ids` holds the image tokens. `None`: look; a graph can't, so that `None`
            is `False` when compiled, with an error if there are image tokens after all, and in an export, without.
            When compiled, image tokens must come first, before any padding.
        image_tokens: of each image; fewer than `num_image_tokens` where patches were left out. `None`: all.
    """

    input_ids: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    cache: Cache | None = None
    logits_to_keep: int | torch.Tensor = 0
    image_tokens_in_input: bool | None = None
    image_tokens: int | None = None

    def find_padding(self, config: MomeConfig):
        """The mask of texts that come without one; only where a call begins them, as a later one can't tell."""
        if self.attention_mask is not None or self.input_ids is None:  # a graph can't branch on a cache's length
            return
        if self.cache is None or not self.cache.get_seq_length():
            self.attention_mask = text_mask(config, self.input_ids, None)


class CaptionContext:
    """The tokens of one call of the captioner, split into image and text.

    Attributes:
        text_ids: (batch, text tokens), or `None` if embeddings were given.
        text_embeds: (batch, text tokens, width), or `None`.
        position_ids: (batch, text tokens), position in the text, `[BOS]` is 0.
        image_tokens: tokens of the image in this call; 0 without `pixel_values`.
        text_tokens: tokens of the text in this call.
        placed: `input_ids` holds the image tokens.
        order: (batch, tokens) index of each token in `input_ids`, image first; `None` where that is the order.
        attention_mask: (batch, tokens seen so far) in the order of `input_ids`, or 4D, or `None`.
        num_image_tokens: tokens of the image in this call or in the cache.
        num_mask_tokens: `[MASK]` tokens behind the text, one for each of the last so many tokens; 0 unless the caption
            objective is `masked`.
    """

    def __init__(self, config: MomeConfig, image_embedding: torch.Tensor, inputs: CaptionInputs):
        """`image_embedding` (width,): the row of the word embedding that marks image tokens in `inputs_embeds`."""
        if (inputs.input_ids is None) == (inputs.inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds; generate() starts from [BOS] by itself")
        self.config, self.cache, self.logits_to_keep = config, inputs.cache, inputs.logits_to_keep
        tokens = inputs.inputs_embeds if inputs.input_ids is None else inputs.input_ids
        self.batch = tokens.shape[0]
        self.image_tokens, self.images, self.placed, self.order = 0, 0, False, None
        if inputs.pixel_values is not None:
            self._find_image(image_embedding, inputs)
        self.text_tokens = tokens.shape[1] - (self.image_tokens if self.placed else 0)
        self.tokens = self.text_tokens + self.image_tokens
        if not self.text_tokens:
            raise ValueError(f"input_ids of shape {tuple(tokens.shape[:2])} holds no text: start it with [BOS]")
        check_rows_of_mask(inputs.attention_mask, tokens)

        self.past_length = 0 if self.cache is None else self.cache.get_seq_length()
        self.num_image_tokens = self.image_tokens or cached_image_tokens(self.cache)
        self.attention_mask = self._widen(inputs.attention_mask)
        self.text_ids = None if inputs.input_ids is None else self.text_only(inputs.input_ids)
        self.text_embeds = None if inputs.inputs_embeds is None else self.text_only(inputs.inputs_embeds)
        self.position_ids = self._text_positions(inputs.position_ids, tokens.device)
        self.num_mask_tokens = 0
        if config.caption_objective == "masked":
            self.num_mask_tokens = min(self._last_logits, self.text_tokens) or self.text_tokens

    def _find_image(self, image_embedding: torch.Tensor, inputs: CaptionInputs):
        whole = self.config.num_image_tokens
        self.image_tokens, self.images = inputs.image_tokens or whole, inputs.pixel_values.shape[0]
        if not self.images or self.batch % self.images:
            raise ValueError(f"{self.images} images and {self.batch} texts: pass one text for each image")
        if torch.compiler.is_compiling():  # a graph can't branch on ids
            self.placed = bool(inputs.image_tokens_in_input)
            if inputs.image_tokens_in_input is None and not is_exporting():
                self._refuse_image_tokens_later(image_embedding, inputs)
        elif inputs.image_tokens_in_input is not False:
            is_image = is_image_token(self.config, image_embedding, inputs.input_ids, inputs.inputs_embeds)
            self.placed, self.order = _locate_image(self.config, is_image, inputs.attention_mask)
        if self.placed and self.image_tokens != whole:
            raise ValueError(
                f"input_ids holds the image tokens, but image_outputs has {self.image_tokens} of {whole}: leave them "
                "out of input_ids"
            )

    def _refuse_image_tokens_later(self, image_embedding: torch.Tensor, inputs: CaptionInputs):
        """For a compiled graph that takes all tokens for text: an error when it runs if not."""
        first = inputs.input_ids if inputs.inputs_embeds is None else inputs.inputs_embeds
        is_image = is_image_token(self.config, image_embedding, inputs.input_ids, inputs.inputs_embeds)
        is_run = is_image.sum(dim=1) >= min(self.config.num_image_tokens, first.shape[1])
        problem = "compiled without a look at input_ids, which hold image tokens: pass image_tokens_in_input=True"
        torch._assert_async(~is_run.any(), problem)

    @property
    def _last_logits(self) -> int:
        """How many of the last tokens are asked for; 0: all, or those of named positions."""
        return self.logits_to_keep if isinstance(self.logits_to_keep, int) else 0

    def text_only(self, tensor: torch.Tensor) -> torch.Tensor:
        """(batch, tokens in line with `input_ids`, …) → (batch, text tokens, …)."""
        if not self.image_tokens:
            return tensor
        if self.order is None:
            return tensor[:, -self.text_tokens :]
        index = self.order[:, self.image_tokens :]
        return tensor.gather(
            1, index.reshape(*index.shape, *[1] * (tensor.ndim - 2)).expand(-1, -1, *tensor.shape[2:])
        )

    def per_row(self, states: torch.Tensor) -> torch.Tensor:
        """(images, …) → (batch, …): the candidates and beams of an image share its states."""
        repeats = self.batch // self.images
        return states if repeats == 1 else states.repeat_interleave(repeats, dim=0)

    def prefix(self, image: MomeEncoderOutput | None) -> tuple[tuple[torch.Tensor, torch.Tensor], ...] | None:
        """Per layer, keys and values of the image (batch, heads, image tokens, head_dim) for every row."""
        if image is None:
            return None
        return tuple(tuple(self.per_row(states) for states in pair) for pair in image.key_values)

    @property
    def key_order(self) -> torch.Tensor | None:
        """(batch, tokens): where each token of `input_ids` stands when the image comes first."""
        return None if self.order is None else self.order.argsort(dim=1)

    def in_input_order(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, image tokens + text tokens, …) → the same in the order of `input_ids`."""
        if self.order is None:
            return states
        return states.gather(1, self.key_order[..., None].expand(-1, -1, states.shape[-1]))

    def text_mask(self) -> torch.Tensor | None:
        """(batch, text tokens): 0 where padding; `None`: no padding, or not known."""
        mask = self.attention_mask
        if mask is None or mask.ndim != 2:
            return None
        return self.text_only(mask[:, -self.tokens :])

    def causal_mask(self, like: torch.Tensor, materialise: bool) -> torch.Tensor | None:
        """The rows of the text: it sees the image and itself up to each token.

        The mask has an entry for every token of the cache, `like` gives its dtype and device. With `materialise`
        it is never `None`.
        """
        mask = create_causal_mask(
            self.config,
            like.new_empty(self.batch, self.tokens, 0),
            self.attention_mask,
            self.cache,
            allow_is_causal_skip=not (self.image_tokens or materialise),
        )
        if mask is None or mask.ndim != 4 or not self.image_tokens:
            return mask
        if self.order is None:
            return mask[:, :, -self.text_tokens :]
        rows = self.order[:, None, self.image_tokens :, None]
        return mask.expand(self.batch, -1, -1, -1).gather(2, rows.expand(-1, -1, -1, mask.shape[3]))

    def with_mask_tokens(
        self, embeds: torch.Tensor, word_embeddings: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (batch, text + [MASK] tokens, width) and positions: a [MASK] stands where the next will."""
        masks = self.num_mask_tokens
        if not masks:
            return embeds, self.position_ids
        mask_token = word_embeddings[self.config.mask_token_id].to(embeds.dtype)
        embeds = torch.cat([embeds, mask_token.expand(self.batch, masks, -1)], dim=1)
        behind = (self.position_ids[:, -masks:] + 1).clamp(max=self.config.max_position_embeddings - 1)
        return embeds, torch.cat([self.position_ids, behind], dim=1)

    def mask_and_bias(
        self, like: torch.Tensor, position_ids: torch.Tensor, bias_table: nn.Module | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Attention mask of text and `[MASK]` tokens, and their relative position bias if there is a table of them.

        Args:
            like: (batch, text tokens + [MASK] tokens, width), gives dtype and device.
            position_ids: (batch, text tokens + [MASK] tokens), as `with_mask_tokens` returns them.
            bias_table: a `MomeRelativePositionBias`.
        """
        masks = self.num_mask_tokens
        mask = self.causal_mask(like, materialise=bool(masks) or bias_table is not None)
        if masks:
            mask = self._mask_for_mask_tokens(mask)
        if bias_table is None:
            return mask, None
        key_positions = self.key_positions(mask.shape[-1] - masks)
        if masks:
            key_positions = torch.cat([key_positions, position_ids[:, -masks:]], dim=1)
        return mask, bias_table.text(position_ids, key_positions)

    def _mask_for_mask_tokens(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        masks = self.num_mask_tokens
        if mask is not None and mask.ndim == 4:
            return extend_mask(mask, masks)
        if masks > 1:  # flash attention: no mask but padding, and causal from the bottom right
            raise ValueError(
                f"attn_implementation={self.config._attn_implementation!r} can't score {masks} tokens at once with "
                "caption_objective='masked': pass logits_to_keep=1 or load the model with attn_implementation='sdpa'"
            )
        return None if mask is None else F.pad(mask, (0, masks), value=1)

    def key_positions(self, keys: int) -> torch.Tensor:
        """(batch, keys): text position of every token of cache and call, below 0 for image and left padding."""
        if self.order is None:
            row = torch.arange(self.text_tokens, device=self.position_ids.device).expand(self.batch, -1)
            row = row + self.image_tokens
        else:
            row = self.order[:, self.image_tokens :]
        # The last token that is no padding tells where in the cache position 0 of the text lies.
        mask = self.text_mask()
        counted = self.position_ids if mask is None else mask.long().cumsum(dim=1)
        last = counted.argmax(dim=1, keepdim=True)
        start = self.past_length + row.gather(1, last) - self.position_ids.gather(1, last)
        return torch.arange(keys, device=start.device) - start

    # From the passes back to the caller's tokens.

    def states_to_predict_from(self, image: MomeEncoderOutput | None, text: MomeEncoderOutput) -> torch.Tensor:
        """(batch, tokens asked for, width): with masked captions the row of a token is that of its `[MASK]`."""
        last, keep = self._last_logits, self.logits_to_keep
        # Behind the tokens, and so last, are the [MASK] tokens.
        states = text.last_hidden_state[:, -self.text_tokens :]
        only_text = 0 < last <= self.text_tokens and self.order is None
        if self.placed and not only_text:
            states = torch.cat([self.per_row(image.last_hidden_state), states], dim=1)
            states = self.in_input_order(states)
        return states[:, -last:] if isinstance(keep, int) else states[:, keep]

    def join_hidden_states(
        self, image: MomeEncoderOutput | None, text: MomeEncoderOutput
    ) -> tuple[torch.Tensor, ...] | None:
        """Per layer, (batch, image tokens + text tokens, width)."""
        if text.hidden_states is None:
            return None
        states = [None if each is None else each[:, : self.text_tokens] for each in text.hidden_states]
        if image is not None:
            pairs = zip(image.hidden_states, states)
            states = [None if t is None else torch.cat([self.per_row(i), t], dim=1) for i, t in pairs]
        return tuple(states)

    def join_attentions(
        self, image: MomeEncoderOutput | None, text: MomeEncoderOutput
    ) -> tuple[torch.Tensor, ...] | None:
        """Image rows above text rows; an image row has weight 0 for what is behind the image."""
        if text.attentions is None:
            return None
        masks = 0 if not text.attentions else text.attentions[0].shape[2] - self.text_tokens
        weights = [each[:, :, : self.text_tokens, : each.shape[3] - masks] for each in text.attentions]
        if image is not None:
            pairs = zip(image.attentions, weights)
            weights = [torch.cat([F.pad(self.per_row(i), (0, t.shape[3] - i.shape[3])), t], dim=2) for i, t in pairs]
        return tuple(weights)

    # Parts of the split.

    def _widen(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Add the image tokens that the caller's mask leaves out."""
        if mask is None or mask.ndim != 2 or not self.num_image_tokens:
            return mask
        if self.image_tokens:
            left_out = not self.placed
        else:
            left_out = mask.shape[1] == self.past_length + self.tokens - self.num_image_tokens
        return F.pad(mask, (self.num_image_tokens, 0), value=1) if left_out else mask

    def _text_positions(self, position_ids: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        if position_ids is not None:
            # As generate() counts them: image tokens included if input_ids holds them.
            counted = self.num_image_tokens if self.placed or not self.image_tokens else 0
            positions = self.text_only(position_ids.expand(self.batch, -1)[:, -self.tokens :]) - counted
            if self.attention_mask is None or self.attention_mask.ndim == 2:  # with 4D, the caller says who sees whom
                check_text_positions(positions, self.text_mask(), counted)
        elif self.attention_mask is not None and self.attention_mask.ndim == 2:
            positions = self.attention_mask.long().cumsum(dim=1)[:, -self.tokens :] - 1 - self.num_image_tokens
            positions = self.text_only(positions)
        else:
            positions = torch.arange(self.tokens, device=device) + self.past_length - self.num_image_tokens
            positions = self.text_only(positions.expand(self.batch, -1))
        if not torch.compiler.is_compiling():
            check_positions(self.config, positions, int(self.past_length) - self.num_image_tokens + self.tokens)
        return positions.clamp(min=0)


def is_image_token(
    config: MomeConfig,
    image_embedding: torch.Tensor,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
) -> torch.Tensor:
    """(batch, tokens) bool: the tokens of `input_ids` that stand for the image."""
    if not config.num_image_tokens:  # a model whose images have no places in the text
        given = inputs_embeds if input_ids is None else input_ids
        return torch.zeros(given.shape[:2], dtype=torch.bool, device=given.device)
    if input_ids is None:
        is_image = (inputs_embeds == image_embedding.to(inputs_embeds)).all(dim=-1)
    else:
        is_image = input_ids == config.image_token_id
    # Nothing keeps a model from emitting the id again: only the first ones are the image.
    return is_image & (is_image.cumsum(dim=1) <= config.num_image_tokens)


def _locate_image(
    config: MomeConfig, is_image: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[bool, torch.Tensor | None]:
    """Whether `input_ids` holds image tokens, and the order that brings them to the front if they aren't there."""
    if not is_image.any():
        return False, None
    counts, expected = is_image.sum(dim=1), config.num_image_tokens
    if (counts != expected).any():
        wrong = int(counts[counts != expected][0])
        raise ValueError(
            f"a row of input_ids holds {wrong} image tokens, an image has {expected}: leave them out, generate() and "
            "forward() put them in"
        )
    first = is_image.long().argmax(dim=1, keepdim=True)
    position = torch.arange(is_image.shape[1], device=is_image.device)
    before = position < first
    if attention_mask is not None and attention_mask.ndim == 2:
        before = before & attention_mask[:, -is_image.shape[1] :].bool()
    elif attention_mask is not None:
        before = torch.zeros_like(before)
    if before.any() or (is_image != ((position >= first) & (position < first + expected))).any():
        raise ValueError("image tokens in input_ids must stand together and before the text: only padding may precede")
    if not first.any():
        return True, None
    return True, is_image.long().argsort(dim=1, descending=True, stable=True)


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask as what is added to scores: SDPA would make it in every layer, with a wait for the device each."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)


def extend_mask(mask: torch.Tensor, num_mask_tokens: int) -> torch.Tensor:
    """Add `[MASK]` tokens for the last so many rows: each sees what its row sees, and itself; none sees them.

        w1   1 0 0        w1   1 0 0  0 0
        w2   1 1 0   →    w2   1 1 0  0 0
        w3   1 1 1        w3   1 1 1  0 0
                          M2   1 1 0  1 0
                          M3   1 1 1  0 1

    Args:
        mask: (batch, 1, rows, keys), bool (may see) or float (added to the scores).

    Returns:
        (batch, 1, rows + num_mask_tokens, keys + num_mask_tokens)
    """
    hidden, seen = (False, True) if mask.dtype == torch.bool else (torch.finfo(mask.dtype).min, 0.0)
    number = torch.arange(num_mask_tokens, device=mask.device)
    itself = torch.full((), hidden, dtype=mask.dtype, device=mask.device)
    itself = itself.masked_fill(number[:, None] == number, seen).expand(*mask.shape[:2], -1, -1)
    rows = F.pad(mask, (0, num_mask_tokens), value=hidden)
    return torch.cat([rows, torch.cat([mask[:, :, -num_mask_tokens:], itself], dim=3)], dim=2)


def start_captions(
    config: MomeConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Puts `[BOS]` before captions of a model whose texts begin without (`text_start_token`); others stay as they are.

        a cat [EOS] P  →  [BOS] a cat [EOS] P             P a cat  →  P [BOS] a cat

    Args:
        input_ids, attention_mask, labels: (batch, tokens); a row that begins with `[BOS]` or with the image gets
            padding in its place.

    Returns:
        The same, (batch, 1 + tokens).
    """
    if config.text_start_token:
        return input_ids, attention_mask, labels
    if not input_ids.shape[1]:  # the tokenizer has made nothing of an empty prompt
        start = input_ids.new_full((len(input_ids), 1), config.bos_token_id)
        return start, torch.ones_like(start), labels
    attention_mask = text_mask(config, input_ids, attention_mask)
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    first = attention_mask.argmax(dim=1, keepdim=True)
    token = input_ids.gather(1, first)
    missing = (token != config.bos_token_id) & (token != config.image_token_id)
    # Shifted by one, the place of the first token is that before it.
    ids, mask = F.pad(input_ids, (1, 0), value=config.pad_token_id), F.pad(attention_mask, (1, 0))
    ids = ids.scatter(1, first, torch.where(missing, config.bos_token_id, ids.gather(1, first)))
    mask = mask.scatter(1, first, torch.where(missing, 1, mask.gather(1, first)))
    return ids, mask, None if labels is None else F.pad(labels, (1, 0), value=-100)


def prepare_prompt(
    config: MomeConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    eos_token_ids: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Turn the text of a prompt into what a caption goes on from.

    Tokenizers end a text with `[EOS]` and pad it on the right; a caption goes on from the last word. A prompt of
    which nothing is left becomes `[BOS]`. The width stays, so that a caption starts behind as many columns as its
    prompt has.

    Args:
        input_ids: (batch, tokens), without image tokens.
        attention_mask: (batch, tokens), or `None`, see `text_mask`.
        position_ids: (batch, tokens), or `None`.

    Returns:
        (batch, tokens) ids, mask and positions, padded on the left.
    """
    if attention_mask is None:
        attention_mask = text_mask(config, input_ids, None)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        attention_mask = attention_mask * (input_ids != config.pad_token_id).any(dim=1, keepdim=True)
    ends = torch.tensor(eos_token_ids, dtype=torch.long, device=input_ids.device)
    is_eos = torch.isin(input_ids, ends) & attention_mask.bool()
    # [EOS] ends a text where no token follows it.
    following = attention_mask.flip(1).cumsum(dim=1).flip(1)
    attention_mask = attention_mask.masked_fill(is_eos & (following == 1), 0)
    width = input_ids.shape[1]
    started, mask, _ = start_captions(config, input_ids, attention_mask)
    if bool((mask.sum(dim=1) > attention_mask.sum(dim=1)).any()):
        if position_ids is not None:
            raise ValueError("position_ids for a prompt without [BOS], which is put before it: leave position_ids out")
        input_ids, attention_mask = started, mask
    order = attention_mask.long().argsort(dim=1, stable=True)
    input_ids, attention_mask = (each.gather(1, order) for each in (input_ids, attention_mask))
    if not attention_mask[:, :-width].any():  # [BOS] has the place of an [EOS]
        input_ids, attention_mask = input_ids[:, -width:], attention_mask[:, -width:]
    input_ids = input_ids.masked_fill(attention_mask == 0, config.pad_token_id)
    nothing_left = attention_mask.sum(dim=1) == 0
    input_ids[nothing_left, -1] = config.bos_token_id
    attention_mask[nothing_left, -1] = 1
    if position_ids is not None:
        position_ids = position_ids.gather(1, order)
        position_ids[nothing_left, -1] = 0
    return input_ids, attention_mask, position_ids
