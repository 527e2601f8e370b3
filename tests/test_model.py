"""What never changes the model's outputs, who gets a gradient, and which input is refused."""

import importlib.util

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from models import VARIANTS, pad_left, random_batch, tiny_captioner, tiny_config
from mome import MomeConfig, MomeForConditionalGeneration, MomeModel, kernels_mome
from mome.kernels_mome import grouped_linear
from mome.losses_mome import contrastive_loss, router_losses, router_sums, same_caption

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def close(actual, expected):
    assert_close(actual, expected, atol=1e-5, rtol=0)


@every_variant
def test_padding_never_changes_embeddings(variant):
    model = tiny_captioner(variant).model
    batch = random_batch(model.config, size=4)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = torch.cat(
        [model.get_text_features(row[None, keep.bool()]).pooler_output for row, keep in zip(ids, mask)]
    )
    close(model.get_text_features(ids, mask).pooler_output, expected)
    left = model.get_text_features(pad_left(ids, mask), pad_left(mask, mask)).pooler_output
    close(left, expected)
    wide = [F.pad(each, (3, 5)) for each in (ids, mask)]
    close(model.get_text_features(*wide).pooler_output, expected)


@every_variant
def test_batching_and_order_never_change_outputs(variant):
    captioner = tiny_captioner(variant)
    batch = random_batch(captioner.config, size=4)
    whole = captioner(**batch)
    order = torch.tensor([2, 0, 3, 1])
    permuted = captioner(**{name: tensor[order] for name, tensor in batch.items()})
    valid = batch["attention_mask"].bool()
    close(permuted.logits[valid[order]], whole.logits[order][valid[order]])
    close(permuted.image_embeds, whole.image_embeds[order])
    for row in range(4):
        single = captioner(**{name: tensor[row : row + 1] for name, tensor in batch.items()})
        close(single.logits[0, valid[row]], whole.logits[row, valid[row]])
        close(single.image_embeds[0], whole.image_embeds[row])


@every_variant
def test_padding_never_changes_fused_features(variant):
    model = tiny_captioner(variant).model
    batch = random_batch(model.config)
    whole = model.get_multimodal_features(**batch).last_hidden_state
    tokens = model.config.num_image_tokens + 5  # of row 1, which has two tokens of padding
    single = model.get_multimodal_features(batch["pixel_values"][1:2], batch["input_ids"][1:2, :5])
    close(whole[1, :tokens], single.last_hidden_state[0])


@every_variant
def test_image_states_of_the_caption_pass_equal_those_of_the_image_pass(variant):
    captioner = tiny_captioner(variant)
    batch = random_batch(captioner.config)
    captioned = captioner(**batch, output_hidden_states=True).hidden_states
    alone = captioner.get_image_features(batch["pixel_values"], output_hidden_states=True).hidden_states
    for with_text, without in zip(captioned[:-1], alone[:-1]):
        assert torch.equal(with_text[:, : captioner.config.num_image_tokens], without)


@every_variant
def test_a_caption_token_never_sees_a_later_one(variant):
    captioner = tiny_captioner(variant)
    batch = random_batch(captioner.config)
    del batch["attention_mask"]
    before = captioner(**batch).logits
    batch["input_ids"][:, 4] = 50
    after = captioner(**batch).logits
    close(after[:, :4], before[:, :4])
    assert (after[:, 4:] - before[:, 4:]).abs().max() > 1e-3


@every_variant
def test_image_tokens_in_the_input_ids_change_no_logits(variant):
    captioner = tiny_captioner(variant)
    batch, images = random_batch(captioner.config), captioner.config.num_image_tokens
    expected = captioner(**batch).logits
    placed = F.pad(batch["input_ids"], (images, 0), value=captioner.config.image_token_id)
    mask = F.pad(batch["attention_mask"], (images, 0), value=1)
    actual = captioner(pixel_values=batch["pixel_values"], input_ids=placed, attention_mask=mask).logits
    assert actual.shape[:2] == placed.shape
    close(actual[:, images:], expected)
    embeds = captioner.get_input_embeddings()(placed)
    actual = captioner(pixel_values=batch["pixel_values"], inputs_embeds=embeds, attention_mask=mask).logits
    close(actual[:, images:], expected)


