"""The losses of a batch are the same, and so are their gradients, however the batch is split."""

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate import Accelerator

from distributed_worker import dropout_pair, gradients, whole_batch
from models import random_batch, tiny_captioner
from mome.errors import RecipeError
from mome.losses_mome import contrastive_loss, sigmoid_loss
from mome.training import contrastive, objective
from mome.training.batches import Batch
from mome.training.recipe import Recipe

TESTS = Path(__file__).parent
# Processes import the tests' modules, and the package from where this process has it.
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
}


def assert_equal_gradients(found: dict, expected: dict, bound: float = 1e-5):
    assert found.keys() == expected.keys() and len(found) > 20
    for name, gradient in expected.items():
        distance = (found[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-8)
        assert distance <= bound, f"{name}: {distance:.2e}"


def torchrun(script: str | Path, *arguments: str, processes: int = 2, module: bool = False, **options):
    """Runs a script with so many processes that talk over gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [*["-m"] * module, str(script), *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, **options)


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(TESTS / "distributed_worker.py", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "gradients.pt")


@pytest.mark.parametrize("variant", ["dense", "routed", "siglip"])
def test_two_processes_with_and_without_chunks_have_the_gradient_of_one(variant, of_two_processes):
    one = gradients(variant, image_dropout=0.0)
    assert_equal_gradients(of_two_processes[f"{variant}-None"], one)
    assert_equal_gradients(of_two_processes[f"{variant}-4"], one)


def test_a_gather_that_loses_its_gradient_is_noticed(of_two_processes):
    one = gradients("dense", image_dropout=0.0)
    with pytest.raises(AssertionError):
        assert_equal_gradients(of_two_processes["dense-no-gradient-through-the-gather"], one)


@pytest.mark.parametrize("variant", ["dense", "routed", "top1", "masked", "relative", "unshared", "siglip"])
@pytest.mark.parametrize("chunk_size", [4, 5])
def test_chunks_have_the_gradient_of_the_whole_batch(variant, chunk_size):
    whole = gradients(variant, image_dropout=0.0)
    assert_equal_gradients(gradients(variant, chunk_size, image_dropout=0.0), whole)


@pytest.mark.parametrize("recipe", [{"caption_weight": 0.0}, {"contrastive_weight": 0.0}])
def test_either_loss_alone_is_the_same_in_chunks(recipe):
    recipe["image_dropout"] = 0.0
    whole = gradients("routed", **recipe)
    assert_equal_gradients(gradients("routed", 4, **recipe), whole)


@pytest.mark.parametrize("variant", ["dense", "routed"])
def test_chunks_with_dropout_see_the_same_random_numbers_in_both_runs(variant, of_two_processes, monkeypatch):
    found, expected = dropout_pair(variant)
    assert_equal_gradients(found, expected)
    assert_equal_gradients(of_two_processes[f"{variant}-dropout"], of_two_processes[f"{variant}-dropout-at-once"])
    # and the comparison would notice if they did not
    monkeypatch.setattr(objective.RandomState, "replayed", lambda self: contextlib.nullcontext())
    with pytest.raises(AssertionError):
        assert_equal_gradients(gradients(variant, 4, dropout=0.2), found)


def test_the_loss_over_ranks_is_the_models_own_on_one_process():
    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(9, 8), dim=1) for _ in range(2))
    ids = torch.tensor([0, 1, 2, 3, 0, 5, 6, 1, 8])
    expected = contrastive_loss(20 * images @ texts.T, ids[:, None] == ids[None])
    valid = torch.ones(9, dtype=torch.bool)
    scale = torch.tensor(20.0)
    torch.testing.assert_close(
        contrastive.contrastive_loss_over_ranks(images, texts, scale, ids[:, None], valid), expected
    )
    # Rows that can't be used are as if they weren't there.
    keep = valid.clone()
    keep[[2, 4]] = False
    found = contrastive.contrastive_loss_over_ranks(images, texts, scale, ids[:, None], keep)
    images, texts, ids = images[keep], texts[keep], ids[keep]
    torch.testing.assert_close(found, contrastive_loss(20 * images @ texts.T, ids[:, None] == ids[None]))


def test_the_sigmoid_loss_over_ranks_is_the_models_own_on_one_process():
    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(9, 8), dim=1) for _ in range(2))
    ids = torch.tensor([0, 1, 2, 3, 0, 5, 6, 1, 8])
    keep = torch.ones(9, dtype=torch.bool)
    keep[[2, 4]] = False
    scale, bias = torch.tensor(20.0), torch.tensor(-3.0)
    found = contrastive.contrastive_loss_over_ranks(images, texts, scale, ids[:, None], keep, bias)
    images, texts, ids = images[keep], texts[keep], ids[keep]
    torch.testing.assert_close(found, sigmoid_loss(20 * images @ texts.T - 3, ids[:, None] == ids[None]))


@pytest.mark.parametrize("options", [{}, {"caption_experts": True}])
def test_the_joint_loss_of_siglip_is_that_of_the_captioner(options):
    """Texts come as SigLIP's tokenizer writes them, without [BOS]; its caption predicts every word."""
    captioner = tiny_captioner("siglip", experts_per_group=3, experts_per_token=2, **options).train()
    batch = whole_batch(captioner.config)
    ids, mask = batch.input_ids[:, 1:], batch.attention_mask[:, 1:]
    given = {"pixel_values": batch.pixel_values.float(), "input_ids": ids, "attention_mask": mask}
    expected = captioner(**given, labels=ids.masked_fill(mask == 0, -100))
    every = torch.ones(len(ids), dtype=torch.bool)
    equal = torch.arange(len(ids))
    equal[20] = 5  # the two equal texts of the batch
    batch = replace(
        batch,
        **given,
        valid=every,
        captioned=every,
        positive_ids=equal[:, None],
        teacher_embeds=None,
    )
    recipe = Recipe(output="-", dataset="-", checkpoint="-", steps=1)
    losses, totals = objective.backward(Accelerator(cpu=True), objective.PairModel(captioner), batch, recipe)
    assert totals.caption_tokens == int(mask.sum())
    torch.testing.assert_close(losses.loss, expected.loss, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(losses.contrastive, expected.contrastive_loss, atol=1e-4, rtol=1e-5)


def test_the_joint_loss_is_that_of_the_captioner():
    captioner = tiny_captioner("routed").train()
    batch = whole_batch(captioner.config)
    keep = batch.valid
    given = {
        "pixel_values": batch.pixel_values[keep].float(),
        "input_ids": batch.input_ids[keep],
        "attention_mask": batch.attention_mask[keep],
    }
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    expected = captioner(**given, labels=labels).loss
    model = objective.PairModel(captioner)
    # Padding is masked out of the ids before they are compared, as the captioner does.
    masked = given["input_ids"].masked_fill(given["attention_mask"] == 0, -1)
    ids = torch.tensor([hash(tuple(row.tolist())) for row in masked])[:, None]
    every_row = torch.ones(len(ids), dtype=torch.bool)
    own = Batch(*given.values(), ids, every_row, every_row)
    recipe = Recipe(output="-", dataset="-", checkpoint="-", steps=1)
    found, _ = objective.backward(Accelerator(cpu=True), model, own, recipe)
    torch.testing.assert_close(found.loss, expected.detach())


def test_weights_that_the_recipe_leaves_open_are_those_of_the_models_config():
    given = {"output": "-", "dataset": "-", "checkpoint": "-", "steps": 1}
    captioner = tiny_captioner(contrastive_loss_weight=0.5, caption_loss_weight=3.0).double()
    batch, model = whole_batch(captioner.config), objective.PairModel(captioner)

    def loss_of(**weights):
        losses, _ = objective.backward(
            Accelerator(cpu=True), model, batch, Recipe(**given, teacher_weight=0.0, **weights)
        )
        gradient = captioner.lm_head.decoder.bias.grad.clone()
        captioner.zero_grad()
        return losses, gradient

    losses, gradient = loss_of()
    torch.testing.assert_close(losses.loss, 0.5 * losses.contrastive + 3 * losses.caption)
    named, gradient_of_named = loss_of(contrastive_weight=1.0, caption_weight=1.5)
    torch.testing.assert_close(named.loss, named.contrastive + 1.5 * named.caption)
    torch.testing.assert_close(gradient_of_named, gradient / 2)
    open_recipe = Recipe(**given, caption_weight=0.0).with_weights_of(captioner.config)
    assert (open_recipe.contrastive_weight, open_recipe.caption_weight) == (0.5, 0.0)
    captioner.config.contrastive_loss_weight = 0.0
    with pytest.raises(RecipeError, match="nothing would be learnt"):
        Recipe(**given, caption_weight=0.0).with_weights_of(captioner.config)


def test_a_forward_pass_with_a_loss_waits_for_no_other_process(tmp_path):
    """One of two processes computes the joint loss of routed experts and its gradient, the other one does nothing."""
    done = torchrun(TESTS / "lonely_worker.py", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    captioner = tiny_captioner("routed")
    batch = random_batch(captioner.config)
    loss = captioner(**batch, labels=batch["input_ids"]).loss
    torch.testing.assert_close(torch.load(tmp_path / "loss.pt"), loss.detach())


def test_the_gather_leaves_the_gradient_that_it_gets_as_it_was(monkeypatch):
    given = torch.arange(8.0).view(4, 2)
    before = given.clone()
    monkeypatch.setattr(contrastive.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    own = contrastive._AllGather.backward(mock.Mock(own=slice(2, 4)), given)
    assert torch.equal(own, 2 * before[2:4]) and torch.equal(given, before)


def test_a_text_that_is_no_caption_is_told_from_others_and_not_learnt():
    captioner = tiny_captioner().double()
    batch, recipe = whole_batch(captioner.config), Recipe(output="-", dataset="-", checkpoint="-", steps=1)
    model, accelerator = objective.PairModel(captioner), Accelerator(cpu=True)
    losses, totals = objective.backward(accelerator, model, batch, recipe)
    changed = batch.input_ids.clone()
    changed[4, 1:3] = changed[4, 1:3] + 1  # row 4 is no caption
    other, other_totals = objective.backward(accelerator, model, replace(batch, input_ids=changed), recipe)
    assert torch.equal(other.caption, losses.caption) and other.contrastive != losses.contrastive
    everything = replace(batch, captioned=batch.valid)
    assert objective.Totals.of(everything).caption_tokens > totals.caption_tokens == other_totals.caption_tokens


def test_image_dropout_teaches_captions_without_an_image():
    with_image = gradients("dense", image_dropout=0.0)
    both = gradients("dense", image_dropout=0.25)
    assert not torch.equal(with_image["lm_head.decoder.bias"], both["lm_head.decoder.bias"])
