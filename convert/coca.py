"""CoCa (2205.01917) as open_clip trained it: `open_clip/coca_model.py` and `transformer.py`.

The widths and depths are in the shapes, the numbers of heads are not: they come from `open_clip_config.json`, or are
those of the published model of the same width.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..configuration_coca import COCA_SIZES, CocaConfig
from ..configuration_mome import quoted, shortened
from ..errors import ConversionError, first_sentence
from ..processing_mome import MomeProcessor
from . import operations
from .operations import KeyMap, Operation, Sizes, layers_of, square_side
from .reading import Checkpoint

CONFIG_FILE = "open_clip_config.json"
SIGNATURE = "text_decoder.cross_attn.0.ln_1_kv.weight"

PARTS = ("weight", "bias")
BLOCK = {"ln_1": "attention_norm", "ln_2": "feed_forward_norm", "mlp.c_fc": "feed_forward.up_proj"}
BLOCK |= {"mlp.c_proj": "feed_forward.down_proj", "attn.out_proj": "attention.output"}
CROSS_BLOCK = {key: f"cross_{target}" for key, target in BLOCK.items()} | {"ln_1_kv": "image_norm"}
NORMS = {
    "visual.ln_pre": "model.image_embedding.norm",
    "visual.ln_post": "model.image_pooler.norm",
    "visual.attn_pool.ln_q": "model.image_pooler.query_norm",
    "visual.attn_pool.ln_k": "model.image_pooler.patch_norm",
    "visual.attn_pool.attn.out_proj": "model.image_pooler.attention.output",
    "text.ln_final": "model.text_norm",
    "text_decoder.ln_final": "decoder.norm",
}
POOLER, CROSS = "model.image_pooler.attention", "decoder.layers.{}.cross_attention"

KEY_MAP: KeyMap = {
    "logit_scale": "model.logit_scale",
    "visual.class_embedding": "model.image_embedding.cls_token",
    "visual.positional_embedding": "model.image_embedding.position_embedding",
    "visual.conv1.weight": "model.image_embedding.patch_embedding.weight",
    "visual.attn_pool.query": "model.image_pooler.query",
    "visual.attn_pool.attn.in_proj_bias": (f"{POOLER}.query.bias", f"{POOLER}.key_value.bias"),
    "visual.proj": "model.image_projection.weight",
    "text.cls_emb": "model.text_embedding.cls_token",
    "text.positional_embedding": "model.text_embedding.position_embedding",
    "text.token_embedding.weight": "model.text_embedding.word_embeddings.weight",
    "text.text_projection": "model.text_projection.weight",
    "text_decoder.text_projection": "lm_head.weight",
    "text.attn_mask": None,  # what older files keep is made anew
    "text_decoder.attn_mask": None,
}
KEY_MAP |= {f"{key}.{part}": f"{target}.{part}" for key, target in NORMS.items() for part in PARTS}
for stack, target in (
    ("visual.transformer.resblocks.{}", "model.image_encoder.layers.{}"),
    ("text.transformer.resblocks.{}", "model.text_encoder.layers.{}"),
    ("text_decoder.resblocks.{}", "decoder.layers.{}"),
):
    KEY_MAP |= {f"{stack}.attn.in_proj_{part}": f"{target}.attention.query_key_value.{part}" for part in PARTS}
    KEY_MAP |= {f"{stack}.{key}.{part}": f"{target}.{name}.{part}" for key, name in BLOCK.items() for part in PARTS}
KEY_MAP |= {
    f"text_decoder.cross_attn.{{}}.{key}.{part}": f"decoder.layers.{{}}.{name}.{part}"
    for key, name in CROSS_BLOCK.items()
    for part in PARTS
}
KEY_MAP |= {
    f"text_decoder.cross_attn.{{}}.attn.in_proj_{part}": (f"{CROSS}.query.{part}", f"{CROSS}.key_value.{part}")
    for part in PARTS
}
# The pooler's matrices: apart where the image is of another width than the queries, as in both published models.
APART: KeyMap = {
    "visual.attn_pool.attn.q_proj_weight": f"{POOLER}.query.weight",
    "visual.attn_pool.attn.k_proj_weight": f"{POOLER}.key_value.weight",
    "visual.attn_pool.attn.v_proj_weight": f"{POOLER}.key_value.weight",
}
TOGETHER: KeyMap = {"visual.attn_pool.attn.in_proj_weight": (f"{POOLER}.query.weight", f"{POOLER}.key_value.weight")}


def transpose(tensors: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """(in, out) → (out, in)"""
    return tensors[0].T


def scalar(tensors: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    return tensors[0].reshape(())


def query_part(tensors: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """Query, key and value one below the other → the query."""
    return tensors[0][: tensors[0].shape[0] // 3].clone()


def key_value_part(tensors: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """Query, key and value one below the other → key and value."""
    return tensors[0][tensors[0].shape[0] // 3 :].clone()


OPERATIONS: dict[str, Operation] = {
    "model.logit_scale": scalar,
    "model.image_embedding.patch_embedding.weight": operations.flatten_kernel,
    "model.image_projection.weight": transpose,
    "model.text_projection.weight": transpose,
    "lm_head.weight": transpose,
} | {
    f"{attention}.{name}.{part}": operation
    for attention in (POOLER, CROSS)
    for name, operation in (("query", query_part), ("key_value", key_value_part))
    for part in PARTS
}


# ------------------------------------------------------------------------------------------------ open_clip's config

# What the parts of the config may say, beside sizes and numbers of heads: anything else would be another architecture.
SIZED = {
    "image_size",
    "layers",
    "width",
    "patch_size",
    "head_width",
    "mlp_ratio",
    "context_length",
    "vocab_size",
    "heads",
}
SIZED |= {"attn_pooler_queries", "n_queries", "attn_pooler_heads", "pad_id", "eos_id", "correct_cls_mask", "dim_head"}
MAY_BE_0 = {"pad_id", "eos_id"}
FIXED = {
    "attentional_pool": True,
    "embed_cls": True,
    "output_tokens": True,
    "pool_type": "tok",
    "ls_init_value": None,
    "no_ln_pre": False,
    "no_causal_mask": False,
    "proj_bias": False,
    "proj_type": "linear",
    "patch_dropout": 0.0,
    "hf_model_name": None,
    "timm_model_name": None,
}
# How open_clip prepares images for its published models, where the config says it.
PREPARED = {"mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest"}
IGNORED = {"use_pad_mask", "hf_tokenizer_name", "tokenizer_kwargs", "pos_embed_type", "final_ln_after_pool"}


@dataclass(frozen=True)
class UpstreamConfig:
    """`open_clip_config.json`, or one of open_clip's `model_configs`.

    Attributes:
        path: the file.
        model: `embed_dim`, `vision_cfg`, `text_cfg`, `multimodal_cfg`.
        preprocessing: `mean`, `std` and the like; may be empty. As in the model, what is null is left out.
    """

    path: Path
    model: dict
    preprocessing: dict

    def part(self, name: str) -> dict:
        return self.model[name]


def read_config(path: Path) -> UpstreamConfig:
    """Raises ConversionError: no such file, one that can't be read, or of another architecture."""
    names = "vision_cfg", "text_cfg", "multimodal_cfg"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model = dict(content.get("model_cfg", content).items())
        preprocessing = _said(content.get("preprocess_cfg") or {})
        model |= {name: _said(model[name]) for name in names}
    except FileNotFoundError:
        raise ConversionError(f"config {shortened(path)} does not exist: pass open_clip's {CONFIG_FILE}") from None
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        reason = f"it has no {quoted(error.args[0])}" if isinstance(error, KeyError) else first_sentence(error)
        raise ConversionError(f"config {path} is not that of an open_clip CoCa: {reason}") from error
    for name in names:
        for key, value in model[name].items():
            if key in FIXED and value != FIXED[key]:
                raise ConversionError(f"config {path}: {name} has {key}={quoted(value)}, which no published CoCa has")
            if key not in FIXED and key not in SIZED and key not in IGNORED:
                raise ConversionError(f"config {path}: {name} has {key}={quoted(value)}, which is not known")
            if key in SIZED and not _is_size(key, value):
                raise ConversionError(f"config {path}: {name} has {key}={quoted(value)}, expected a positive number")
    for key, value in preprocessing.items():
        if value != PREPARED.get(key, value):
            raise ConversionError(
                f"config {path}: preprocess_cfg has {key}={quoted(value)}, only {PREPARED[key]!r} is supported"
            )
    return UpstreamConfig(path, model, preprocessing)


