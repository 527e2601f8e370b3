"""VLMo (2111.02358): unilm `vlmo/vlmo/modules/`.

Attention and the norms around it are shared; `text`, `imag` and `vl` experts are our `text`, `image` and `joint`. Base
and large have one table of relative position biases and layer scale, base-plus absolute positions and neither. The
answering and reasoning heads are dropped, and so are tables that only repeat how positions are counted.
"""

import math

from ..errors import ConversionError
from . import operations
from .operations import (
    KeyMap,
    Operation,
    Options,
    Sizes,
    Source,
    absent_heads,
    default_heads,
    layers_of,
    square_side,
)
from .reading import Checkpoint

LAYER, TARGET = "transformer.blocks.{}", "model.encoder.layers.{}"
TABLE, TEXT_POSITIONS = "relative_position_bias_table", "text_embeddings.position_embeddings.weight"
HEADS = {544: 16}  # base-plus: by width, where heads are not of 64 dimensions
INITIAL_TEXT_LENGTH = 196  # of the relative position tables of all published models

KEY_MAP: KeyMap = {
    "text_embeddings.word_embeddings.weight": "model.text_embedding.word_embeddings.weight",
    "text_embeddings.token_type_embeddings.weight": "model.text_embedding.word_embeddings.weight",
    TEXT_POSITIONS: "model.text_embedding.position_embedding.weight",
    "text_embeddings.LayerNorm.weight": "model.text_embedding.norm.weight",
    "text_embeddings.LayerNorm.bias": "model.text_embedding.norm.bias",
    "text_embeddings.position_ids": None,
    "text_embeddings.token_type_ids": None,
    "token_type_embeddings.weight": (
        "model.text_embedding.modality_embedding",
        "model.image_embedding.modality_embedding",
    ),
    "transformer.cls_token": "model.image_embedding.cls_token",
    "transformer.pos_embed": "model.image_embedding.position_embedding",
    "transformer.patch_embed.proj.weight": "model.image_embedding.patch_embedding.weight",
    "transformer.patch_embed.proj.bias": "model.image_embedding.patch_embedding.bias",
    "transformer.norm.weight": "model.encoder.norm.shared.weight",
    "transformer.norm.bias": "model.encoder.norm.shared.bias",
    TABLE: "model.encoder.position_bias.table",
    "relative_position_index": None,
    "text_relative_position_index": None,
    "text_imag_relative_position_index": None,
    f"{LAYER}.attn.qkv.weight": f"{TARGET}.attention.query_key_value.shared.weight",
    f"{LAYER}.attn.q_bias": f"{TARGET}.attention.query_key_value.shared.bias",
    f"{LAYER}.attn.v_bias": f"{TARGET}.attention.query_key_value.shared.bias",
    f"{LAYER}.gamma_1": f"{TARGET}.attention_scale",
    f"{LAYER}.gamma_2": f"{TARGET}.feed_forward_scale",
    "itc_image_proj.fc.weight": "model.image_projection.weight",
    "itc_text_proj.fc.weight": "model.text_projection.weight",
    "itc_vl_image_proj.fc.weight": "model.joint_projection.image_projection.weight",
    "itc_vl_text_proj.fc.weight": "model.joint_projection.text_projection.weight",
    "logit_scale": "model.logit_scale",
    "logit_vl_scale": "model.joint_projection.logit_scale",
    "pooler.dense.weight": "model.multimodal_pooler.dense.weight",
    "pooler.dense.bias": "model.multimodal_pooler.dense.bias",
    "itm_score.fc.weight": "model.matching_head.weight",
    "itm_score.fc.bias": "model.matching_head.bias",
    "mlm_score.transform.dense.weight": "lm_head.transform.0.weight",
    "mlm_score.transform.dense.bias": "lm_head.transform.0.bias",
    "mlm_score.transform.LayerNorm.weight": "lm_head.transform.2.weight",
    "mlm_score.transform.LayerNorm.bias": "lm_head.transform.2.bias",
    "mlm_score.decoder.weight": "lm_head.decoder.weight",
    "mlm_score.bias": "lm_head.decoder.bias",
    "vqa_classifier.*": None,
    "nlvr2_classifier.*": None,
}
KEY_MAP |= {
    f"{LAYER}.{name}.{part}": f"{TARGET}.{target}.{part}"
    for name, target in {
        "norm1": "attention_norm.shared",
        "attn.proj": "attention.output.shared",
        "norm2_text": "feed_forward_norm.text",
        "norm2_imag": "feed_forward_norm.image",
        "norm2_vl": "feed_forward_norm.joint",
        "mlp_text.fc1": "feed_forward.text.up_proj",
        "mlp_text.fc2": "feed_forward.text.down_proj",
        "mlp_imag.fc1": "feed_forward.image.up_proj",
        "mlp_imag.fc2": "feed_forward.image.down_proj",
        "mlp_vl.fc1": "feed_forward.joint.up_proj",
        "mlp_vl.fc2": "feed_forward.joint.down_proj",
    }.items()
    for part in ("weight", "bias")
}

