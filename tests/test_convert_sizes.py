"""Converted random models of other sizes, held against the upstream mathematics written out; published sizes."""

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

import reference
from mome import MomeConfig, MomeForConditionalGeneration, MomeModel
from mome.benchmarks.layouts import BEIT3, VLMO, beit3_shapes, random_state, vlmo_shapes
from mome.convert import convert
from mome.convert.driver import SOURCES
from mome.convert.operations import Options
from mome.convert.reading import Checkpoint
from mome.convert.saving import meta_model
from upstream import golden, save_tokenizer, under

CLOSE = {"atol": 1e-5, "rtol": 0}
BEIT3_IDS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 40}
VLMO_IDS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
BEIT3_TINY = [
    {"width": 48, "inner": 80, "layers": 2, "vocab": 70, "image": 24, "patch": 4, "texts": 17},
    {"width": 64, "inner": 32, "layers": 5, "vocab": 41, "image": 32, "patch": 16, "texts": 40},
    {"width": 24, "inner": 96, "layers": 1, "vocab": 90, "image": 7, "patch": 7, "texts": 12},
]
VLMO_TINY = [
    {"width": 48, "inner": 80, "layers": 3, "heads": 6, "joint": 1, "vocab": 60, "image": 20, "patch": 4, "texts": 9},
    {"width": 40, "inner": 72, "layers": 5, "heads": 2, "joint": 4, "vocab": 33, "image": 48, "patch": 16, "texts": 7},
    {"width": 24, "inner": 30, "layers": 2, "heads": 3, "joint": 0, "vocab": 50, "image": 14, "patch": 7, "texts": 11},
]


def converted(kind, state, tmp_path, options, ids, wrap=None):
    vocab = next(tensor.shape[0] for key, tensor in state.items() if "text_embed.w" in key or "word_emb" in key)
    if wrap:
        torch.save(wrap(state), tmp_path / "upstream.pth")
    else:
        save_file(state, tmp_path / "upstream.pth")
    tokenizer = save_tokenizer(kind, tmp_path / "tokenizer", vocab, ids)
    convert(kind, tmp_path / "upstream.pth", tmp_path / "converted", tokenizer=tokenizer, options=options)
    return AutoModelForImageTextToText.from_pretrained(tmp_path / "converted").eval()


def random_doubles(shapes):
    """In double precision, since the states of random models without a final norm are large."""
    return {key: tensor.double() for key, tensor in random_state(shapes, scale=0.2).items()}


def batch_of(config, tokens=6, size=3):
    generator = torch.Generator().manual_seed(3)
    side = config.image_size
    pixels = torch.randn(size, 3, side, side, generator=generator, dtype=torch.float64)
    ids = torch.randint(5, config.vocab_size - 9, (size, tokens), generator=generator)
    ids[:, 0] = config.bos_token_id
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_the_reference_equals_the_golden_checkpoints():
    expected = golden("beit3")
    sd, mask = under("retrieval_sd/", expected), 1 - expected["padding_mask"]
    inputs = {"pixels": expected["image"], "ids": expected["input_ids"], "mask": mask}
    assert_close(reference.beit3(sd, 4, **inputs), expected["hidden_fused"], **CLOSE)
    sd, inputs["ids"] = under("caption_sd/", expected), expected["caption_masked_ids"]
    logits = reference.linear(reference.beit3(sd, 4, **inputs, causal=True)[:, 17:], sd, "mlm_head")
    assert_close(logits, expected["caption_logits"], **CLOSE)
    expected = golden("vlmo")
    inputs = {"pixels": expected["image"], "ids": expected["input_ids"], "mask": expected["attention_mask"]}
    for positions in ("relpos", "abspos"):
        sd, outputs = under(f"{positions}/sd/", expected), under(f"{positions}/", expected)
        text, image = reference.vlmo(sd, 4, 4, **inputs, joint_from=3).split([8, 17], dim=1)
        assert_close(image, outputs["fused/image_feats"], **CLOSE)
        assert_close(text, outputs["fused/text_feats"], **CLOSE)
        text = reference.vlmo(sd, 4, 4, ids=inputs["ids"], mask=inputs["mask"])
        assert_close(text, outputs["text/text_feats"], **CLOSE)
        assert_close(reference.vlmo(sd, 4, 4, pixels=inputs["pixels"]), outputs["image/image_feats"], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["retrieval", "captioning", "pretraining", "imagenet", "vqa", "nlvr2"])