@pytest.mark.parametrize("variant", ["routed", "top1", "dense", "vlmo"])
def test_an_expert_of_another_group_gets_no_gradient(variant):
    model = tiny_captioner(variant, fusion_start_layer=1).model
    batch = random_batch(model.config)
    passes = {
        "image": lambda: model.get_image_features(batch["pixel_values"]),
        "text": lambda: model.get_text_features(batch["input_ids"], batch["attention_mask"]),
        "joint": lambda: model.get_multimodal_features(**batch),
    }
    top = model.encoder.layers[1].feed_forward
    for used, run in passes.items():
        model.zero_grad(set_to_none=False)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run().last_hidden_state.square().sum().backward()
        for group in ("image", "text", "joint"):
            largest = max(parameter.grad.abs().max() for parameter in top[group].parameters())
            assert (largest > 0) == (group == used), (used, group, largest)


def test_one_expert_per_group_is_a_plain_feed_forward_bit_for_bit():
    layer = tiny_captioner().model.encoder.layers[0]
    hidden_states = torch.randn(2, 5, 32)
    plain = layer.feed_forward["image"]
    expected = F.linear(
        F.gelu(F.linear(hidden_states, plain.up_proj.weight, plain.up_proj.bias)),
        plain.down_proj.weight,
        plain.down_proj.bias,
    )
    assert torch.equal(layer.feed_forward(hidden_states, (("image", 5),)), expected)
    assert not [name for name, _ in layer.named_parameters() if "router" in name]


@pytest.mark.parametrize("variant", ["routed", "top1"])
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_every_experts_implementation_gives_the_same(variant, implementation):
    captioner = tiny_captioner(variant, initializer_range=0.05)
    captioner.set_experts_implementation("eager")
    batch = random_batch(captioner.config)
    expected = captioner(**batch, labels=batch["input_ids"])
    expected.loss.backward()
    gradients = {name: each.grad.clone() for name, each in captioner.named_parameters() if each.grad is not None}
    captioner.zero_grad()
    captioner.set_experts_implementation(implementation)
    assert captioner.config._experts_implementation == implementation
    actual = captioner(**batch, labels=batch["input_ids"])
    actual.loss.backward()
    close(actual.logits, expected.logits)
    for name, gradient in gradients.items():
        assert_close(dict(captioner.named_parameters())[name].grad, gradient, atol=2e-5, rtol=1e-4, msg=name)


def test_grouped_linear_equals_one_matrix_after_the_other():
    torch.manual_seed(0)
    counts = torch.tensor([0, 37, 1, 90, 5])
    rows = torch.randn(int(counts.sum()), 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.cat([F.linear(part, w, b) for part, w, b in zip(rows.split(counts.tolist()), weight, bias)])
    actual = grouped_linear(rows, weight, bias, counts)
    assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(actual, (rows, weight, bias), upstream),
        torch.autograd.grad(expected, (rows, weight, bias), upstream),
    ):
        assert_close(one, other)
    order = torch.randperm(len(rows))
    torch.library.opcheck(torch.ops.mome.permute_rows, (rows, order, order.argsort()))
    torch.library.opcheck(torch.ops.mome.grouped_linear, (rows, weight, bias, counts))


def test_loading_the_file_again_leaves_the_operator_alone():
    before = torch.ops.mome.grouped_linear.default
    specification = importlib.util.spec_from_file_location("another_copy", kernels_mome.__file__)
    specification.loader.exec_module(importlib.util.module_from_spec(specification))
    assert torch.ops.mome.grouped_linear.default is before
    batch = random_batch(tiny_config("routed"))
    tiny_captioner("routed")(**batch, labels=batch["input_ids"]).loss.backward()


