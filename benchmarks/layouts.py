"""Layouts of the published files of BEiT-3, VLMo and CoCa, for any size, and random weights in them."""

import math

import torch

# Published sizes; 224 pixels, patch 16.
BEIT3 = {
    "base": {"width": 768, "inner": 3072, "layers": 12},
    "large": {"width": 1024, "inner": 4096, "layers": 24},
}
VLMO = {
    "base": {"width": 768, "inner": 3072, "layers": 12, "heads": 12, "joint": 10},
    "base_plus": {"width": 544, "inner": 2176, "layers": 24, "heads": 16, "joint": 21, "relative": False},
    "large": {"width": 1024, "inner": 4096, "layers": 24, "heads": 16, "joint": 21},
}

# open_clip's model configs, without what only repeats these; 224 pixels.
COCA = {
    "base": {"vision_width": 768, "vision_layers": 12, "patch": 32, "width": 512, "layers": 12, "head_dim": 64},
    "large": {"vision_width": 1024, "vision_layers": 24, "patch": 14, "width": 768, "layers": 12, "head_dim": 64},
}


def _affine(name: str, outputs: int, inputs: int | None = None) -> dict[str, tuple[int, ...]]:
    """Weight and bias of a linear layer, or of a norm without `inputs`."""
    return {f"{name}.weight": (outputs,) if inputs is None else (outputs, inputs), f"{name}.bias": (outputs,)}


def beit3_shapes(
    width: int,
    inner: int,
    layers: int,
    vocab: int = 64010,
    image: int = 224,
    patch: int = 16,
    texts: int = 1024,
    kind: str = "retrieval",
) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a BEiT-3 file; `kind`: retrieval, captioning, pretraining, imagenet, vqa, nlvr2."""
    shapes = {
        "beit3.text_embed.weight": (vocab, width),
        "beit3.vision_embed.cls_token": (1, 1, width),
        "beit3.vision_embed.mask_token": (1, 1, width),
        "beit3.vision_embed.proj.weight": (width, 3, patch, patch),
        "beit3.vision_embed.proj.bias": (width,),
        "beit3.encoder.embed_positions.A.weight": ((image // patch) ** 2 + 3, width),
        "beit3.encoder.embed_positions.B.weight": (texts, width),
    }
    for side in "AB":
        for layer in range(layers):
            prefix = f"beit3.encoder.layers.{layer}"
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= _affine(f"{prefix}.self_attn.{name}.{side}", width, width)
            for name in ("self_attn.inner_attn_ln", "self_attn_layer_norm", "final_layer_norm"):
                shapes |= _affine(f"{prefix}.{name}.{side}", width)
            shapes |= _affine(f"{prefix}.ffn.{side}.fc1", inner, width)
            shapes |= _affine(f"{prefix}.ffn.{side}.ffn_layernorm", inner)
            shapes |= _affine(f"{prefix}.ffn.{side}.fc2", width, inner)
        if kind not in ("imagenet", "vqa"):
            shapes |= _affine(f"beit3.encoder.layer_norm.{side}", width)
    heads = {
        "retrieval": {"vision_head.weight": (width, width), "language_head.weight": (width, width), "logit_scale": ()},
        "captioning": _affine("mlm_head", vocab, width),
        "pretraining": _affine("mlm_head", vocab, width) | _affine("mim_head", 8192, width),
        "imagenet": _affine("fc_norm", width) | _affine("head", 1000, width),
        "vqa": _affine("pooler.norm", width)
        | _affine("pooler.dense", width, width)
        | _affine("head.0", 2 * width, width)
        | _affine("head.1", 2 * width)
        | _affine("head.3", 3129, 2 * width),
        "nlvr2": _affine("head.norm1", 4 * width)
        | _affine("head.dense1", 2 * width, 4 * width)
        | _affine("head.norm2", 2 * width)
        | _affine("head.dense2", 2, 2 * width),
    }
    return shapes | heads[kind]


def vlmo_shapes(
    width: int,
    inner: int,
    layers: int,
    heads: int,
    joint: int | None,
    relative: bool = True,
    vocab: int = 30522,
    image: int = 224,
    patch: int = 16,
    texts: int = 40,
    longest: int = 196,
    kind: str = "pretraining",
) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a VLMo file; `kind`: pretraining, language, retrieval, vqa, nlvr2."""
    side = image // patch
    shapes = {
        "text_embeddings.word_embeddings.weight": (vocab, width),
        "text_embeddings.position_embeddings.weight": (texts, width),
        "text_embeddings.token_type_embeddings.weight": (2, width),
        "token_type_embeddings.weight": (3 if kind == "nlvr2" else 2, width),
        "transformer.cls_token": (1, 1, width),
        "transformer.patch_embed.proj.weight": (width, 3, patch, patch),
        "transformer.patch_embed.proj.bias": (width,),
    }
    shapes |= _affine("text_embeddings.LayerNorm", width) | _affine("transformer.norm", width)
    if relative:
        shapes["relative_position_bias_table"] = ((2 * side - 1) ** 2 + 5 + 2 * longest, heads * layers)
    else:
        shapes["transformer.pos_embed"] = (1, side * side + 1, width)
    for layer in range(layers):
        prefix = f"transformer.blocks.{layer}"
        shapes |= {f"{prefix}.attn.{name}_bias": (width,) for name in "qv"}
        shapes |= {f"{prefix}.attn.qkv.weight": (3 * width, width)} | _affine(f"{prefix}.attn.proj", width, width)
        shapes |= _affine(f"{prefix}.norm1", width)
        if relative:
            shapes |= {f"{prefix}.gamma_{branch}": (width,) for branch in "12"}
        for expert in ("text", "imag", "vl") if joint is not None and layer >= joint else ("text", "imag"):
            shapes |= _affine(f"{prefix}.norm2_{expert}", width)
            shapes |= _affine(f"{prefix}.mlp_{expert}.fc1", inner, width)
            shapes |= _affine(f"{prefix}.mlp_{expert}.fc2", width, inner)
    shapes |= _affine("pooler.dense", width, width)
    projections = {f"itc_{modality}_proj.fc.weight": (width, width) for modality in ("text", "image")}
    projections["logit_scale"] = ()
    joint_projections = {f"itc_vl_{modality}_proj.fc.weight": (width, width) for modality in ("text", "image")}
    joint_projections["logit_vl_scale"] = ()
    masked_lm = _affine("mlm_score.transform.dense", width, width) | _affine("mlm_score.transform.LayerNorm", width)
    masked_lm |= {"mlm_score.decoder.weight": (vocab, width), "mlm_score.bias": (vocab,)}
    tails = {
        "pretraining": projections | joint_projections | masked_lm | _affine("itm_score.fc", 2, width),
        "language": masked_lm,
        "retrieval": projections,
        "vqa": _affine("vqa_classifier.0", 2 * width, width)
        | _affine("vqa_classifier.1", 2 * width)
        | _affine("vqa_classifier.3", 3129, 2 * width),
        "nlvr2": _affine("nlvr2_classifier.0", 2 * width, 2 * width)
        | _affine("nlvr2_classifier.1", 2 * width)
        | _affine("nlvr2_classifier.3", 2, 2 * width),
    }
    return shapes | tails[kind]