OPERATIONS: dict[str, Operation] = {
    "model.text_embedding.word_embeddings.weight": operations.fold_token_type,
    "model.text_embedding.modality_embedding": operations.row(0),
    "model.image_embedding.modality_embedding": operations.row(1),
    "model.image_embedding.position_embedding": operations.image_positions(0),
    "model.image_embedding.patch_embedding.weight": operations.flatten_kernel,
    "model.encoder.position_bias.table": operations.relative_positions,
    f"{TARGET}.attention.query_key_value.shared.bias": operations.with_zero_key_bias,
}


def measure(checkpoint: Checkpoint, options: Options) -> Sizes:
    vocabulary, width = checkpoint.shape("text_embeddings.word_embeddings.weight", 2)
    _, channels, _, patch = checkpoint.shape("transformer.patch_embed.proj.weight", 4)
    layers = len(layers_of(checkpoint, f"{LAYER}.mlp_imag.fc1.weight"))
    joint = layers_of(checkpoint, f"{LAYER}.mlp_vl.fc1.weight")
    text_length, relative, notes = checkpoint.shape(TEXT_POSITIONS, 2)[0], TABLE in checkpoint, ()
    if relative:
        grid, longest, notes = _sizes_of_table(checkpoint, patch, text_length, options.checkpoint_image_size)
        heads = _heads_of_table(checkpoint, layers, options.num_attention_heads)
    else:
        grid, longest = square_side(checkpoint, "transformer.pos_embed", dimensions=3, extra=1), text_length
        heads = options.num_attention_heads or HEADS.get(width) or default_heads(width)
    embeddings = "itc_image_proj.fc.weight" in checkpoint or "itc_text_proj.fc.weight" in checkpoint
    masked_lm = "mlm_score.decoder.weight" in checkpoint
    config = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": checkpoint.shape(f"{LAYER.format(0)}.mlp_imag.fc1.weight", 2)[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": options.image_size or grid * patch,
        "patch_size": patch,
        "num_channels": channels,
        "max_position_embeddings": longest,
        "position_embedding_type": "relative" if relative else "absolute",
        "text_embedding_norm": True,
        "modality_embedding": True,
        "fusion_start_layer": joint[0] if joint else None,
        "layer_scale_init_value": 0.1 if f"{LAYER.format(0)}.gamma_1" in checkpoint else None,
        "projection_dim": checkpoint.shape("itc_image_proj.fc.weight", 2)[0] if embeddings else width,
        "joint_projection": "itc_vl_image_proj.fc.weight" in checkpoint,
        "multimodal_pooler": "pooler.dense.weight" in checkpoint,
        "matching_head": "itm_score.fc.weight" in checkpoint,
        "caption_objective": "masked",
        "lm_head_transform": masked_lm,
        "tie_word_embeddings": not (masked_lm or options.caption),
    }
    if masked_lm:
        notes += ("the caption head was trained on masked words of whole texts: fine-tune it before captioning",)
    return Sizes(
        config=config,
        grid=grid,
        kind=_kind(checkpoint),
        text_length=text_length,
        dropped=(TEXT_POSITIONS,) if relative else (),
        absent=absent_heads(embeddings, masked_lm, options),
        notes=notes,
    )


