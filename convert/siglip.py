"""SigLIP (2303.15343) and SigLIP 2 (2502.14786) of fixed resolution, as transformers' `SiglipModel` stores them.

Two towers of equal width are the image and the text side of the trunk, each with its own attention and feed-forward.
Images have no `[CLS]` and are pooled by attention; texts are always 64 tokens long, padding seen like words, and
pooled at the last one.
"""

from dataclasses import replace
from functools import partial

import torch
from transformers import SiglipConfig
from transformers.image_utils import PILImageResampling

from ..configuration_mome import quoted
from ..errors import ConversionError, first_sentence
from ..processing_mome import MomeProcessor
from . import operations
from .hub import CheckpointFiles, checkpoint_files
from .operations import KeyMap, Loaded, Operation, Options, Request, Sizes, Source, layers_of, square_side
from .processors import published_image_processor
from .reading import Checkpoint, open_checkpoints
from .siglip_text import load_siglip_tokenizer, siglip_token_ids, with_new_words

PROBE = "vision_model.head.probe"  # every whole SigLIP has it
TARGET = "model.encoder.layers.{}"
TOWERS = {"vision_model": "image", "text_model": "text"}
PARTS = ("weight", "bias")

KEY_MAP: KeyMap = {
    "vision_model.embeddings.patch_embedding.weight": "model.image_embedding.patch_embedding.weight",
    "vision_model.embeddings.patch_embedding.bias": "model.image_embedding.patch_embedding.bias",
    "vision_model.embeddings.position_embedding.weight": "model.image_embedding.position_embedding",
    "text_model.embeddings.token_embedding.weight": "model.text_embedding.word_embeddings.weight",
    "text_model.embeddings.position_embedding.weight": "model.text_embedding.position_embedding.weight",
    "vision_model.embeddings.position_ids": None,  # buffers of old files
    "text_model.embeddings.position_ids": None,
    PROBE: "model.image_pooling.probe",
    "logit_scale": "model.logit_scale",
    "logit_bias": "model.logit_bias",
}
for part in PARTS:
    KEY_MAP |= {
        f"vision_model.post_layernorm.{part}": f"model.encoder.norm.image.{part}",
        f"text_model.final_layer_norm.{part}": f"model.encoder.norm.text.{part}",
        f"text_model.head.{part}": f"model.text_projection.{part}",
        f"vision_model.head.attention.in_proj_{part}": (
            f"model.image_pooling.query.{part}",
            f"model.image_pooling.key_value.{part}",
        ),
        f"vision_model.head.attention.out_proj.{part}": f"model.image_pooling.output.{part}",
        f"vision_model.head.layernorm.{part}": f"model.image_pooling.norm.{part}",
        f"vision_model.head.mlp.fc1.{part}": f"model.image_pooling.up_proj.{part}",
        f"vision_model.head.mlp.fc2.{part}": f"model.image_pooling.down_proj.{part}",
    }
    KEY_MAP |= {
        f"{tower}.encoder.layers.{{}}.{name}.{part}": f"{TARGET}.{target.format(group)}.{part}"
        for tower, group in TOWERS.items()
        for name, target in {
            "layer_norm1": "attention_norm.{}",
            "self_attn.q_proj": "attention.query_key_value.{}",
            "self_attn.k_proj": "attention.query_key_value.{}",
            "self_attn.v_proj": "attention.query_key_value.{}",
            "self_attn.out_proj": "attention.output.{}",
            "layer_norm2": "feed_forward_norm.{}",
            "mlp.fc1": "feed_forward.{}.up_proj",
            "mlp.fc2": "feed_forward.{}.down_proj",
        }.items()
    }


