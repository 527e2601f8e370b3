"""CoCa through the trainer: it learns, keeps what is frozen, takes adapters, and is evaluated and saved."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from models import coca_batch, tiny_coca
from mome import CocaForConditionalGeneration
from mome.errors import RecipeError
from mome.training.average import main as average
from mome.training.objective import PairModel
from mome.training.recipe import Recipe
from mome.training.trainer import Trainer, main
from training_runs import losses_of, write_data


@pytest.fixture
def fields(tmp_path) -> dict:
    """A recipe that goes on from a random CoCa."""
    fields = write_data(tmp_path)
    processor = AutoProcessor.from_pretrained(fields["processor"])
    tokenizer = processor.tokenizer
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.pad_token_id, "filler_token_id": 5}
    captioner = tiny_coca(vocab_size=len(tokenizer), image_size=32, initializer_range=0.05, **ids)
    captioner.save_pretrained(tmp_path / "coca")
    processor.save_pretrained(tmp_path / "coca")
    changes = {"checkpoint": str(tmp_path / "coca"), "image_dropout": 0.0, "ema_decay": None, "steps": 6}
    return {name: each for name, each in fields.items() if name not in ("model", "processor")} | changes


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def test_a_run_learns_is_evaluated_and_ends_as_a_folder_that_loads(fields):
    fields["evaluations"] = {"shapes": {"dataset": fields["dataset"], "split": "validation"}}
    output = main(Recipe.from_dict(fields | {"steps": 30, "learning_rate": 3e-3}))
    losses = losses_of(output)
    assert sum(losses[step] for step in range(26, 31)) < 0.8 * sum(losses[step] for step in range(1, 6))
    assert type(AutoModelForImageTextToText.from_pretrained(output)) is CocaForConditionalGeneration
    assert "modeling_coca.py" in {path.name for path in output.iterdir()}
    card = (output / "README.md").read_text()
    assert "| caption decoder, layers × width × heads | 3 × 32 × 8 |" in card and "| caption F1 |" in card


def test_chunks_and_checkpointing_change_no_loss(fields):
    whole = losses_of(main(Recipe.from_dict(fields)))
    for name, change in (("chunks", {"chunk_size": 4}), ("checkpointing", {"gradient_checkpointing": True})):
        other = losses_of(main(Recipe.from_dict({**fields, **change, "output": f"{fields['output']}-{name}"})))
        assert other == pytest.approx(whole, rel=1e-4)


def test_frozen_parameters_stay_and_lower_layers_learn_more_slowly(fields):
    recipe = Recipe.from_dict(fields | {"layer_decay": 0.5, "freeze": ["model.image_*", "model.text_*"]})
    trainer = Trainer(recipe)
    before, after = weights_of(fields["checkpoint"]), weights_of(trainer.train())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(("decoder.", "lm_head.", "model.logit_scale")) for name in changed)
    slowly = fields | {"layer_decay": 0.5, "output": f"{fields['output']}-slow"}
    rates = {group["peak_lr"] for group in Trainer(Recipe.from_dict(slowly)).optimizer.param_groups}
    assert rates == {1e-3 * 0.5**depth for depth in range(4)}


@pytest.mark.parametrize("weight", ["contrastive_weight", "caption_weight"])
def test_what_no_loss_reaches_is_not_trained(weight, fields):
    before, after = weights_of(fields["checkpoint"]), weights_of(main(Recipe.from_dict(fields | {weight: 0.0})))
    same = {name for name in before if torch.equal(before[name], after[name])}
    captions = {name for name in before if name.startswith(("decoder.", "lm_head."))}
    embeds = {"model.text_embedding.cls_token", "model.logit_scale", "model.text_norm.weight", "model.text_norm.bias"}
    embeds |= {"model.image_projection.weight", "model.text_projection.weight"}
    assert same == (captions if weight == "caption_weight" else embeds)


def test_adapters_train_few_parameters(fields):
    trainer = Trainer(Recipe.from_dict(fields | {"lora": {"r": 1}, "learning_rate": 1e-2}))
    trained = [name for name, each in trainer.captioner.named_parameters() if each.requires_grad]
    assert trained and all("lora" in name for name in trained)
    touched = {name.split(".lora_")[0].rpartition(".")[2] for name in trained}
    assert touched == {"query_key_value", "query", "key_value", "output", "up_proj", "down_proj"}
    name = "text_encoder.layers.0.attention.output.weight"
    merged, before = AutoModel.from_pretrained(trainer.train()).state_dict(), weights_of(fields["checkpoint"])
    assert not torch.equal(merged[name], before[f"model.{name}"])


def test_captions_without_images_are_refused_before_training(fields):
    with pytest.raises(RecipeError, match="image_dropout=0.1: CoCa writes no captions without an image"):
        Trainer(Recipe.from_dict(fields | {"image_dropout": 0.1}))


def test_the_losses_of_the_trainer_are_those_of_the_model():
    captioner = tiny_coca()
    batch = coca_batch(captioner.config)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = captioner(**batch, labels=labels)
    every_row = torch.ones(4, dtype=torch.bool)
    outputs = PairModel(captioner)(**batch, valid=every_row, captioned=every_row)
    tokens = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(outputs.caption_loss / tokens, expected.caption_loss)
    torch.testing.assert_close(outputs.image_embeds, expected.image_embeds)


def test_related_checkpoints_are_averaged(fields, tmp_path):
    output = main(Recipe.from_dict(fields))
    average([fields["checkpoint"], str(output), "--output", str(tmp_path / "mean")])
    first, second, mean = map(weights_of, (fields["checkpoint"], output, tmp_path / "mean"))
    for name, each in mean.items():
        torch.testing.assert_close(each, (first[name] + second[name]) / 2)