def _said(part: dict) -> dict:
    return {key: value for key, value in part.items() if value is not None}


def _is_size(key: str, value) -> bool:
    if key == "correct_cls_mask":
        return isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, (int, float) if key == "mlp_ratio" else int):
        return False
    return value > 0 or (value == 0 and key in MAY_BE_0)


def _heads_of(config: UpstreamConfig, vision_width: int) -> dict:
    vision, text, decoder = (config.part(name) for name in ("vision_cfg", "text_cfg", "multimodal_cfg"))
    filler = text.get("pad_id", 0)
    return {
        "vision_num_attention_heads": vision_width // vision.get("head_width", 64),
        "pooler_num_attention_heads": vision.get("attn_pooler_heads", 8),
        "text_num_attention_heads": text.get("heads", 8),
        "decoder_num_attention_heads": decoder.get("heads", 8),
        "correct_cls_mask": bool(text.get("correct_cls_mask", False)),
        "filler_token_id": filler,
        "hidden_act": "quick_gelu" if config.model.get("quick_gelu") else "gelu",
    }


def _published_heads(checkpoint: Checkpoint, vision_width: int, width: int) -> dict:
    for sizes in COCA_SIZES.values():
        if (sizes["vision_hidden_size"], sizes["hidden_size"]) == (vision_width, width):
            return {key: value for key, value in sizes.items() if key.endswith("_heads")}
    raise ConversionError(
        f"checkpoint {checkpoint.path} has widths {vision_width} and {width}, which no published CoCa has: pass "
        f"--config {CONFIG_FILE}, which tells the numbers of attention heads"
    )


