"""BEiT-3, VLMo and CoCa written out over upstream state dicts, for sizes that no golden checkpoint has.

Plain functions, slow and independent of the package; `test_convert_sizes.py` holds them against the golden outputs.
"""

import torch
from torch.nn import functional as F

State = dict[str, torch.Tensor]


def norm(states: torch.Tensor, sd: State, name: str, eps: float) -> torch.Tensor:
    return F.layer_norm(states, states.shape[-1:], sd[f"{name}.weight"], sd[f"{name}.bias"], eps)


def linear(states: torch.Tensor, sd: State, name: str) -> torch.Tensor:
    return F.linear(states, sd[f"{name}.weight"], sd.get(f"{name}.bias"))


def attend(query, key, value, heads: int, bias: torch.Tensor) -> torch.Tensor:
    """(batch, tokens, width) each, bias broadcast to (batch, heads, tokens, tokens)."""
    query, key, value = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key, value))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + bias
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)


def patches_of(pixels: torch.Tensor, sd: State, name: str) -> torch.Tensor:
    kernel = sd[f"{name}.weight"]
    return F.conv2d(pixels, kernel, sd[f"{name}.bias"], stride=kernel.shape[-1]).flatten(2).transpose(1, 2)


def layers_in(sd: State, marker: str) -> int:
    return 1 + max(int(key.split(marker)[1].split(".")[0]) for key in sd if marker in key)


def beit3(sd: State, heads: int, pixels=None, ids=None, mask=None, causal: bool = False) -> torch.Tensor:
    """States of an image, a text or both, the image first; `causal`: a text token sees the image and what precedes."""
    parts, seen = {}, []
    if pixels is not None:
        image = patches_of(pixels, sd, "beit3.vision_embed.proj")
        image = torch.cat([sd["beit3.vision_embed.cls_token"].expand(len(image), -1, -1), image], dim=1)
        parts["A"] = image + sd["beit3.encoder.embed_positions.A.weight"][2 : 2 + image.shape[1]]
        seen.append(torch.ones(image.shape[:2]))
    if ids is not None:
        mask = torch.ones_like(ids) if mask is None else mask
        text = sd["beit3.text_embed.weight"][ids]
        text = text + sd["beit3.encoder.embed_positions.B.weight"][2 : 2 + ids.shape[1]]
        parts["B"] = text * mask[..., None]
        seen.append(mask)
    bias = torch.where(torch.cat(seen, dim=1)[:, None, None, :] == 0, -1e9, 0.0)
    if causal:
        images, tokens = parts["A"].shape[1], parts["A"].shape[1] + parts["B"].shape[1]
        row, column = torch.arange(tokens)[:, None], torch.arange(tokens)
        bias = bias + torch.where((column < images) | ((row >= images) & (column <= row)), 0.0, -1e9)

    lengths = [part.shape[1] for part in parts.values()]
    for index in range(layers_in(sd, "encoder.layers.")):
        prefix = f"beit3.encoder.layers.{index}"
        normed = {side: norm(x, sd, f"{prefix}.self_attn_layer_norm.{side}", 1e-5) for side, x in parts.items()}
        query, key, value = (
            torch.cat([linear(x, sd, f"{prefix}.self_attn.{name}_proj.{side}") for side, x in normed.items()], dim=1)
            for name in "qkv"
        )
        attended = attend(query, key, value, heads, bias).split(lengths, dim=1)
        for (side, x), states in zip(list(parts.items()), attended):
            states = norm(states, sd, f"{prefix}.self_attn.inner_attn_ln.{side}", 1e-5)
            parts[side] = x + linear(states, sd, f"{prefix}.self_attn.out_proj.{side}")
        for side, x in parts.items():
            inner = norm(x, sd, f"{prefix}.final_layer_norm.{side}", 1e-5)
            inner = F.gelu(linear(inner, sd, f"{prefix}.ffn.{side}.fc1"))
            inner = norm(inner, sd, f"{prefix}.ffn.{side}.ffn_layernorm", 1e-5)
            parts[side] = x + linear(inner, sd, f"{prefix}.ffn.{side}.fc2")
    if "beit3.encoder.layer_norm.A.weight" in sd:
        parts = {side: norm(x, sd, f"beit3.encoder.layer_norm.{side}", 1e-5) for side, x in parts.items()}
    return torch.cat(list(parts.values()), dim=1)