def _sizes_of_table(
    checkpoint: Checkpoint, patch: int, text_length: int, image_size: int | None
) -> tuple[int, int, tuple[str, ...]]:
    """Patches along a side, longest text, and what had to be guessed.

    The table has (2·side − 1)² + 3 rows for an image, 2 across and 2·longest for a text. That leaves several pairs,
    unless the file tells one of the two: its index of the image's pairs, its training settings, the user, the length
    of all published models.
    """
    rows = checkpoint.shape(TABLE, 2)[0]
    pairs = {}
    for side in range(1, math.isqrt(rows) // 2 + 2):
        left = rows - 5 - (2 * side - 1) ** 2
        if left % 2 == 0 and left // 2 >= text_length:
            pairs[side] = left // 2
    known = image_size or checkpoint.settings.get("image_size")
    if "relative_position_index" in checkpoint:
        known = patch * math.isqrt(max(checkpoint.shape("relative_position_index", 2)[0] - 1, 0))
    if isinstance(known, int) and (known % patch or known // patch not in pairs):
        fitting = ", ".join(str(side * patch) for side in pairs) or "none"
        raise ConversionError(
            f"checkpoint {checkpoint.path}: {TABLE} of {rows} rows fits images of {fitting} pixels, not {known}"
        )
    if not pairs:
        raise ConversionError(
            f"checkpoint {checkpoint.path}: {TABLE} of {rows} rows is too small for texts of {text_length} tokens"
        )
    if isinstance(known, int):
        return known // patch, pairs[known // patch], ()
    for side, longest in pairs.items():
        if longest == INITIAL_TEXT_LENGTH:
            return side, longest, ()
    side = max(pairs)  # the shortest text that fits: tables hardly reach beyond what was trained
    if len(pairs) == 1:
        return side, pairs[side], ()
    others = ", ".join(str(other * patch) for other in pairs if other != side)
    note = (
        f"took the checkpoint for one of {side * patch} pixels; {others} would fit too: --checkpoint-image-size tells"
    )
    return side, pairs[side], (note,)


def _heads_of_table(checkpoint: Checkpoint, layers: int, given: int | None) -> int:
    columns = checkpoint.shape(TABLE, 2)[1]
    if layers == 0 or columns % layers:
        raise ConversionError(f"checkpoint {checkpoint.path}: {TABLE} has {columns} columns for {layers} layers")
    if given not in (None, columns // layers):
        raise ConversionError(
            f"--num-attention-heads {given} does not fit {TABLE}, which has columns for {columns // layers} heads"
        )
    return columns // layers


def _kind(checkpoint: Checkpoint) -> str:
    marks = {
        "vqa_classifier.0.weight": "visual question answering",
        "nlvr2_classifier.0.weight": "visual reasoning",
        "itm_score.fc.weight": "pretraining",
        "itc_image_proj.fc.weight": "retrieval",
        "mlm_score.bias": "language pretraining",
    }
    return next((kind for key, kind in marks.items() if key in checkpoint), "trunk")


SOURCE = Source(
    name="VLMo",
    key_map=KEY_MAP,
    measure=measure,
    operations=OPERATIONS,
    vocab_size=30522,
    special_tokens={"pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102, "mask_token_id": 103},
    other_special_tokens={"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    tokenizer_files=("vocab.txt", "tokenizer.json"),
    tokenizer_hint="vocab.txt of google-bert/bert-base-uncased",
    paper="2111.02358",
    citation="""@inproceedings{vlmo,
  title     = {{VLMo}: Unified Vision-Language Pre-Training with Mixture-of-Modality-Experts},
  author    = {Bao, Hangbo and Wang, Wenhui and Dong, Li and Liu, Qiang and Mohammed, Owais Khan and
               Aggarwal, Kriti and Som, Subhojit and Piao, Songhao and Wei, Furu},
  booktitle = {NeurIPS},
  year      = {2022}
}""",
    license="mit",
)
