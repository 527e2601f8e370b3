"""What SigLIP brought into the config: each option changes something, alone and with the rest as it was."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from models import VARIANTS, random_batch, tiny_captioner, tiny_config
from mome import MomeConfig, MomeModel
from mome.inputs_mome import text_tokens
from mome.losses_mome import contrastive_loss, pair_loss, pair_scores, sigmoid_loss

PAIRED = {"image_cls_token": False, "image_pooling": "attention"}
SIGLIP = VARIANTS["siglip"]


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape != other.shape or not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize(
    "options, images, texts",
    [
        ({"image_pooling": "attention"}, True, False),
        ({"text_pooling": "last"}, False, True),
        ({"fixed_text_length": True}, False, True),
        ({"text_start_token": False}, False, True),
        ({"image_projection": False, "projection_dim": 32}, True, True),
        ({"projection_bias": True}, True, True),
    ],
)
def test_each_option_changes_the_embeddings_that_it_is_about(options, images, texts):
    """The seed is the same and so are the weights, as far as both models have them."""
    plain, changed = tiny_captioner(), tiny_captioner(**options)
    if "projection_dim" not in options:
        changed.load_state_dict(plain.state_dict(), strict=False)
    batch = random_batch(plain.config)
    with torch.no_grad():
        before, after = plain.model(**batch), changed.model(**batch)
    assert differ(before.image_embeds, after.image_embeds) == images
    assert differ(before.text_embeds, after.text_embeds) == texts


def test_without_cls_an_image_has_only_its_patches():
    model = tiny_captioner(**PAIRED)
    batch = random_batch(model.config)
    assert model.config.num_image_tokens == 4 and not hasattr(model.model.image_embedding, "cls_token")
    assert model.model.get_image_features(batch["pixel_values"]).last_hidden_state.shape[1] == 4
    order = torch.stack([torch.randperm(4) for _ in range(3)])
    with torch.no_grad():
        whole = model.model.project_image(model.model.image_pass(batch["pixel_values"]).last_hidden_state)
        kept = model.model.image_pass(batch["pixel_values"], kept_patches=order).last_hidden_state
        few = model.model.image_pass(batch["pixel_values"], kept_patches=order[:, :2]).last_hidden_state
    assert_close(model.model.project_image(kept), whole, atol=1e-5, rtol=1e-5)
    assert few.shape[1] == 2 and differ(model.model.project_image(few), whole)


def test_pixels_beyond_the_last_patch_count_for_nothing():
    model = tiny_captioner(image_size=20, crop_image=True)
    pixels = torch.randn(2, 3, 20, 20)
    changed = pixels.clone()
    changed[:, :, 16:] = 9
    changed[:, :, :, 16:] = -9
    assert model.config.grid_size == 2
    same, others = (model.get_image_features(each).pooler_output for each in (changed, pixels))
    assert torch.equal(same, others)
    changed[:, :, 15] = 9
    assert differ(model.get_image_features(changed).pooler_output, others)


def test_last_pooling_takes_the_last_word_wherever_the_padding_is():
    model = tiny_captioner(text_pooling="last")
    batch = random_batch(model.config)
    with torch.no_grad():
        whole = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
        alone = model.get_text_features(batch["input_ids"][1:2, :-2]).pooler_output
    assert_close(whole[1:2], alone, atol=1e-5, rtol=1e-5)


def test_a_text_of_fixed_length_is_one_whatever_padding_it_comes_with():
    config = tiny_config(**SIGLIP, max_position_embeddings=6, pad_token_id=2, eos_token_id=2, bos_token_id=1)
    wanted = torch.tensor([[7, 8, 9, 2, 2, 2]])
    for ids, mask in [
        ([7, 8, 9, 2], None),
        ([7, 8, 9, 2], [1, 1, 1, 1]),
        ([2, 2, 7, 8, 9, 2], [0, 0, 1, 1, 1, 1]),
        ([2, 2, 7, 8, 9, 2], None),
        ([1, 7, 8, 9, 2, 2, 2, 2], None),
        ([2, 1, 7, 8, 9, 2], [0, 1, 1, 1, 1, 1]),
        ([7, 5, 8, 9, 2], [1, 0, 1, 1, 1]),
    ]:
        made, made_mask = text_tokens(config, torch.tensor([ids]), None if mask is None else torch.tensor([mask]))
        assert torch.equal(made, wanted) and made_mask is None, (ids, mask)
        again, _ = text_tokens(config, made, made_mask)
        assert torch.equal(again, made)
    with pytest.raises(ValueError, match="7 tokens, max_position_embeddings is 6"):
        text_tokens(config, torch.full((1, 7), 9), None)


def test_padding_of_a_fixed_length_is_seen():
    model = tiny_captioner(**SIGLIP)
    text = torch.tensor([[7, 8, 9, 2]])
    with torch.no_grad():
        before = model.get_text_features(text).pooler_output
        model.get_input_embeddings().weight[model.config.pad_token_id] += torch.randn(32)
        after = model.get_text_features(text).pooler_output
    assert differ(before, after) and model.get_text_features(text).last_hidden_state.shape[1] == 24


# ----------------------------------------------------------------------------------------- the sigmoid objective


def test_sigmoid_scores_stand_alone_and_have_a_bias():
    model, plain = tiny_captioner(contrastive_objective="sigmoid"), tiny_captioner()
    model.load_state_dict(plain.state_dict(), strict=False)
    model.model.logit_bias.data.fill_(-3.0)
    batch = random_batch(model.config)
    with torch.no_grad():
        ours, theirs = model.model(**batch).logits_per_image, plain.model(**batch).logits_per_image
    assert_close(ours, theirs - 3)
    assert_close(pair_scores(model.config, ours), (theirs - 3).sigmoid())
    assert_close(pair_scores(plain.config, theirs), theirs.softmax(dim=1))
    assert tiny_captioner().model.logit_bias is None


def test_a_new_model_starts_from_the_papers_bias():
    for options, start in (({}, -10.0), ({"logit_bias_init_value": -4}, -4.0)):
        assert MomeModel(tiny_config(contrastive_objective="sigmoid", **options)).logit_bias.item() == start


def test_the_sigmoid_loss_is_that_of_the_paper():
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    by_hand = -(F.logsigmoid(torch.tensor([2.0, 1.0, -0.5, 3.0]))).sum() / 2
    assert_close(sigmoid_loss(logits, torch.eye(2).bool()), by_hand)
    every = torch.ones(2, 2).bool()
    assert_close(sigmoid_loss(logits, every), -F.logsigmoid(logits).sum() / 2)
    config = tiny_config(contrastive_objective="sigmoid")
    assert_close(pair_loss(config, logits, every), sigmoid_loss(logits, every))
    assert_close(pair_loss(tiny_config(), logits, every), contrastive_loss(logits, every))


def test_the_joint_loss_has_the_sigmoid_loss_in_it():
    model = tiny_captioner(**SIGLIP)
    batch = random_batch(model.config)
    outputs = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
    logits = model.model(**batch).logits_per_image
    assert_close(outputs.contrastive_loss, sigmoid_loss(logits, torch.eye(3).bool()))
    assert_close(outputs.loss, outputs.contrastive_loss + 2 * outputs.caption_loss)


# --------------------------------------------------------------------------------------------- captions of SigLIP


@pytest.mark.parametrize("variant", ["dense", "unshared", "routed"])
def test_caption_experts_change_captions_and_no_embedding(variant):
    options = SIGLIP | {"share_attention": variant != "unshared", "caption_experts": True}
    model = tiny_captioner(variant, **options)
    batch = random_batch(model.config)
    with torch.no_grad():
        before, captions = model.model(**batch), model(**batch).logits
        for name, parameter in model.named_parameters():
            if ".caption." in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        after, changed = model.model(**batch), model(**batch).logits
    assert torch.equal(before.image_embeds, after.image_embeds)
    assert torch.equal(before.text_embeds, after.text_embeds)
    assert differ(captions, changed)
    model(**batch, labels=batch["input_ids"], output_router_logits=variant == "routed").loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None or "router" in name, name


def test_caption_experts_have_router_losses_of_their_own():
    model = tiny_captioner("routed", caption_experts=True)
    outputs = model(**random_batch(model.config), output_router_logits=True)
    assert set(outputs.router_logits[0]) == {"image", "caption"}


def test_captions_begin_with_bos_though_texts_do_not():
    model = tiny_captioner(**SIGLIP)
    batch = random_batch(model.config)
    words = batch["input_ids"][:, 1:]  # as the tokenizer writes them: without [BOS]
    mask, pixels = batch["attention_mask"][:, 1:], batch["pixel_values"]
    labels = words.masked_fill(mask == 0, -100)
    with torch.no_grad():
        plain = model(words, pixels, mask, labels=labels)
        started = model(batch["input_ids"], pixels, batch["attention_mask"], labels=F.pad(labels, (1, 0), value=-100))
        logits = model(batch["input_ids"], pixels, batch["attention_mask"]).logits
    assert_close(plain.caption_loss, started.caption_loss)
    assert_close(plain.contrastive_loss, started.contrastive_loss)
    assert plain.logits.shape[:2] == words.shape
    assert_close(plain.logits[0], logits[0, 1:], atol=1e-5, rtol=1e-5)
    predicted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())  # the first word as well
    assert_close(plain.caption_loss, predicted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_prompt_of_the_tokenizer_is_continued_from_bos():
    model = tiny_captioner(**SIGLIP)
    pixels, options = random_batch(model.config)["pixel_values"][:1], {"max_new_tokens": 5, "do_sample": False}
    bos, eos = model.config.bos_token_id, model.config.eos_token_id
    for words in ([], [7, 8]):
        given = model.generate(pixel_values=pixels, input_ids=torch.tensor([[*words, eos]]), **options)
        started = model.generate(pixel_values=pixels, input_ids=torch.tensor([[bos, *words]]), **options)
        assert torch.equal(given, started) and given[0, 0] == bos
    ids = model.generate(pixel_values=pixels, **options)
    caption = model.generate(pixel_values=pixels, output_cosine=True, **options)
    assert torch.equal(caption.sequences, ids)
    text = ids[:, 1:] if eos in ids[0].tolist() else F.pad(ids[:, 1:], (0, 1), value=eos)
    cosine = (model.get_text_features(text).pooler_output * model.get_image_features(pixels).pooler_output).sum()
    assert_close(caption.cosine[0], cosine, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance", [{"guidance_scale": 2.0}, {"contrastive_weight": 2.0}, {"rerank_weight": 0.5}])
def test_guidance_works_on_it(guidance):
    model = tiny_captioner(**SIGLIP, caption_experts=True)
    pixels = random_batch(model.config)["pixel_values"]
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2}
    batched = model.generate(pixel_values=pixels, **options, **guidance)
    single = model.generate(pixel_values=pixels[1:2], **options, **guidance)
    width = min(batched.shape[1], single.shape[1])
    assert torch.equal(batched[2:4, :width], single[:, :width])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_cls_token": False}, "image_cls_token=False leaves image_pooling='first' nothing to pool"),
        (PAIRED | {"position_embedding_type": "relative"}, "position_embedding_type='relative' places"),
        ({"image_projection": False}, "image_projection=False makes embeddings of hidden_size=32 dimensions"),
        ({"image_size": 20}, "image_size=20 is not a multiple of patch_size=8: crop_image=True"),
        ({"image_size": 4, "crop_image": True}, "image_size=4 is less than patch_size=8"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)


def test_defaults_leave_configs_as_they_were():
    config = MomeConfig()
    assert config.token_groups == ("image", "text") and config.caption_group == "text"
    assert config.num_image_tokens == 14**2 + 1
