"""transformers' own `Trainer`: however it cuts a batch, the gradients of every loss add up to those of the whole."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import SequentialSampler, default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments

from models import random_batch, tiny_captioner, tiny_coca
from mome.losses_mome import caption_loss, contrastive_loss, same_caption

PARTS = {
    "contrastive": {"caption_loss_weight": 0.0, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0},
    "caption": {"contrastive_loss_weight": 0.0, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0},
    "router": {"contrastive_loss_weight": 0.0, "caption_loss_weight": 0.0, "router_z_loss_coef": 0.1},
    "joint": {},
}


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = gradients_of(model)


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def pairs(config, equal: bool, placed: bool = False) -> list[dict]:
    """Eight pairs; their captions have as many labels each, or 5 and 3 to 6."""
    batch = random_batch(config, size=8)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    if not equal:
        labels[0, 3:] = labels[5, 2:] = -100
    else:
        batch["input_ids"][:, 5:], labels[:, 5:], batch["attention_mask"][:, 5:] = 0, -100, 0
    if placed:
        images = config.num_image_tokens
        for name, value in (("input_ids", config.image_token_id), ("attention_mask", 1)):
            batch[name] = F.pad(batch[name], (images, 0), value=value)
        labels = F.pad(labels, (images, 0), value=config.image_token_id)
    batch["labels"] = labels
    return [{name: each[row] for name, each in batch.items()} for row in range(8)]


def trained(
    model, data, steps: int, folder, collate=default_collate, compute_loss_func=None, **options
) -> dict[str, torch.Tensor]:
    """The gradients that the optimizer gets when `Trainer` adds up those of so many parts of all data."""
    gradients = Gradients()
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=-(-len(data) // steps),
        gradient_accumulation_steps=steps,
        max_steps=1,
        max_grad_norm=0,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )
    given = {"train_dataset": data, "data_collator": collate, "compute_loss_func": compute_loss_func}
    trainer = Trainer(model, arguments, callbacks=[gradients], **given)
    trainer._get_train_sampler = lambda *_: SequentialSampler(data)
    trainer.train()
    return gradients.found


def by_hand(captioner, data, steps: int) -> dict[str, torch.Tensor]:
    """Each part's own means, weighted by its share of the labels."""
    captioner.zero_grad()
    size = -(-len(data) // steps)
    chunks = [default_collate(data[start : start + size]) for start in range(0, len(data), size)]
    total = sum(int((chunk["labels"][:, 1:] != -100).sum()) for chunk in chunks)
    for chunk in chunks:
        share = int((chunk["labels"][:, 1:] != -100).sum()) / total
        (share * captioner(**chunk).loss).backward()
    return gradients_of(captioner)


def assert_equal_gradients(found: dict, expected: dict):
    for name, gradient in expected.items():
        assert_close(found.get(name, torch.zeros(())).expand_as(gradient), gradient, atol=1e-5, rtol=1e-4, msg=name)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
@pytest.mark.parametrize("part", PARTS)
def test_every_loss_has_the_gradient_of_the_mean_over_parts(part, equal, tmp_path):
    for steps in (1, 2, 4):
        captioner = tiny_captioner("routed", **PARTS[part])
        data = pairs(captioner.config, equal)
        expected = by_hand(captioner, data, steps)
        if equal:  # as many labels in each part: a plain mean
            captioner.zero_grad()
            for start in range(0, 8, 8 // steps):
                (captioner(**default_collate(data[start : start + 8 // steps])).loss / steps).backward()
            assert_equal_gradients(gradients_of(captioner), expected)
        captioner.zero_grad()
        assert_equal_gradients(trained(captioner, data, steps, tmp_path), expected)


@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_captions_have_the_gradient_of_the_mean_over_all_tokens(placed, average, tmp_path):
    gradients = []
    for steps in (1, 2, 3, 4):
        captioner = tiny_captioner(**PARTS["caption"])
        data = pairs(captioner.config, equal=placed, placed=placed)
        options = {"average_tokens_across_devices": average}
        gradients.append(trained(captioner, data, steps, tmp_path, **options))
    captioner, whole = tiny_captioner(**PARTS["caption"]), default_collate(data)
    inputs = {name: each for name, each in whole.items() if name != "labels"}
    loss = caption_loss(captioner(**inputs).logits, text_labels(captioner.config, whole))
    (captioner.config.caption_loss_weight * loss).backward()
    for each in gradients:
        assert_equal_gradients(each, gradients_of(captioner))


def text_labels(config, batch):
    """Labels in which the image's tokens and the first of the text are left out."""
    labels = batch["labels"].masked_fill(batch["labels"] == config.image_token_id, -100)
    return labels.masked_fill(labels == config.bos_token_id, -100)


@pytest.mark.parametrize("build", [tiny_captioner, tiny_coca])
def test_labels_that_the_trainer_takes_away_are_missed(build, tmp_path):
    """Its own label smoothing would compare each token with itself, since it knows no model of images and text."""
    captioner = build()
    data = pairs(captioner.config, equal=True)
    with pytest.raises(ValueError, match="label_smoothing_factor has taken them"):
        trained(captioner, data, 2, tmp_path, label_smoothing_factor=0.1)
    captioner.accepts_loss_kwargs = False  # for who computes a loss from the logits
    logits = []

    def loss_of(outputs, labels, num_items_in_batch=None):
        logits.append(outputs.logits)
        assert labels.shape == outputs.logits.shape[:2]
        return caption_loss(outputs.logits, labels)

    trained(captioner, data, 2, tmp_path, compute_loss_func=loss_of)
    assert len(logits) == 2


@pytest.mark.parametrize("with_labels", [True, False])
def test_an_embedder_alone_has_the_mean_over_parts(with_labels, tmp_path):
    for steps in (1, 2, 4):
        model = tiny_captioner("routed").model
        data = pairs(model.config, equal=True)
        if not with_labels:
            for each in data:
                del each["labels"]
        for start in range(0, 8, 8 // steps):
            chunk = default_collate(data[start : start + 8 // steps])
            chunk.pop("labels", None)
            (model(**chunk, return_loss=True).loss / steps).backward()
        expected = gradients_of(model)
        model.zero_grad()
        found = trained(model, data, steps, tmp_path, lambda rows: {**default_collate(rows), "return_loss": True})
        assert_equal_gradients(found, expected)


def test_parts_of_the_loss_are_those_of_the_call_without_a_batch_around_it():
    captioner = tiny_captioner("routed")
    batch = default_collate(pairs(captioner.config, equal=False))
    alone = captioner(**batch)
    number = int((batch["labels"][:, 1:] != -100).sum())
    for share in (1, 2):
        part = captioner(**batch, num_items_in_batch=torch.tensor(share * number))
        for name in ("loss", "contrastive_loss", "caption_loss"):
            assert_close(part[name], alone[name] / share)
    logits = captioner.model(**{name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")})
    same = same_caption(batch["input_ids"], batch["attention_mask"])
    assert_close(alone.contrastive_loss, contrastive_loss(logits.logits_per_image, same))


def test_labels_that_ask_for_nothing_leave_the_contrastive_loss():
    captioner = tiny_captioner()
    batch = default_collate(pairs(captioner.config, equal=True))
    expected = captioner(**batch)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    losses = captioner(**batch)
    assert losses.caption_loss == 0
    assert_close(losses.loss, captioner.config.contrastive_loss_weight * expected.contrastive_loss)
    losses.loss.backward()
    assert all(each.isfinite().all() for each in gradients_of(captioner).values())
    for nothing in (0, torch.tensor(0)):
        with pytest.raises(ValueError, match="num_items_in_batch=0: all labels are -100"):
            captioner(**batch, num_items_in_batch=nothing)
