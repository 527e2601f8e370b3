"""BEiT-3 (2208.10442): unilm `beit3/modeling_finetune.py` over torchscale `model/BEiT3.py`.

`A` is the image, `B` the text; both have everything in a block of their own. Positions are looked up from row 2 of
their tables. Image classifiers and question answerers have no final norm. Their heads, those of visual reasoning and
of masked image modelling are dropped.
"""

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

LAYER, TARGET = "beit3.encoder.layers.{}", "model.encoder.layers.{}"

KEY_MAP: KeyMap = {
    "beit3.text_embed.weight": "model.text_embedding.word_embeddings.weight",
    "beit3.vision_embed.cls_token": "model.image_embedding.cls_token",
    "beit3.vision_embed.mask_token": "model.image_embedding.mask_token",
    "beit3.vision_embed.proj.weight": "model.image_embedding.patch_embedding.weight",
    "beit3.vision_embed.proj.bias": "model.image_embedding.patch_embedding.bias",
    "beit3.encoder.embed_positions.A.weight": "model.image_embedding.position_embedding",
    "beit3.encoder.embed_positions.B.weight": "model.text_embedding.position_embedding.weight",
    "vision_head.weight": "model.image_projection.weight",
    "language_head.weight": "model.text_projection.weight",
    "vision_head.bias": "model.image_projection.bias",  # no published file has them, and a projection no bias
    "language_head.bias": "model.text_projection.bias",
    "logit_scale": "model.logit_scale",
    "mlm_head.weight": "lm_head.decoder.weight",
    "mlm_head.bias": "lm_head.decoder.bias",
    "head.*": None,  # ImageNet, VQA and NLVR2
    "fc_norm.*": None,  # ImageNet
    "pooler.*": None,  # VQA
    "*_head.*": None,  # pretraining
}
for side, group in (("A", "image"), ("B", "text")):
    KEY_MAP |= {
        f"beit3.encoder.layer_norm.{side}.{part}": f"model.encoder.norm.{group}.{part}" for part in ("weight", "bias")
    }
    KEY_MAP |= {
        f"{LAYER}.{name.replace('A', side)}.{part}": f"{TARGET}.{target.replace('image', group)}.{part}"
        for name, target in {
            "self_attn_layer_norm.A": "attention_norm.image",
            "self_attn.q_proj.A": "attention.query_key_value.image",
            "self_attn.k_proj.A": "attention.query_key_value.image",
            "self_attn.v_proj.A": "attention.query_key_value.image",
            "self_attn.inner_attn_ln.A": "attention.output_norm.image",
            "self_attn.out_proj.A": "attention.output.image",
            "final_layer_norm.A": "feed_forward_norm.image",
            "ffn.A.fc1": "feed_forward.image.up_proj",
            "ffn.A.ffn_layernorm": "feed_forward.image.norm",
            "ffn.A.fc2": "feed_forward.image.down_proj",
        }.items()
        for part in ("weight", "bias")
    }

OPERATIONS: dict[str, Operation] = {
    "model.image_embedding.patch_embedding.weight": operations.flatten_kernel,
    "model.image_embedding.position_embedding": operations.image_positions(2),
    "model.text_embedding.position_embedding.weight": operations.rows_from(2),
} | {
    f"{TARGET}.attention.query_key_value.{group}.{part}": operations.concatenate
    for group in ("image", "text")
    for part in ("weight", "bias")
}


def measure(checkpoint: Checkpoint, options: Options) -> Sizes:
    vocabulary, width = checkpoint.shape("beit3.text_embed.weight", 2)
    _, channels, _, patch = checkpoint.shape("beit3.vision_embed.proj.weight", 4)
    # beside the patches: two unused rows and [CLS]
    grid = square_side(checkpoint, "beit3.encoder.embed_positions.A.weight", dimensions=2, extra=3)
    retrieval = "vision_head.weight" in checkpoint or "language_head.weight" in checkpoint
    masked_lm = "mlm_head.weight" in checkpoint
    config = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": checkpoint.shape(f"{LAYER.format(0)}.ffn.A.fc1.weight", 2)[0],
        "num_hidden_layers": len(layers_of(checkpoint, f"{LAYER}.ffn.A.fc1.weight")),
        "num_attention_heads": options.num_attention_heads or default_heads(width),
        "image_size": options.image_size or grid * patch,
        "patch_size": patch,
        "num_channels": channels,
        "max_position_embeddings": checkpoint.shape("beit3.encoder.embed_positions.B.weight", 2)[0] - 2,
        "image_mask_token": True,
        "share_attention": False,
        "sub_layernorm": f"{LAYER.format(0)}.self_attn.inner_attn_ln.A.weight" in checkpoint,
        "final_norm": "beit3.encoder.layer_norm.A.weight" in checkpoint,
        "layer_norm_eps": 1e-5,
        "projection_dim": checkpoint.shape("vision_head.weight", 2)[0] if retrieval else width,
        "caption_objective": "masked",
        "tie_word_embeddings": not (masked_lm or options.caption),
    }
    return Sizes(
        config=config,
        grid=grid,
        kind=_kind(checkpoint),
        classifier="fc_norm.weight" in checkpoint,
        absent=absent_heads(retrieval, masked_lm, options),
    )


def _kind(checkpoint: Checkpoint) -> str:
    marks = {
        "vision_head.weight": "retrieval",
        "fc_norm.weight": "ImageNet classification",
        "pooler.norm.weight": "visual question answering",
        "head.dense1.weight": "visual reasoning",
        "mim_head.weight": "pretraining",
        "mlm_head.weight": "pretraining or captioning",
    }
    return next((kind for key, kind in marks.items() if key in checkpoint), "trunk")


SOURCE = Source(
    name="BEiT-3",
    key_map=KEY_MAP,
    measure=measure,
    operations=OPERATIONS,
    vocab_size=64010,
    special_tokens={"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "mask_token_id": 64001},
    other_special_tokens={"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2},
    tokenizer_files=("beit3.spm", "sentencepiece.bpe.model", "tokenizer.json"),
    tokenizer_hint="beit3.spm, published with the checkpoints",
    paper="2208.10442",
    citation="""@inproceedings{beit3,
  title     = {Image as a Foreign Language: {BEiT} Pretraining for Vision and Vision-Language Tasks},
  author    = {Wang, Wenhui and Bao, Hangbo and Dong, Li and Bjorck, Johan and Peng, Zhiliang and Liu, Qiang and
               Aggarwal, Kriti and Mohammed, Owais Khan and Singhal, Saksham and Som, Subhojit and Wei, Furu},
  booktitle = {CVPR},
  year      = {2023}
}""",
    license="mit",
)
