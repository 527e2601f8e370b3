"""What goes into the trunk: patches and words with their places.

- `MomeImageEmbedding`: `[CLS]` and patches, or patches alone;
- `MomeTextEmbedding`: words;
- `MomeRelativePositionBias`: places as biases of the attention, VLMo's way.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_mome import MomeConfig


class MomeImageEmbedding(nn.Module):
    """Pixels (batch, channels, height, width) → (batch, image tokens, width): `[CLS]`, then patches row by row."""

    def __init__(self, config: MomeConfig):
        super().__init__()
        self.config = config
        if config.patch_embedding_type == "conv_stem":
            self.patch_embedding = self._conv_stem(config)
        else:
            self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        if config.image_cls_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        if config.image_mask_token:
            self.mask_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        if config.position_embedding_type == "absolute":
            self.position_embedding = nn.Parameter(torch.empty(1, config.num_image_tokens, config.hidden_size))
        if config.modality_embedding:
            self.modality_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout)

    @staticmethod
    def _conv_stem(config: MomeConfig) -> nn.Sequential:
        """Halves the side and doubles the channels at every stage until a patch is one position (2106.14881)."""
        stages = config.patch_size.bit_length() - 1
        widths = [config.num_channels] + [config.hidden_size // 2 ** (stages - 1 - i) for i in range(stages)]
        modules: list[nn.Module] = []
        for before, after in zip(widths, widths[1:]):
            modules += [nn.Conv2d(before, after, 3, stride=2, padding=1)]
            modules += [nn.GroupNorm(math.gcd(after, 8), after), nn.GELU()]
        return nn.Sequential(*modules[:-2])

    def forward(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> torch.Tensor:
        config = self.config
        batch, side, patch = pixel_values.shape[0], config.grid_size, config.patch_size
        pixel_values = pixel_values[:, :, : side * patch, : side * patch]  # with `crop_image` there may be more
        if config.patch_embedding_type == "conv_stem":
            pixel_values = pixel_values.to(self.patch_embedding[0].weight.dtype)
            patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        else:
            pixel_values = pixel_values.to(self.patch_embedding.weight.dtype)
            # (batch, channels, rows, patch, columns, patch) → (batch, rows · columns, channels · patch · patch)
            patches = pixel_values.reshape(batch, config.num_channels, side, patch, side, patch)
            patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, side * side, -1)
            patches = self.patch_embedding(patches)
        if bool_masked_pos is not None:
            patches = torch.where(bool_masked_pos[..., None].bool(), self.mask_token.to(patches.dtype), patches)
        hidden_states = patches
        if config.image_cls_token:
            hidden_states = torch.cat([self.cls_token.to(patches.dtype).expand(batch, -1, -1), patches], dim=1)
        if config.position_embedding_type == "absolute":
            hidden_states = hidden_states + self.position_embedding
        if config.modality_embedding:
            hidden_states = hidden_states + self.modality_embedding
        return self.dropout(hidden_states)


class MomeTextEmbedding(nn.Module):
    """Token ids and their positions in the text (batch, tokens) → (batch, tokens, width)."""

    def __init__(self, config: MomeConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding, self.modality_embedding, self.norm = None, None, None
        if config.position_embedding_type == "absolute":
            self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.modality_embedding:
            self.modality_embedding = nn.Parameter(torch.empty(config.hidden_size))
        if config.text_embedding_norm:
            self.norm = nn.LayerNorm(config.hidden_size, eps=1e-12)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        hidden_states = inputs_embeds
        if self.position_embedding is not None:
            hidden_states = hidden_states + self.position_embedding(position_ids)
        if self.norm is not None:
            hidden_states = self.norm(hidden_states)
        if self.modality_embedding is not None:
            hidden_states = hidden_states + self.modality_embedding
        return self.dropout(hidden_states)


class MomeRelativePositionBias(nn.Module):
    """VLMo's table of attention biases: a row per distance, a column per layer and head.

    Rows, in order: the (2·side − 1)² offsets between two patches; `[CLS]` to patch, patch to `[CLS]`, `[CLS]` to
    itself; text to image, image to text; the offsets between two words; `[BOS]` to word, word to `[BOS]`, `[BOS]`
    to itself (`VLMo.build_relative_position_embed` in unilm `vlmo/modules/vlmo_module.py`).
    """

    def __init__(self, config: MomeConfig):
        super().__init__()
        self.config = config
        self.image_distances = (2 * config.grid_size - 1) ** 2 + 3
        distances = self.image_distances + 2 + 2 * config.max_position_embeddings
        self.table = nn.Parameter(torch.empty(distances, config.num_hidden_layers * config.num_attention_heads))

    def _image_index(self, device) -> torch.Tensor:
        """(image tokens, image tokens): the row of the table for each pair."""
        side = self.config.grid_size
        cell = torch.arange(side * side, device=device)
        row, column = cell // side, cell % side
        index = (
            (row[:, None] - row[None, :] + side - 1) * (2 * side - 1) + column[:, None] - column[None, :] + side - 1
        )
        index = F.pad(index, (1, 0, 1, 0), value=self.image_distances - 3)
        index[1:, 0] = self.image_distances - 2
        index[0, 0] = self.image_distances - 1
        return index

    def _text_index(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """(batch, queries, keys) for text positions (batch, queries) and (batch, keys); a key below 0 is an image."""
        longest = self.config.max_position_embeddings
        query, key = query_positions[:, :, None], key_positions[:, None, :].clamp(max=longest - 1)
        last = self.image_distances + 2 + 2 * longest
        index = self.image_distances + 2 + key - query + longest - 2
        index = torch.where(query == 0, last - 3, index)
        index = torch.where(key == 0, torch.where(query == 0, last - 1, last - 2), index)
        return torch.where(key < 0, self.image_distances, index)

    def _biases(self, index: torch.Tensor) -> torch.Tensor:
        """(batch, queries, keys) rows → (layers, batch, heads, queries, keys)."""
        config = self.config
        biases = F.embedding(index, self.table).unflatten(-1, (config.num_hidden_layers, config.num_attention_heads))
        return biases.permute(3, 0, 4, 1, 2)

    def image(self, device, places: torch.Tensor | None = None) -> torch.Tensor:
        """`places` (batch, tokens): those of the image's tokens that there are; `None`: all."""
        index = self._image_index(device)
        return self._biases(index[None] if places is None else index[places[:, :, None], places[:, None, :]])

    def text(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        return self._biases(self._text_index(query_positions, key_positions))

    def fused(self, position_ids: torch.Tensor) -> torch.Tensor:
        image = self._image_index(position_ids.device).expand(position_ids.shape[0], -1, -1)
        text = self._text_index(position_ids, position_ids)
        across = (image.shape[0], image.shape[1], text.shape[1])
        image_to_text = text.new_full(across, self.image_distances + 1)
        text_to_image = text.new_full(across, self.image_distances).transpose(1, 2)
        rows = [torch.cat([image, image_to_text], dim=2), torch.cat([text_to_image, text], dim=2)]
        return self._biases(torch.cat(rows, dim=1))
