"""What BEiT-3 and VLMo have beyond the trunk: each option changes something, and is refused where it is off."""

import pytest
import torch
from torch.testing import assert_close

from models import random_batch, tiny_captioner, tiny_config
from mome import MomeForConditionalGeneration, MomeModel

JOINT = {"fusion_start_layer": 1, "joint_projection": True, "multimodal_pooler": True, "matching_head": True}


@pytest.fixture(scope="module")
def model() -> MomeModel:
    return tiny_captioner(image_mask_token=True, **JOINT).model


@pytest.fixture(scope="module")
def batch(model):
    return random_batch(model.config)


@torch.no_grad()
def test_a_masked_patch_is_not_seen(model, batch):
    pixels = batch["pixel_values"]
    masked = torch.zeros(3, model.config.grid_size**2)
    plain = model.get_image_features(pixels).pooler_output
    assert torch.equal(model.get_image_features(pixels, bool_masked_pos=masked).pooler_output, plain)
    masked[:, 1] = 1
    features = model.get_image_features(pixels, bool_masked_pos=masked).pooler_output
    assert (features - plain).abs().max() > 1e-3
    pixels = pixels.clone()
    pixels[:, :, :8, 8:] = 7.0  # the second patch
    assert_close(model.get_image_features(pixels, bool_masked_pos=masked).pooler_output, features)


@torch.no_grad()
def test_joint_experts_embed_otherwise_and_with_their_own_temperature(model, batch):
    text = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    images = model.get_image_features(batch["pixel_values"], joint_experts=True)
    texts = model.get_text_features(**text, joint_experts=True)
    assert (images.pooler_output - model.get_image_features(batch["pixel_values"]).pooler_output).abs().max() > 1e-2
    assert (texts.last_hidden_state - model.get_text_features(**text).last_hidden_state).abs().max() > 1e-2
    model.joint_projection.logit_scale += 1
    joint = model.similarity(images.pooler_output, texts.pooler_output, joint_experts=True)
    plain = model.similarity(images.pooler_output, texts.pooler_output)
    model.joint_projection.logit_scale -= 1
    assert_close(joint, plain * torch.e)


@torch.no_grad()
def test_the_pooler_reads_the_texts_first_token_and_the_matching_head_reads_the_pooler(model, batch):
    fused = model.get_multimodal_features(**batch)
    first = fused.last_hidden_state[:, model.config.num_image_tokens]
    assert_close(fused.pooler_output, torch.tanh(model.multimodal_pooler.dense(first)))
    assert_close(fused.matching_logits, model.matching_head(fused.pooler_output))
    left = {**batch, **{key: batch[key].flip(1) for key in ("input_ids", "attention_mask")}}
    order = batch["attention_mask"].flip(1).argsort(dim=1, stable=True)
    left["input_ids"] = batch["input_ids"].gather(1, batch["attention_mask"].argsort(dim=1, stable=True))
    left["attention_mask"] = left["attention_mask"].gather(1, order)
    assert_close(model.get_multimodal_features(**left).matching_logits, fused.matching_logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_without_a_final_norm_states_are_those_before_it(batch):
    with_norm = tiny_captioner(image_mask_token=True, **JOINT).model
    without = MomeModel(tiny_config(image_mask_token=True, final_norm=False, **JOINT)).eval()
    state = {key: value for key, value in with_norm.state_dict().items() if not key.startswith("encoder.norm.")}
    without.load_state_dict(state, strict=True)
    states = [model.image_pass(batch["pixel_values"]).last_hidden_state for model in (with_norm, without)]
    assert_close(with_norm.encoder.norm["shared"](states[1]), states[0])
    assert (states[0] - states[1]).abs().max() > 0.1


def test_all_of_it_is_saved_and_learns(tmp_path):
    captioner = tiny_captioner(image_mask_token=True, final_norm=False, **JOINT)
    captioner.save_pretrained(tmp_path)
    loaded = MomeForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in captioner.state_dict().items())
    model, batch = loaded.model, random_batch(loaded.config)
    masked = torch.ones(3, model.config.grid_size**2)
    images = model.get_image_features(batch["pixel_values"], bool_masked_pos=masked, joint_experts=True)
    texts = model.get_text_features(batch["input_ids"], joint_experts=True)
    similarity = model.similarity(images.pooler_output, texts.pooler_output, joint_experts=True)
    matching = model.get_multimodal_features(**batch).matching_logits
    (similarity.logsumexp(dim=1).mean() + matching.logsumexp(dim=1).mean()).backward()
    for name in ("joint_projection", "multimodal_pooler", "matching_head", "image_embedding.mask_token"):
        parameters = [parameter for key, parameter in model.named_parameters() if key.startswith(name)]
        assert parameters and all(parameter.grad.abs().max() > 0 for parameter in parameters)


def test_what_the_config_lacks_is_refused(model, batch):
    plain = tiny_captioner().model
    masked = torch.ones(3, 4)
    with pytest.raises(ValueError, match="image_mask_token=False"):
        plain.get_image_features(batch["pixel_values"], bool_masked_pos=masked)
    with pytest.raises(ValueError, match=r"shape \(3, 5\), expected \(images, patches\) = \(3, 4\)"):
        model.get_image_features(batch["pixel_values"], bool_masked_pos=torch.ones(3, 5))
    for call in (
        lambda: plain.get_image_features(batch["pixel_values"], joint_experts=True),
        lambda: plain.get_text_features(batch["input_ids"], joint_experts=True),
        lambda: plain.similarity(torch.ones(1, 4), torch.ones(1, 4), joint_experts=True),
    ):
        with pytest.raises(ValueError, match="joint_projection=False"):
            call()
    with pytest.raises(ValueError, match="fusion_start_layer=None"):
        tiny_config(joint_projection=True)
    with pytest.raises(ValueError, match="multimodal_pooler=True"):
        tiny_config(matching_head=True)