# -------------------------------------------------------------------------------------------------------- the sizes


def measure(checkpoint: Checkpoint, upstream: UpstreamConfig | None) -> Sizes:
    """The sizes in the shapes, and what they don't tell from the config."""
    shape, layer = checkpoint.shape, "{}.resblocks.{{}}.ln_1.weight"
    vision_width, channels, _, patch = shape("visual.conv1.weight", 4)
    grid = square_side(checkpoint, "visual.positional_embedding", dimensions=2, extra=1)
    vocabulary, width = shape("text.token_embedding.weight", 2)
    stacks = {"vision": "visual.transformer", "text": "text.transformer", "decoder": "text_decoder"}
    config = {
        "vocab_size": vocabulary,
        "image_size": grid * patch,
        "patch_size": patch,
        "num_channels": channels,
        "vision_hidden_size": vision_width,
        "pooler_num_queries": shape("visual.attn_pool.query", 2)[0],
        "hidden_size": width,
        "max_position_embeddings": shape("text.positional_embedding", 2)[0] - 1,
        "projection_dim": shape("visual.proj", 2)[1],
    }
    for name, stack in stacks.items():
        config[f"{name}_num_hidden_layers"] = len(layers_of(checkpoint, layer.format(stack)))
        config[f"{name}_intermediate_size"] = shape(f"{stack}.resblocks.0.mlp.c_fc.weight", 2)[0]
    if upstream is None:
        config |= _published_heads(checkpoint, vision_width, width)
    else:
        _check_sizes(checkpoint, upstream, config)
        config |= _heads_of(upstream, vision_width)
    return Sizes(config=config, grid=grid, kind="contrastive captioner")


def _check_sizes(checkpoint: Checkpoint, upstream: UpstreamConfig, config: dict):
    """The config is that of another model if it has other sizes."""
    for part, names in {
        "vision_cfg": {"width": "vision_hidden_size", "layers": "vision_num_hidden_layers", "patch_size": "patch_size"}
        | {"image_size": "image_size", "attn_pooler_queries": "pooler_num_queries"},
        "text_cfg": {"width": "hidden_size", "layers": "text_num_hidden_layers", "vocab_size": "vocab_size"}
        | {"context_length": "max_position_embeddings"},
        "multimodal_cfg": {"width": "hidden_size", "layers": "decoder_num_hidden_layers", "vocab_size": "vocab_size"}
        | {"context_length": "max_position_embeddings"},
    }.items():
        for key, name in names.items():
            said = upstream.part(part).get(key)
            if said is not None and said != config[name]:
                raise ConversionError(
                    f"config {upstream.path} is not that of {checkpoint.path}: {part} has {key}={said}, the shapes "
                    f"say {config[name]}"
                )
    if (said := upstream.model.get("embed_dim")) not in (None, config["projection_dim"]):
        raise ConversionError(
            f"config {upstream.path} is not that of {checkpoint.path}: embed_dim={said}, the shapes say "
            f"{config['projection_dim']}"
        )
    for key, count in (("mean", config["num_channels"]), ("std", config["num_channels"])):
        values = upstream.preprocessing.get(key, [1] * count)
        numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
        if not numbers or len(values) != count or (key == "std" and not all(value > 0 for value in values)):
            raise ConversionError(
                f"config {upstream.path}: preprocess_cfg has {key}={quoted(values)}, expected {count} numbers"
                + (" above 0" if key == "std" else "")
            )
    said, side = upstream.preprocessing.get("size"), config["image_size"]
    if said not in (None, side, [side, side]):
        raise ConversionError(f"config {upstream.path}: preprocess_cfg has size={said}, the shapes say {side}")


def layout_of(checkpoint: Checkpoint) -> tuple[KeyMap, dict[str, Operation]]:
    """Key map and operations, by how the file has the pooler's matrices."""
    if "visual.attn_pool.attn.in_proj_weight" in checkpoint:
        return KEY_MAP | TOGETHER, OPERATIONS
    apart = {f"{POOLER}.key_value.weight": operations.concatenate}
    return KEY_MAP | APART, {key: each for key, each in OPERATIONS.items() if key != f"{POOLER}.query.weight"} | apart


# -------------------------------------------------------------------------------------------------------- processor


def build_processor(config: CocaConfig, tokenizer, upstream: UpstreamConfig | None):
    """CLIP's images: the shorter side resized, the centre cropped; without a tokenizer, images alone."""
    from transformers import CLIPImageProcessor  # not above: without torchvision its import comes with a remark

    said = {} if upstream is None else upstream.preprocessing
    side = config.image_size
    images = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=said.get("mean", OPENAI_CLIP_MEAN),
        image_std=said.get("std", OPENAI_CLIP_STD),
    )
    return images if tokenizer is None else MomeProcessor(images, tokenizer)