@pytest.mark.parametrize("variant", ["routed", "top1"])
def test_router_logits_tell_which_expert_took_which_token(variant):
    captioner = tiny_captioner(variant)
    batch, config = random_batch(captioner.config), captioner.config
    outputs = captioner.model(**batch, output_router_logits=True)
    assert len(outputs.router_logits) == config.num_hidden_layers
    for layer, logits in zip(captioner.model.encoder.layers, outputs.router_logits):
        assert logits["image"].shape == (3, config.num_image_tokens, config.experts_per_group)
        assert logits["text"].shape == (3, 7, config.experts_per_group)
        assert layer.feed_forward["image"].router.weight.shape == (config.experts_per_group, config.hidden_size)
    states = captioner.model.image_embedding(batch["pixel_values"])
    layer, seen = captioner.model.encoder.layers[0], []
    hook = layer.feed_forward["image"].experts.register_forward_hook(lambda module, args, output: seen.append(args[1]))
    captioner.model.encoder(states, (("image", config.num_image_tokens),))
    hook.remove()
    chosen = outputs.router_logits[0]["image"].topk(config.experts_per_token).indices
    assert torch.equal(seen[0].sort().values, chosen.flatten(0, 1).sort().values)
    assert captioner.model(**batch).router_logits is None


def test_equal_captions_are_positives():
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    ids = torch.tensor([[1, 7, 0], [1, 7, 0], [1, 8, 2]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1]])
    positives = same_caption(ids, mask)
    assert positives.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    rows, columns = logits.log_softmax(1), logits.log_softmax(0)
    image_to_text = -((rows[0, 0] + rows[0, 1]) / 2 + (rows[1, 0] + rows[1, 1]) / 2 + rows[2, 2]) / 3
    text_to_image = -((columns[0, 0] + columns[1, 0]) / 2 + (columns[0, 1] + columns[1, 1]) / 2 + columns[2, 2]) / 3
    assert_close(contrastive_loss(logits, positives), (image_to_text + text_to_image) / 2)
    clip = (F.cross_entropy(logits, torch.arange(3)) + F.cross_entropy(logits.T, torch.arange(3))) / 2
    assert_close(contrastive_loss(logits, torch.eye(3, dtype=torch.bool)), clip)


def test_router_losses_by_hand_and_blind_to_padding():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [9.0, -9.0]]])
    mask = torch.tensor([[1, 1, 0]])
    balance, z_loss = router_losses(*router_sums(logits, 1, mask))
    probabilities = logits[0, :2].softmax(-1).mean(0)
    assert_close(balance, 2 * (0.5 * probabilities[0] + 0.5 * probabilities[1]))
    assert_close(z_loss, logits[0, :2].logsumexp(-1).square().mean())


def test_router_losses_reach_the_loss_and_the_routers():
    captioner = tiny_captioner("routed")
    batch = random_batch(captioner.config)
    joint = captioner(**batch, labels=batch["input_ids"])
    rest = joint.contrastive_loss + 2 * joint.caption_loss
    assert joint.loss > rest
    (joint.loss - rest).backward()
    routers = [each for name, each in captioner.named_parameters() if "router" in name]
    assert routers and all(each.grad.abs().max() > 0 for each in routers)