def coca_shapes(
    vision_width: int,
    vision_layers: int,
    patch: int,
    width: int,
    layers: int,
    vocab: int = 49408,
    image: int = 224,
    texts: int = 76,
    queries: int = 256,
) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of an open_clip CoCa."""
    shapes = {
        "logit_scale": (),
        "visual.class_embedding": (vision_width,),
        "visual.positional_embedding": ((image // patch) ** 2 + 1, vision_width),
        "visual.proj": (width, width),
        "visual.conv1.weight": (vision_width, 3, patch, patch),
        "visual.attn_pool.query": (queries, width),
        "visual.attn_pool.attn.in_proj_bias": (3 * width,),
        "text.cls_emb": (width,),
        "text.positional_embedding": (texts + 1, width),
        "text.text_projection": (width, width),
        "text.token_embedding.weight": (vocab, width),
        "text_decoder.text_projection": (width, vocab),
    }
    if vision_width == width:
        shapes["visual.attn_pool.attn.in_proj_weight"] = (3 * width, width)
    else:
        pooler = {"q": width, "k": vision_width, "v": vision_width}
        shapes |= {f"visual.attn_pool.attn.{name}_proj_weight": (width, each) for name, each in pooler.items()}
    shapes |= _affine("visual.attn_pool.attn.out_proj", width, width)
    norms = {"visual.ln_pre": vision_width, "visual.attn_pool.ln_k": vision_width, "visual.attn_pool.ln_q": width}
    norms |= {"visual.ln_post": width, "text.ln_final": width, "text_decoder.ln_final": width}
    for name, size in norms.items():
        shapes |= _affine(name, size)
    stacks = [
        ("visual.transformer.resblocks", vision_width, vision_layers),
        ("text.transformer.resblocks", width, layers),
    ]
    for stack, size, depth in (
        *stacks,
        *((f"text_decoder.{each}", width, layers) for each in ("resblocks", "cross_attn")),
    ):
        for prefix in (f"{stack}.{layer}" for layer in range(depth)):
            shapes |= {f"{prefix}.attn.in_proj_weight": (3 * size, size), f"{prefix}.attn.in_proj_bias": (3 * size,)}
            shapes |= _affine(f"{prefix}.attn.out_proj", size, size)
            shapes |= _affine(f"{prefix}.mlp.c_fc", 4 * size, size) | _affine(f"{prefix}.mlp.c_proj", size, 4 * size)
            for name in ("ln_1", "ln_2", *(("ln_1_kv",) if stack.endswith("cross_attn") else ())):
                shapes |= _affine(f"{prefix}.{name}", size)
    return shapes


def coca_config(
    vision_width: int,
    vision_layers: int,
    patch: int,
    width: int,
    layers: int,
    head_dim: int = 64,
    **others: int,
) -> dict:
    """`open_clip_config.json` of such a file; all heads are of `head_dim`, the pooler has 8 as published."""
    text = {"context_length": others.get("texts", 76), "vocab_size": others.get("vocab", 49408), "width": width}
    text |= {"heads": width // head_dim, "layers": layers}
    vision = {"image_size": others.get("image", 224), "patch_size": patch, "width": vision_width}
    vision |= {"layers": vision_layers, "head_width": head_dim, "attentional_pool": True, "output_tokens": True}
    vision |= {"attn_pooler_heads": 8, "attn_pooler_queries": others.get("queries", 256)}
    model = {"embed_dim": width, "vision_cfg": vision, "multimodal_cfg": {**text, "attn_pooler_heads": 8}}
    return {"model_cfg": model | {"text_cfg": {**text, "embed_cls": True, "output_tokens": True}}}


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0, scale: float = 0.02) -> dict[str, torch.Tensor]:
    """Random tensors of these shapes, norms around 1 and everything else around 0."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for key, shape in shapes.items():
        tensor = torch.empty(shape).normal_(0, scale, generator=generator)
        if key == "logit_scale" or key == "logit_vl_scale":
            tensor = tensor + math.log(1 / 0.07)
        elif key.endswith(".weight") and len(shape) == 1 or ".gamma_" in key:
            tensor = tensor + 1
        state[key] = tensor
    return state
