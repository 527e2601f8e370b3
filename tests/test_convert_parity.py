"""Converted golden checkpoints give what the upstream projects gave for the same inputs."""

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForImageTextToText

from mome.convert import convert
from mome.convert.operations import Options
from upstream import golden, save_tokenizer, under

CLOSE = {"atol": 1e-5, "rtol": 0}
HEADS = Options(num_attention_heads=4)


def converted(kind, state, tmp_path, options=HEADS, **kwargs):
    """Captioner and encoder of a converted state dict."""
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "upstream.safetensors")
    folder = tmp_path / "converted"
    tokenizer = save_tokenizer(kind, tmp_path / "tokenizer")
    convert(kind, tmp_path / "upstream.safetensors", folder, tokenizer=tokenizer, options=options, **kwargs)
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoModel.from_pretrained(folder).eval()


@torch.no_grad()
def test_beit3_retrieval_equals_upstream(tmp_path):
    expected = golden("beit3")
    _, model = converted("beit3", under("retrieval_sd/", expected), tmp_path)
    mask = 1 - expected["padding_mask"]
    batch = {"pixel_values": expected["image"], "input_ids": expected["input_ids"], "attention_mask": mask}
    outputs = model(**batch, return_loss=True)
    assert_close(outputs.image_embeds, expected["image_embeds"], **CLOSE)
    assert_close(outputs.text_embeds, expected["text_embeds"], **CLOSE)
    assert_close(outputs.loss, expected["contrastive_loss"], **CLOSE)
    assert_close(outputs.image_model_output.last_hidden_state, expected["hidden_image"], **CLOSE)
    assert_close(outputs.text_model_output.last_hidden_state, expected["hidden_text"], **CLOSE)
    assert_close(model.get_multimodal_features(**batch).last_hidden_state, expected["hidden_fused"], **CLOSE)
    masked = (torch.arange(model.config.grid_size**2) % 3 == 0).expand(2, -1)
    features = model.get_image_features(expected["image"], bool_masked_pos=masked)
    assert_close(features.last_hidden_state, expected["hidden_image_masked"], **CLOSE)


@torch.no_grad()
def test_beit3_captioner_gives_the_logits_and_greedy_captions_of_upstream(tmp_path):
    expected = golden("beit3")
    captioner, _ = converted("beit3", under("caption_sd/", expected), tmp_path)
    images, greedy = expected["image"], expected["caption_greedy_ids"]
    options = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    for use_cache in (True, False):
        outputs = captioner.generate(pixel_values=images, use_cache=use_cache, **options)
        assert outputs.sequences.tolist() == greedy.tolist()
        assert_close(torch.stack(outputs.logits, dim=1), expected["caption_greedy_logits"], **CLOSE)
    assert (captioner(pixel_values=images, input_ids=greedy[:, :-1]).logits.argmax(dim=-1) == greedy[:, 1:]).all()

    # With the causal objective a row is read where its token stands, as upstream does in training.
    captioner.config.caption_objective = "causal"
    mask = 1 - expected["padding_mask"]
    logits = captioner(pixel_values=images, input_ids=expected["caption_masked_ids"], attention_mask=mask).logits
    assert_close(logits[mask.bool()], expected["caption_logits"][mask.bool()], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["relpos", "abspos"])
def test_vlmo_equals_upstream(positions, tmp_path):
    expected = golden("vlmo")
    inputs = {"pixel_values": expected["image"], "input_ids": expected["input_ids"]}
    inputs["attention_mask"] = expected["attention_mask"]
    words = inputs["attention_mask"].bool()
    expected = under(f"{positions}/", expected)
    captioner, model = converted("vlmo", under("sd/", expected), tmp_path)

    image = model.get_image_features(inputs["pixel_values"])
    text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    assert_close(image.last_hidden_state, expected["image/image_feats"], **CLOSE)
    assert_close(image.pooler_output, expected["image/cls_feats"], **CLOSE)
    assert_close(text.last_hidden_state[words], expected["text/text_feats"][words], **CLOSE)
    assert_close(text.pooler_output, expected["text/cls_feats"], **CLOSE)

    joint_image = model.get_image_features(inputs["pixel_values"], joint_experts=True)
    joint_text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"], joint_experts=True)
    assert_close(joint_image.pooler_output, expected["image/cls_vlffn_feats"], **CLOSE)
    assert_close(joint_text.pooler_output, expected["text/cls_vlffn_feats"], **CLOSE)
    assert (joint_image.pooler_output - image.pooler_output).abs().max() > 0.01

    fused = model.get_multimodal_features(**inputs)
    image_states, text_states = fused.last_hidden_state.split([17, 8], dim=1)
    assert_close(image_states, expected["fused/image_feats"], **CLOSE)
    assert_close(text_states[words], expected["fused/text_feats"][words], **CLOSE)
    assert_close(fused.pooler_output, expected["fused/cls_feats"], **CLOSE)
    assert_close(fused.matching_logits, expected["itm_logits"], **CLOSE)
    assert_close(captioner.lm_head(text_states)[words], expected["mlm_logits"][words], **CLOSE)