def test_joint_loss_is_contrastive_plus_twice_the_caption_loss():
    captioner = tiny_captioner()
    batch = random_batch(captioner.config)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    joint = captioner(**batch, labels=labels)
    assert_close(joint.contrastive_loss, captioner.model(**batch, return_loss=True).loss)
    caption = F.cross_entropy(joint.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert_close(joint.caption_loss, caption)
    assert_close(joint.loss, joint.contrastive_loss + 2 * joint.caption_loss)


def test_a_training_step_runs_the_image_once():
    captioner, calls = tiny_captioner(), []
    captioner.model.image_embedding.register_forward_hook(lambda *_: calls.append(1))
    batch = random_batch(captioner.config)
    captioner(**batch, labels=batch["input_ids"]).loss.backward()
    assert len(calls) == 1


@pytest.mark.parametrize(
    "size, upstream",
    [("base", "beit3"), ("large", "beit3"), ("base", "vlmo"), ("large", "vlmo")],
)
def test_named_sizes_have_the_dimensions_of_the_papers(size, upstream):
    overrides = {"share_attention": upstream == "vlmo", "sub_layernorm": upstream == "beit3"}
    config = MomeConfig.from_size(size, **overrides)
    with torch.device("meta"):
        model = MomeModel(config)
    trunk = sum(parameter.numel() for parameter in model.encoder.parameters())
    width, layers = config.hidden_size, config.num_hidden_layers
    attention, feed_forward = 4 * width**2, 8 * width**2
    expected = layers * (2 * feed_forward + attention * (1 if upstream == "vlmo" else 2))
    assert abs(trunk / expected - 1) < 0.01


TEXTS = {"input_ids": torch.tensor([[1, 9, 2], [1, 8, 2]])}


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"pixel_values": torch.zeros(2, 3, 16, 24)}, r"\(2, 3, 16, 24\).*\(images, 3, 16, 16\)"),
        ({"pixel_values": torch.zeros(2, 1, 16, 16)}, r"\(2, 1, 16, 16\).*\(images, 3, 16, 16\)"),
        ({"pixel_values": torch.zeros(3, 16, 16)}, r"\(3, 16, 16\)"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, r"\(0, 4\)"),
        ({"input_ids": torch.ones(1, 25, dtype=torch.long)}, "25 tokens, max_position_embeddings is 24"),
        ({"input_ids": torch.tensor([[1, 99]])}, "holds 99, vocab_size is 99"),
        ({"input_ids": torch.tensor([[1, -7]])}, "holds -7, vocab_size is 99"),
        ({"input_ids": torch.zeros(2, 3, 16, 16)}, r"\(2, 3, 16, 16\).*torch.float32.*images are pixel_values=..."),
        ({"input_ids": [[1, 9, 2]]}, "input_ids is of type list: .*return_tensors='pt'"),
        ({"pixel_values": [torch.zeros(3, 16, 16)]}, "pixel_values is of type list: .*return_tensors='pt'"),
        ({"pixel_values": torch.zeros(1, 3, 16, 16, dtype=torch.uint8)}, "torch.uint8, not floats"),
        ({**TEXTS, "attention_mask": torch.tensor([[1, 1, 0]])}, r"attention_mask has shape \(1, 3\).*\(2, 3\)"),
        ({**TEXTS, "attention_mask": torch.ones(2, 2)}, r"attention_mask has shape \(2, 2\).*\(2, 3\)"),
        ({**TEXTS, "labels": TEXTS["input_ids"]}, "labels.*pass return_loss=True"),
        ({}, "neither pixel_values nor input_ids"),
        ({**TEXTS, "return_loss": True}, "0 images and 2 texts"),
    ],
)
def test_bad_input_is_refused_by_value_in_one_line(inputs, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_captioner().model(**inputs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pixel_values": None, "labels": torch.ones(3, 7, dtype=torch.long)}, "without images"),
        ({"labels": torch.ones(3, 6, dtype=torch.long)}, r"\(3, 6\), input_ids \(3, 7\)"),
        ({"pixel_values": torch.zeros(2, 3, 16, 16)}, "2 images and 3 texts"),
        ({"return_loss": True}, "return_loss=True without labels"),
        ({"input_ids": torch.zeros(3, 3, 16, 16)}, "torch.float32.*images are pixel_values=..."),
        ({"attention_mask": torch.ones(1, 7, dtype=torch.long)}, r"attention_mask has shape \(1, 7\)"),
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.full((3, 4), 3)}, "4 image tokens, an image has 5"),
        ({"input_ids": torch.full((3, 5), 3)}, "holds no text"),
        ({"input_ids": torch.tensor([[1, *[3] * 5, 9]] * 3), "attention_mask": None}, "before the text"),
        ({"input_ids": torch.ones(3, 25, dtype=torch.long), "attention_mask": None}, "25 tokens"),
    ],
)
def test_bad_captions_are_refused_before_the_image_is_encoded(changes, message):
    captioner, calls = tiny_captioner(), []
    captioner.model.image_embedding.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        captioner(**{**random_batch(captioner.config), **changes})
    assert not calls


def test_dropout_only_acts_in_training():
    config = tiny_config(hidden_dropout=0.5, attention_dropout=0.5)
    torch.manual_seed(0)
    captioner = MomeForConditionalGeneration(config)
    batch = random_batch(config)
    assert not torch.equal(captioner.train()(**batch).logits, captioner(**batch).logits)
    assert torch.equal(captioner.eval()(**batch).logits, captioner(**batch).logits)