def vlmo_rows(side: int, words: int, longest: int) -> torch.Tensor:
    """(words + 1 + patches, the same): row of the bias table for each pair, the text first."""
    image, every = (2 * side - 1) ** 2 + 3, (2 * side - 1) ** 2 + 5 + 2 * longest
    tokens = [("text", index) for index in range(words)] + [("image", index) for index in range(side * side + 1)]

    def row(query: tuple[str, int], key: tuple[str, int]) -> int:
        (kind, i), (other, j) = query, key
        if kind != other:
            return image if kind == "text" else image + 1
        end = every if kind == "text" else image
        if i == 0 or j == 0:
            return end - (1 if i == j else 3 if i == 0 else 2)
        if kind == "text":
            return image + 2 + (j - i) + longest - 2
        (y, x), (v, u) = divmod(i - 1, side), divmod(j - 1, side)
        return (y - v + side - 1) * (2 * side - 1) + x - u + side - 1

    return torch.tensor([[row(query, key) for key in tokens] for query in tokens])


def vlmo(
    sd: State, heads: int, side: int, pixels=None, ids=None, mask=None, joint_from: int | None = None
) -> torch.Tensor:
    """States of an image of side · side patches, a text or both, the text first; joint experts from a layer on."""
    parts, seen, kinds = [], [], []
    types = sd["token_type_embeddings.weight"]
    if ids is not None:
        text = (
            sd["text_embeddings.word_embeddings.weight"][ids] + sd["text_embeddings.token_type_embeddings.weight"][0]
        )
        if "relative_position_bias_table" not in sd:
            text = text + sd["text_embeddings.position_embeddings.weight"][: ids.shape[1]]
        parts.append(norm(text, sd, "text_embeddings.LayerNorm", 1e-12) + types[0])
        seen.append(torch.ones_like(ids) if mask is None else mask)
        kinds.append("text")
    if pixels is not None:
        image = patches_of(pixels, sd, "transformer.patch_embed.proj")
        image = torch.cat([sd["transformer.cls_token"].expand(len(image), -1, -1), image], dim=1)
        parts.append(image + sd.get("transformer.pos_embed", 0) + types[1])
        seen.append(torch.ones(image.shape[:2]))
        kinds.append("imag")
    lengths = [part.shape[1] for part in parts]
    x = torch.cat(parts, dim=1)
    depth = layers_in(sd, "transformer.blocks.")
    bias = torch.where(torch.cat(seen, dim=1)[:, None, None, :] == 0, -1e9, 0.0)
    table = sd.get("relative_position_bias_table")
    if table is not None:
        words, longest = 0 if ids is None else ids.shape[1], (table.shape[0] - 5 - (2 * side - 1) ** 2) // 2
        rows = vlmo_rows(side, words, longest)[: x.shape[1], : x.shape[1]]  # without an image, the text comes first
        table = table[rows].permute(2, 0, 1).unflatten(0, (depth, heads))
    for index in range(depth):
        prefix = f"transformer.blocks.{index}"
        normed = norm(x, sd, f"{prefix}.norm1", 1e-6)
        query, key, value = F.linear(normed, sd[f"{prefix}.attn.qkv.weight"]).chunk(3, dim=-1)
        query, value = query + sd[f"{prefix}.attn.q_bias"], value + sd[f"{prefix}.attn.v_bias"]
        scores = bias if table is None else bias + table[index]
        states = linear(attend(query, key, value, heads, scores), sd, f"{prefix}.attn.proj")
        x = x + sd.get(f"{prefix}.gamma_1", 1) * states
        fused = joint_from is not None and index >= joint_from
        experts = [("vl", x)] if fused else list(zip(kinds, x.split(lengths, dim=1)))
        states = [
            linear(
                F.gelu(linear(norm(part, sd, f"{prefix}.norm2_{kind}", 1e-6), sd, f"{prefix}.mlp_{kind}.fc1")),
                sd,
                f"{prefix}.mlp_{kind}.fc2",
            )
            for kind, part in experts
        ]
        x = x + sd.get(f"{prefix}.gamma_2", 1) * torch.cat(states, dim=1)
    return norm(x, sd, "transformer.norm", 1e-6)


