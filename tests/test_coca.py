"""CoCa: what open_clip gives, its traps one by one, and what is true of every model of the package."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import reference
from models import coca_batch, pad_left, tiny_coca
from mome import CocaConfig, CocaForConditionalGeneration, CocaModel
from mome.benchmarks.layouts import COCA, coca_config, coca_shapes

masks = pytest.mark.parametrize("correct_cls_mask", [False, True])
WORDS = torch.full((2, 4), 9)


def close(actual, expected, atol=1e-5):
    assert_close(actual, expected, atol=atol, rtol=0)


@pytest.fixture
def batch():
    return coca_batch(tiny_coca().config)


# ---------------------------------------------------------------------------------------------- texts and padding


@torch.no_grad()
@masks
def test_padding_never_changes_text_embeddings(correct_cls_mask, batch):
    model = tiny_coca(correct_cls_mask=correct_cls_mask).model
    ids, mask, config = batch["input_ids"], batch["attention_mask"], model.config
    expected = model.get_text_features(ids, mask)
    wide = F.pad(ids, (0, 17), value=config.pad_token_id), F.pad(mask, (0, 17))  # the whole position table
    left = pad_left(wide[0], wide[1]), pad_left(wide[1], wide[1])
    full = F.pad(ids.masked_fill(mask == 0, config.filler_token_id), (0, 17), value=config.filler_token_id)
    for given in (wide, left, (full, wide[1]), (full, None), (ids.where(mask == 1, 0), None)):
        close(model.get_text_features(*given).pooler_output, expected.pooler_output)
    for row in range(4):
        text = ids[row : row + 1, : int(mask[row].sum())]
        alone = model.get_text_features(text)
        close(alone.pooler_output[0], expected.pooler_output[row])
        close(alone.last_hidden_state[0], expected.last_hidden_state[row, : text.shape[1]])
        states = model.get_text_features(left[0], left[1]).last_hidden_state
        close(states[row, -text.shape[1] :], alone.last_hidden_state[0])


@torch.no_grad()
def test_text_that_ends_in_eos_is_told_from_its_padding_without_a_mask(batch):
    model = tiny_coca().model
    ids = torch.tensor([[1, 20, 21, 2, 2, 2], [1, 20, 21, 22, 23, 2]])
    embeds = model.get_text_features(ids).pooler_output
    close(embeds[:1], model.get_text_features(torch.tensor([[1, 20, 21, 2]])).pooler_output)
    close(embeds[1:], model.get_text_features(ids[1:], torch.ones(1, 6)).pooler_output)


@torch.no_grad()
def test_the_legacy_mask_hides_what_follows_a_filler_and_shows_one_of_them(batch):
    model, corrected = tiny_coca(), tiny_coca(correct_cls_mask=True)
    ids = batch["input_ids"][1:2, :5]
    assert (model.get_text_features(ids).pooler_output - corrected.get_text_features(ids).pooler_output).norm() > 0.01
    words = model.model.text_embedding.word_embeddings.weight
    before = model.get_text_features(ids).pooler_output, corrected.get_text_features(ids).pooler_output
    words[0] += torch.randn(32)
    after = model.get_text_features(ids).pooler_output, corrected.get_text_features(ids).pooler_output
    assert (after[0] - before[0]).norm() > 0.01  # [CLS] sees the first filler token
    close(after[1], before[1])
    # The word behind a filler is seen by nobody, itself included.
    text = torch.tensor([[1, 20, 0, 21, 22]])
    before = model.model.text_pass(text).last_hidden_state
    words[21] += torch.randn(32)
    after = model.model.text_pass(text).last_hidden_state
    close(after[0, [0, 1, 2, 4, 5]], before[0, [0, 1, 2, 4, 5]])
    assert (after[0, 3] - before[0, 3]).norm() > 0.01


@torch.no_grad()
def test_a_text_that_fills_the_table_leaves_cls_to_see_itself(batch):
    model = tiny_coca().model
    full = torch.full((1, 24), 30)
    before = model.get_text_features(full).pooler_output
    model.text_embedding.cls_token += torch.randn(32)
    assert (model.get_text_features(full).pooler_output - before).norm() > 0.01
    with pytest.raises(ValueError, match="25 tokens, max_position_embeddings is 24"):
        model.get_text_features(torch.full((1, 25), 30))


@torch.no_grad()
@masks
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_states_of_words_are_those_of_the_caption_pass(correct_cls_mask, attention, batch):
    captioner = tiny_coca(correct_cls_mask=correct_cls_mask)
    captioner.set_attn_implementation(attention)
    states = captioner.model.text_pass(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    outputs = captioner(**batch, output_hidden_states=True)
    seen = batch["attention_mask"].bool()
    close(outputs.hidden_states[2][seen], states[:, :-1][seen])


# --------------------------------------------------------------------------------------------------- embeddings


@torch.no_grad()
def test_batching_and_order_never_change_outputs(batch):
    captioner, order = tiny_coca(), torch.tensor([2, 0, 3, 1])
    whole = captioner(**batch)
    shuffled = captioner(**{name: each[order] for name, each in batch.items()})
    close(shuffled.logits, whole.logits[order])
    close(shuffled.image_embeds, whole.image_embeds[order])
    for row in range(4):
        alone = captioner(**{name: each[row : row + 1] for name, each in batch.items()})
        close(alone.logits[0], whole.logits[row])


@torch.no_grad()
def test_one_modality_alone_gives_the_same_as_both(batch):
    model = tiny_coca().model
    both = model(**batch)
    image = model(pixel_values=batch["pixel_values"])
    text = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    close(image.image_embeds, both.image_embeds)
    close(text.text_embeds, both.text_embeds)
    close(both.logits_per_image, model.logit_scale.exp() * image.image_embeds @ text.text_embeds.T)
    assert image[0] is image.image_embeds and text[0] is text.text_embeds  # what stock pipelines take


@torch.no_grad()
def test_the_first_query_makes_the_embedding_and_captions_look_at_the_others(batch):
    captioner = tiny_coca()
    image = captioner.image_pass_for_captions(batch["pixel_values"])
    close(captioner.model.project_image(image.last_hidden_state), captioner(**batch).image_embeds)
    assert image.key_values[0][0].shape == (4, 8, 4, 4)  # (images, heads, queries but the first, head_dim)
    states = image.last_hidden_state.clone()
    states[:, 0] = 0
    for actual, expected in zip(captioner.decoder.keys_and_values(states), image.key_values):
        assert all(map(torch.equal, actual, expected))


@torch.no_grad()
def test_a_caption_token_never_sees_a_later_one(batch):
    captioner, later = tiny_coca(), {**batch, "input_ids": batch["input_ids"].clone()}
    later["input_ids"][:, 4:] = 50
    close(captioner(**later).logits[:, :4], captioner(**batch).logits[:, :4])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attentions_are_weights_and_change_nothing(attention, batch):
    captioner = tiny_coca()
    captioner.set_attn_implementation(attention)
    expected = captioner(**batch).logits
    outputs = captioner(**batch, output_attentions=True, output_hidden_states=True)
    close(outputs.logits, expected)
    assert [each.shape for each in outputs.attentions] == 2 * [(4, 4, 7, 7)] + 3 * [(4, 8, 7, 7)]
    assert [each.shape for each in outputs.cross_attentions] == 3 * [(4, 8, 7, 4)]
    assert [each.shape for each in outputs.hidden_states] == 6 * [(4, 7, 32)]
    close(outputs.cross_attentions[0].sum(dim=-1), torch.ones(4, 8, 7))
    close(outputs.attentions[0].sum(dim=-1), torch.ones(4, 4, 7))


@torch.no_grad()
def test_rows_of_an_image_share_it(batch):
    captioner = tiny_coca()
    captioner.set_attn_implementation("eager")
    ids = batch["input_ids"].repeat(2, 1)
    outputs = captioner(input_ids=ids, pixel_values=batch["pixel_values"], output_attentions=True)
    for row in range(8):
        image = batch["pixel_values"][row // 2, None]
        alone = captioner(input_ids=ids[row, None], pixel_values=image, output_attentions=True)
        close(outputs.logits[row], alone.logits[0])
        close(outputs.cross_attentions[1][row], alone.cross_attentions[1][0])


# ---------------------------------------------------------------------------------------------------------- losses


@torch.no_grad()
def test_the_joint_loss_is_contrastive_plus_twice_the_caption_loss(batch):
    captioner = tiny_coca()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    outputs = captioner(**batch, labels=labels)
    contrastive = captioner.model(**batch, return_loss=True).loss
    captions = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    close(outputs.contrastive_loss, contrastive)
    close(outputs.caption_loss, captions)
    close(outputs.loss, contrastive + 2 * captions)
    weighted = tiny_coca(contrastive_loss_weight=0.5, caption_loss_weight=3.0)
    close(weighted(**batch, labels=labels).loss, 0.5 * contrastive + 3 * captions)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_reach_every_weight_with_and_without_checkpointing(reentrant, batch):
    gradients = []
    for checkpointing in (False, True):
        captioner = tiny_coca().train()
        if checkpointing:
            captioner.gradient_checkpointing_enable({"use_reentrant": reentrant})
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        captioner(**batch, labels=labels).loss.backward()
        gradients.append({name: each.grad for name, each in captioner.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        close(gradients[1][name], gradient)


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, r"expected .* = \(images, 3, 16, 16\)"),
        ({"input_ids": torch.full((1, 4), 99)}, "input_ids holds 99, vocab_size is 99"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "both at least 1"),
        ({}, "neither pixel_values nor input_ids"),
        (
            {"input_ids": torch.full((2, 4), 9), "pixel_values": torch.zeros(1, 3, 16, 16), "return_loss": True},
            "1 imag",
        ),
    ],
)
def test_bad_input_is_refused_by_value_in_one_line(inputs, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_coca().model(**inputs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": None}, "captions are made of images: pass pixel_values"),
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.full((3, 7), 9)}, "4 images and 3 texts"),
        ({"image_tokens_in_input": True}, "no places for an image"),
        ({"labels": torch.full((4, 6), 9)}, "labels has shape"),
    ],
)
def test_bad_captions_are_refused_by_value_in_one_line(changes, message, batch):
    with pytest.raises(ValueError, match=message) as error:
        tiny_coca()(**{"pixel_values": batch["pixel_values"], "input_ids": batch["input_ids"], **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooler_num_queries": 1}, "pooler_num_queries=1 must be at least 2"),
        ({"pooler_num_attention_heads": 3}, "hidden_size=512 is not a multiple of pooler_num_attention_heads=3"),
        ({"image_size": 225}, "image_size=225 is not a multiple of patch_size=32"),
        ({"vision_hidden_sizes": 3}, "did you mean 'vision_hidden_size'"),
        ({"filler_token_id": 49408}, "filler_token_id=49408 is not an id"),
        ({"hidden_act": "gelus"}, "did you mean 'gelu'"),
    ],
)
def test_a_config_that_cannot_be_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        CocaConfig(**fields)


# ----------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(("size", "parameters"), [("base", 253.6), ("large", 638.5)])
def test_published_sizes_have_their_numbers_of_parameters(size, parameters):
    with torch.device("meta"):
        captioner = CocaForConditionalGeneration(CocaConfig.from_size(size))
    upstream = {name: each for name, each in COCA[size].items() if name != "head_dim"}
    count = sum(torch.Size(shape).numel() for shape in coca_shapes(**upstream).values())
    assert captioner.num_parameters() == count and round(count / 1e6, 1) == parameters
    model = coca_config(**COCA[size])["model_cfg"]
    assert captioner.config.text_num_attention_heads == model["text_cfg"]["heads"]
    with pytest.raises(ValueError, match="choose one of base, large"):
        CocaConfig.from_size("huge")


@torch.no_grad()
def test_the_reference_gives_the_golden_outputs():
    from upstream import golden, under

    expected = golden("coca")
    heads = dict.fromkeys(("vision", "pooler", "text", "decoder"), 4)
    actual = reference.coca(under("sd/", expected), heads, expected["image"], expected["input_ids"])
    for name in ("image_embeds", "text_embeds", "logits"):
        close(actual[name], expected[name])


def test_dropout_only_acts_in_training(batch):
    captioner = tiny_coca(attention_dropout=0.5)
    assert torch.equal(captioner(**batch).logits, captioner(**batch).logits)
    captioner.train()
    assert not torch.equal(captioner(**batch).logits, captioner(**batch).logits)


def test_embeddings_load_from_a_captioner_and_what_is_missing_is_an_error(tmp_path):
    captioner = tiny_coca()
    captioner.save_pretrained(tmp_path / "captioner")
    model = CocaModel.from_pretrained(tmp_path / "captioner")
    assert all(map(torch.equal, model.state_dict().values(), captioner.model.state_dict().values()))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="does not fit CocaForConditionalGeneration: missing weights"):
        CocaForConditionalGeneration.from_pretrained(tmp_path / "model")