@pytest.mark.parametrize("size", range(len(BEIT3_TINY)))
def test_beit3_of_any_size_and_kind_equals_the_reference(size, kind, tmp_path):
    heads = 4
    state = random_doubles(beit3_shapes(**BEIT3_TINY[size], kind=kind))
    options = Options(num_attention_heads=heads)
    captioner = converted("beit3", state, tmp_path, options, BEIT3_IDS, wrap=lambda state: {"model": state})
    config, model = captioner.config, captioner.model
    assert config.final_norm == (kind not in ("imagenet", "vqa"))
    batch = batch_of(config)
    inputs = {"pixels": batch["pixel_values"], "ids": batch["input_ids"], "mask": batch["attention_mask"]}
    fused, words = reference.beit3(state, heads, **inputs), batch["attention_mask"].bool()
    images = config.num_image_tokens
    states = model.get_multimodal_features(**batch).last_hidden_state
    assert_close(states[:, :images], fused[:, :images], **CLOSE)
    assert_close(states[:, images:][words], fused[:, images:][words], **CLOSE)
    embeds = reference.beit3(state, heads, pixels=batch["pixel_values"])[:, 0]
    if kind == "retrieval":
        embeds = embeds @ state["vision_head.weight"].T
    outputs = model(**batch)
    assert_close(outputs.image_embeds, torch.nn.functional.normalize(embeds, dim=-1), **CLOSE)
    if kind in ("captioning", "pretraining"):
        captioner.config.caption_objective = "causal"
        logits = reference.linear(reference.beit3(state, heads, **inputs, causal=True)[:, images:], state, "mlm_head")
        assert_close(captioner(**batch).logits[words], logits[words], **CLOSE)
    else:
        assert captioner.lm_head.decoder.weight is model.text_embedding.word_embeddings.weight


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pretraining", "language", "retrieval", "vqa", "nlvr2"])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("size", range(len(VLMO_TINY)))
def test_vlmo_of_any_size_and_kind_equals_the_reference(size, relative, kind, tmp_path):
    sizes = VLMO_TINY[size] | ({"joint": None} if kind == "language" else {})
    state = random_doubles(vlmo_shapes(**sizes, relative=relative, kind=kind))
    options = Options(num_attention_heads=sizes["heads"])
    wrap = {"retrieval": lambda state: {"module": {f"module.{key}": tensor for key, tensor in state.items()}}}
    captioner = converted("vlmo", state, tmp_path, options, VLMO_IDS, wrap.get(kind))
    config, model, side = captioner.config, captioner.model, sizes["image"] // sizes["patch"]
    assert config.image_size == sizes["image"] and config.fusion_start_layer == sizes["joint"]
    batch = batch_of(config)
    words, images = batch["attention_mask"].bool(), config.num_image_tokens
    inputs = {"ids": batch["input_ids"], "mask": batch["attention_mask"]}
    fused = reference.vlmo(state, sizes["heads"], side, batch["pixel_values"], **inputs, joint_from=sizes["joint"])
    states = model.get_multimodal_features(**batch).last_hidden_state
    assert_close(states[:, :images], fused[:, -images:], **CLOSE)
    assert_close(states[:, images:][words], fused[:, :-images][words], **CLOSE)
    text = reference.vlmo(state, sizes["heads"], side, **inputs)
    assert_close(model.text_pass(inputs["ids"], inputs["mask"]).last_hidden_state[words], text[words], **CLOSE)
    if kind == "pretraining":
        image = reference.vlmo(state, sizes["heads"], side, batch["pixel_values"], joint_from=sizes["joint"])[:, 0]
        expected = torch.nn.functional.normalize(image @ state["itc_vl_image_proj.fc.weight"].T, dim=-1)
        joint = model.get_image_features(batch["pixel_values"], joint_experts=True).pooler_output
        assert_close(joint, expected, **CLOSE)


class Shapes(Checkpoint):
    """A checkpoint of which only the shapes exist."""

    def __init__(self, shapes, path):
        path.write_bytes(b"")
        super().__init__(path, {key: torch.Size(shape) for key, shape in shapes.items()})


def published(kind, shapes, tmp_path) -> MomeConfig:
    sizes = SOURCES[kind].measure(Shapes(shapes, tmp_path / "shapes"), Options())
    return MomeConfig(**sizes.config, mask_token_id=4)


def millions(module) -> int:
    return round(sum(parameter.numel() for parameter in module.parameters()) / 1e6)


@pytest.mark.parametrize(
    "name, kind, expected", [("base", "retrieval", 222), ("large", "retrieval", 675), ("base", "captioning", 271)]
)
def test_beit3_has_the_published_number_of_parameters(name, kind, expected, tmp_path):
    config = published("beit3", beit3_shapes(**BEIT3[name], kind=kind), tmp_path)
    model_class = MomeModel if kind == "retrieval" else MomeForConditionalGeneration
    assert millions(meta_model(model_class, config)) == expected


@pytest.mark.parametrize("name, expected", [("base", 175), ("base_plus", 167), ("large", 562)])
def test_vlmo_has_the_published_number_of_parameters(name, expected, tmp_path):
    """The published numbers are of the trunk and the embeddings, without heads."""
    config = published("vlmo", vlmo_shapes(**VLMO[name]), tmp_path)
    assert config.image_size == 224 and config.max_position_embeddings == (40 if name == "base_plus" else 196)
    assert config.num_attention_heads == VLMO[name]["heads"]
    model = meta_model(MomeModel, config)
    assert millions(torch.nn.ModuleList([model.image_embedding, model.text_embedding, model.encoder])) == expected


@pytest.mark.parametrize("image", [224, 384, 480, 768])
def test_the_resolution_of_a_relative_table_is_found(image, tmp_path):
    config = published("vlmo", vlmo_shapes(**VLMO["base"], image=image), tmp_path)
    assert config.image_size == image and config.max_position_embeddings == 196