def coca_block(x: torch.Tensor, sd: State, prefix: str, heads: int, bias: torch.Tensor, source=None) -> torch.Tensor:
    """open_clip's `ResidualAttentionBlock`; with a `source`, queries look at that in place of themselves."""
    queries = norm(x, sd, f"{prefix}.ln_1", 1e-5)
    keys = queries if source is None else norm(source, sd, f"{prefix}.ln_1_kv", 1e-5)
    matrices, biases = (sd[f"{prefix}.attn.in_proj_{part}"].chunk(3) for part in ("weight", "bias"))
    query, key, value = (F.linear(s, w, b) for s, w, b in zip((queries, keys, keys), matrices, biases))
    x = x + linear(attend(query, key, value, heads, bias), sd, f"{prefix}.attn.out_proj")
    inner = linear(norm(x, sd, f"{prefix}.ln_2", 1e-5), sd, f"{prefix}.mlp.c_fc")
    return x + linear(F.gelu(inner), sd, f"{prefix}.mlp.c_proj")


def coca_image(sd: State, pixels: torch.Tensor, heads: int, pooler_heads: int) -> torch.Tensor:
    """(images, queries, width): the pooled image."""
    kernel = sd["visual.conv1.weight"]
    x = F.conv2d(pixels, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([sd["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1) + sd["visual.positional_embedding"]
    x = norm(x, sd, "visual.ln_pre", 1e-5)
    for index in range(layers_in(sd, "visual.transformer.resblocks.")):
        x = coca_block(x, sd, f"visual.transformer.resblocks.{index}", heads, torch.zeros(()))
    pool = "visual.attn_pool"
    if f"{pool}.attn.in_proj_weight" in sd:
        matrices = sd[f"{pool}.attn.in_proj_weight"].chunk(3)
    else:
        matrices = [sd[f"{pool}.attn.{name}_proj_weight"] for name in "qkv"]
    queries = norm(sd[f"{pool}.query"], sd, f"{pool}.ln_q", 1e-5).expand(len(x), -1, -1)
    source, biases = norm(x, sd, f"{pool}.ln_k", 1e-5), sd[f"{pool}.attn.in_proj_bias"].chunk(3)
    query, key, value = (F.linear(s, w, b) for s, w, b in zip((queries, source, source), matrices, biases))
    x = linear(attend(query, key, value, pooler_heads, torch.zeros(())), sd, f"{pool}.attn.out_proj")
    return norm(x, sd, "visual.ln_post", 1e-5)


def coca_text(sd: State, ids: torch.Tensor, heads: int, correct_cls_mask: bool = False) -> torch.Tensor:
    """(texts, tokens + 1, width), [CLS] last; shorter texts than the table are not filled up here."""
    x = torch.cat([sd["text.token_embedding.weight"][ids], sd["text.cls_emb"].expand(len(ids), 1, -1)], dim=1)
    x = x + sd["text.positional_embedding"][: x.shape[1]]
    row, column = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])
    valid = F.pad(ids != 0, (0, 1) if correct_cls_mask else (1, 0), value=True)
    bias = torch.where((column <= row) & valid[:, None, None, :], 0.0, -torch.inf)
    for index in range(layers_in(sd, "text.transformer.resblocks.")):
        x = coca_block(x, sd, f"text.transformer.resblocks.{index}", heads, bias)
    return x


def coca(
    sd: State, heads: dict[str, int], pixels: torch.Tensor, ids: torch.Tensor, correct_cls_mask: bool = False
) -> dict[str, torch.Tensor]:
    """Embeddings of images and texts (filled up with 0), and next-token logits.

    `heads`: those of `vision`, `pooler`, `text` and `decoder`.
    """
    image = coca_image(sd, pixels, heads["vision"], heads["pooler"])
    text = coca_text(sd, ids, heads["text"], correct_cls_mask)
    x, causal = text[:, :-1], torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
    for index in range(layers_in(sd, "text_decoder.resblocks.")):
        x = coca_block(x, sd, f"text_decoder.resblocks.{index}", heads["decoder"], causal)
        prefix = f"text_decoder.cross_attn.{index}"
        x = coca_block(x, sd, prefix, heads["decoder"], torch.zeros(()), image[:, 1:])
    cls = norm(text[:, -1], sd, "text.ln_final", 1e-5) @ sd["text.text_projection"]
    return {
        "image_embeds": F.normalize(image[:, 0] @ sd["visual.proj"], dim=-1),
        "text_embeds": F.normalize(cls, dim=-1),
        "logits": norm(x, sd, "text_decoder.ln_final", 1e-5) @ sd["text_decoder.text_projection"],
    }