def _new_words(tensors: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    return with_new_words(tensors[0], sizes.config["vocab_size"])


def _first_rows(tensors: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """The query of a fused projection."""
    return tensors[0][: sizes.config["hidden_size"]]


def _other_rows(tensors: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """Its key and value."""
    return tensors[0][sizes.config["hidden_size"] :]


def _scalar(tensors: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    return tensors[0].reshape(())


OPERATIONS: dict[str, Operation] = {
    "model.image_embedding.patch_embedding.weight": operations.flatten_kernel,
    "model.image_embedding.position_embedding": operations.patch_positions,
    "model.text_embedding.word_embeddings.weight": _new_words,
    "model.logit_scale": _scalar,
    "model.logit_bias": _scalar,
}
for part in PARTS:
    OPERATIONS[f"model.image_pooling.query.{part}"] = _first_rows
    OPERATIONS[f"model.image_pooling.key_value.{part}"] = _other_rows
    for group in TOWERS.values():
        OPERATIONS[f"{TARGET}.attention.query_key_value.{group}.{part}"] = operations.concatenate


def check_config(files: CheckpointFiles) -> dict:
    """The fields of `config.json`, before any weights are downloaded.

    Raises:
        ConversionError: another family, or a SigLIP that doesn't fit, with the reason.
    """
    fields = files.json(files.need("config.json"))
    what, kind = f"checkpoint {files.name}", fields.get("model_type")
    if kind in ("siglip2", "siglip2_vision_model"):
        raise ConversionError(
            f"{what} is a NaFlex SigLIP 2: its images have any number of patches, MoME's a fixed one; take one of "
            "fixed resolution, such as google/siglip2-base-patch16-224"
        )
    if kind in ("siglip_vision_model", "siglip_text_model"):
        raise ConversionError(f"{what} holds one tower of a SigLIP ({kind}): pass a whole model, with both")
    if kind != "siglip":
        raise ConversionError(f"{what} is of type {quoted(kind)}, not 'siglip': pass a SigLIP or SigLIP 2 checkpoint")
    try:
        config = SiglipConfig(text_config=fields.get("text_config"), vision_config=fields.get("vision_config"))
    except Exception as error:  # unknown or impossible values raise anything
        raise ConversionError(f"{what}: config.json describes no SigLIP: {first_sentence(error)}") from error
    _check_towers(what, config)
    return {"text": config.text_config, "vision": config.vision_config}


def _check_towers(what: str, config: SiglipConfig):
    text, vision = config.text_config, config.vision_config
    if text.hidden_size != vision.hidden_size:
        raise ConversionError(
            f"{what} does not fit one trunk: its image tower is {vision.hidden_size} wide, its text tower "
            f"{text.hidden_size} (as in siglip2-giant): base, large and so400m have equal widths"
        )
    same = "num_hidden_layers num_attention_heads intermediate_size hidden_act layer_norm_eps attention_dropout"
    for name in same.split():
        if getattr(text, name) != getattr(vision, name):
            raise ConversionError(
                f"{what} does not fit one trunk: {name} is {getattr(vision, name)} for images, {getattr(text, name)} "
                "for texts"
            )
    if text.projection_size != vision.hidden_size:
        raise ConversionError(
            f"{what} projects texts to {text.projection_size} dimensions, its images have {vision.hidden_size}"
        )
    if getattr(vision, "vision_use_head", True) is False:
        raise ConversionError(f"{what} has no attention pooling (vision_use_head=False): it embeds no images")
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(vision, name), int) or getattr(vision, name) < 1:
            raise ConversionError(
                f"{what}: {name}={getattr(vision, name)}, expected one positive number: images are square"
            )


def measure(checkpoint: Checkpoint, options: Options) -> Sizes:
    text, vision = checkpoint.settings["text"], checkpoint.settings["vision"]
    words, width = checkpoint.shape("text_model.embeddings.token_embedding.weight", 2)
    grid = square_side(checkpoint, "vision_model.embeddings.position_embedding.weight", dimensions=2, extra=0)
    patch, image_size = vision.patch_size, options.image_size or vision.image_size
    config = {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": len(layers_of(checkpoint, "text_model.encoder.layers.{}.mlp.fc1.weight")),
        "num_attention_heads": options.num_attention_heads or text.num_attention_heads,
        "hidden_act": text.hidden_act,
        "image_size": image_size,
        "patch_size": patch,
        "crop_image": bool(image_size % patch),
        "num_channels": vision.num_channels,
        "image_cls_token": False,
        "image_pooling": "attention",
        "text_pooling": "last",
        "text_start_token": False,
        "fixed_text_length": True,
        "max_position_embeddings": text.max_position_embeddings,
        "share_attention": False,
        "layer_norm_eps": text.layer_norm_eps,
        "attention_dropout": text.attention_dropout,
        "projection_dim": width,
        "image_projection": False,
        "projection_bias": True,
        "contrastive_objective": "sigmoid",
        "caption_experts": options.caption,
        "lm_head_transform": options.caption,
    }
    version = 2 if words > 100_000 else 1
    sizes = Sizes(config=config, grid=grid, kind=f"version {version}", absent=("tied caption head",))
    if not options.caption:
        return sizes
    return replace(sizes, absent=("caption transform",), stand_ins=_caption_copies(config["num_hidden_layers"]))


def _caption_copies(layers: int) -> dict:
    """Target of the caption group → copy of the text's."""
    targets = [target for target in KEY_MAP.values() if isinstance(target, str) and "layers" in target]
    names = {target.format(layer) for target in targets if ".text." in target for layer in range(layers)}
    names |= {f"model.encoder.norm.text.{part}" for part in PARTS}
    return {name.replace(".text", ".caption"): partial(_copy, name=name) for name in sorted(names)}


def _copy(state: dict[str, torch.Tensor], sizes: Sizes, name: str) -> torch.Tensor:
    return state[name].clone()


def load(request: Request) -> Loaded:
    """Everything of a checkpoint, the weights last."""
    files, options = checkpoint_files(request.checkpoint, request.revision), request.options
    settings = check_config(files)
    side = options.image_size or settings["vision"].image_size
    images = published_image_processor(files, settings["vision"].image_size, side)
    tokenizer = None
    if request.with_tokenizer:
        length = settings["text"].max_position_embeddings
        tokenizer = load_siglip_tokenizer(files, length, options.strip_punctuation, request.tokenizer)
    checkpoint = open_checkpoints(files.weights(), files.name)
    if PROBE not in checkpoint:
        raise ConversionError(f"checkpoint {files.name} has no {PROBE}: its weights are not those of a SigLIP")
    checkpoint.settings = settings
    sizes = measure(checkpoint, options)
    ids = siglip_token_ids(tokenizer, sizes.config["vocab_size"])
    words = max(sizes.config["vocab_size"], *(index + 1 for index in ids.values()))
    resampling = "bilinear" if images.resample == PILImageResampling.BILINEAR else "bicubic"
    sizes = replace(sizes, config=sizes.config | {"vocab_size": words}, resampling=resampling)
    return Loaded(checkpoint, sizes, ids, images if tokenizer is None else MomeProcessor(images, tokenizer))


SOURCE = Source(
    name="SigLIP",
    key_map=KEY_MAP,
    measure=measure,
    load=load,
    operations=OPERATIONS,
    tokenizer_hint="spiece.model or tokenizer.json, published with the checkpoints",
    paper="2303.15343",
    citation="""@inproceedings{siglip,
  title     = {Sigmoid Loss for Language Image Pre-Training},
  author    = {Zhai, Xiaohua and Mustafa, Basil and Kolesnikov, Alexander and Beyer, Lucas},
  booktitle = {ICCV},
  year      = {2023}
}""",
    license="apache-2.0",
    origin="published by Google under the Apache License 2.0; see the card of the checkpoint",
)
