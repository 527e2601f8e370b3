"""Whole runs of the trainer: what it leaves, how it goes on, how it fails."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import peft
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModel, AutoProcessor

from models import tiny_captioner
from mome import MomeForConditionalGeneration
from mome.errors import MomeError, RecipeError
from mome.training import checkpoint, optimisation
from mome.training.model import captioner_name
from mome.training.recipe import Recipe
from mome.training.stop import StopSignal
from mome.training.trainer import Trainer, main
from test_objective import ENVIRONMENT, TESTS, torchrun
from test_training_data import numbers, png
from training_runs import MODEL, losses_of, write_data, write_recipe


@pytest.fixture
def fields(tmp_path):
    return write_data(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing disturbed: its recipe's fields and its folder."""
    fields = write_data(tmp_path_factory.mktemp("finished"))
    fields["evaluations"] = {"shapes": {"dataset": fields["dataset"], "split": "validation"}}
    fields["results"] = str(Path(fields["output"]).parent / "results.csv")
    return fields, main(Recipe.from_dict(fields | {"evaluate_before": True}))


def run(fields: dict, **changes) -> Path | None:
    return main(Recipe.from_dict(fields | changes))


def in_a_process(fields: dict, *arguments: str, **options) -> subprocess.Popen:
    recipe = write_recipe(Path(fields["output"]).parent / "recipe.yaml", fields)
    command = [sys.executable, str(TESTS / "training_runs.py"), str(recipe), *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, **options)


def elsewhere(fields: dict, name: str) -> dict:
    return fields | {"output": str(Path(fields["output"]).parent / name)}


# -------------------------------------------------------------------------------------------- what a run leaves


def test_a_run_ends_as_a_folder_that_from_pretrained_loads(finished):
    fields, output = finished
    model, processor = AutoModel.from_pretrained(output), AutoProcessor.from_pretrained(output)
    captioner = MomeForConditionalGeneration.from_pretrained(output).eval()
    row = datasets.load_from_disk(fields["dataset"])["validation"][0]
    outputs = model(**processor(text=["a red square"], images=row["image"], return_tensors="pt"))
    assert outputs.logits_per_image.shape == (1, 1)
    ids = captioner.generate(**processor(images=row["image"], return_tensors="pt"), max_new_tokens=5)
    assert processor.batch_decode(ids, skip_special_tokens=True)
    assert (output / "modeling_mome.py").exists()


def test_its_card_and_results_tell_how_good_it_is(finished):
    fields, output = finished
    card = (output / "README.md").read_text()
    assert "text_to_image_r1" in card and "Limitations" in card and card.startswith("---\n")
    with Path(fields["results"]).open(newline="") as file:
        named = [row["metric"] for row in csv.DictReader(file)]
    metrics = (
        "text_to_image_r1",
        "image_to_text_r10",
        "zero_shot_top5",
        "caption_exact",
        "caption_f1",
        "caption_bleu4",
    )
    for stage in ("before", "after"):
        for metric in metrics:
            assert named.count(f"shapes, {stage}: {metric}") == 1
    assert (output / "sheets" / "shapes-00000012.png").exists()


def test_the_loss_falls(fields):
    changes = {"steps": 60, "warmup_steps": 5, "learning_rate": 3e-3, "positive_column": "text", "checkpoint_every": 0}
    losses = losses_of(run(fields, **changes))
    assert sum(losses[step] for step in range(56, 61)) < 0.6 * sum(losses[step] for step in range(1, 6))


def test_the_average_of_the_weights_is_what_is_saved(finished, fields):
    output = run(elsewhere(fields, "plain"), ema_decay=None)
    plain, averaged = (MomeForConditionalGeneration.from_pretrained(each) for each in (output, finished[1]))
    assert losses_of(output) == losses_of(finished[1])
    distances = [(a - b).abs().max() for a, b in zip(plain.parameters(), averaged.parameters())]
    assert max(distances) > 1e-4


def test_only_two_checkpoints_are_kept_and_no_part_of_one(finished):
    names = sorted(each.name for each in finished[1].glob("checkpoint-*"))
    assert names == ["checkpoint-00000009", "checkpoint-00000012"]


def test_a_mean_of_weights_follows_its_formula():
    model = torch.nn.Linear(2, 1, bias=False)
    average, expected = optimisation.MovingAverage(model, 0.5), model.weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            model.weight.fill_(step)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with average.in_place():
        torch.testing.assert_close(model.weight.detach(), expected)
    assert (model.weight == 5).all()


def test_the_rate_warms_up_linearly_and_falls_along_a_cosine():
    recipe = Recipe(output="", dataset="", checkpoint="", steps=9, warmup_steps=4, final_learning_rate_share=0.2)
    found = [optimisation.rate_factor(step, 9, recipe) for step in range(10)]
    cosine = [0.2 + 0.8 * (1 + math.cos(math.pi * share / 5)) / 2 for share in range(6)]
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, *cosine], abs=1e-12)
    assert cosine[0] == 1.0 and cosine[-1] == pytest.approx(0.2)


@pytest.mark.parametrize("module", ["mome.training", "mome.training.finetune"])
def test_accelerate_launches_a_recipe_by_either_name(module, fields):
    recipe = write_recipe(Path(fields["output"]).parent / "recipe.yaml", fields | {"checkpoint_every": 0})
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", module]

    def launched(*arguments: str) -> subprocess.CompletedProcess:
        command = [*launch, "--config", str(recipe), *arguments]
        return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)

    done = launched("--steps", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(losses_of(fields["output"])) == [1, 2]
    assert (Path(fields["output"]) / "model.safetensors").exists()
    if module == "mome.training":
        refused = launched("--steps", "3")
        assert refused.returncode != 0 and "error: " in refused.stderr and "add --resume" in refused.stderr


# --------------------------------------------------------------------------------------------------- going on


def test_a_killed_run_goes_on_as_if_nothing_had_been(finished, fields):
    process = in_a_process(fields, "--kill-at", "8")
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    output = run(fields, resume=True)
    assert losses_of(output) == losses_of(finished[1])
    ours, theirs = (MomeForConditionalGeneration.from_pretrained(each).state_dict() for each in (output, finished[1]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_a_checkpoint_to_go_on_from(number, finished, fields):
    process = in_a_process(fields | {"steps": 12, "checkpoint_every": 0})
    log = Path(fields["output"]) / "log.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 2):
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    steps = [int(each.name[-8:]) for each in Path(fields["output"]).glob("checkpoint-*")]
    assert len(steps) == 1
    if steps[0] < 12:  # else it came too late
        assert not (Path(fields["output"]) / "model.safetensors").exists()
    assert losses_of(run(fields, resume=True)) == losses_of(finished[1])


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_process_group_ends_a_run_with_workers_too(number, fields):
    """As a terminal sends Ctrl-C, and `timeout` SIGTERM: to the processes that load batches as well."""
    process = in_a_process(fields | {"num_workers": 1, "checkpoint_every": 0, "steps": 200}, start_new_session=True)
    log = Path(fields["output"]) / "log.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 2):
        time.sleep(0.02)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert len(list(Path(fields["output"]).glob("checkpoint-*"))) == 1
    assert not (Path(fields["output"]) / "model.safetensors").exists()


def test_two_processes_go_on_after_a_kill_too(fields):
    def both(name: str, *arguments: str, **changes):
        recipe = write_recipe(Path(fields["output"]).parent / f"{name}.yaml", elsewhere(fields, name) | changes)
        return torchrun(TESTS / "training_runs.py", str(recipe), *arguments)

    undisturbed = both("whole")
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    assert both("killed", "--kill-at", "7").returncode != 0
    again = both("killed", resume=True)
    assert again.returncode == 0, again.stderr[-3000:]
    folder = Path(fields["output"]).parent
    assert losses_of(folder / "killed") == losses_of(folder / "whole")
    assert len(losses_of(folder / "whole")) == 12


def test_sharded_processes_learn_the_same_and_go_on(fields):
    """FSDP2: every parameter is cut in two, the scalar temperature included."""
    fields = fields | {"steps": 4, "checkpoint_every": 2, "image_dropout": 0.0}
    fields["model"] = fields["model"] | {"hidden_dropout": 0.0}

    def two(name: str, *arguments: str, **changes):
        recipe = write_recipe(Path(fields["output"]).parent / f"{name}.yaml", elsewhere(fields, name) | changes)
        done = torchrun(TESTS / "training_runs.py", str(recipe), *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        return losses_of(elsewhere(fields, name)["output"])

    whole = two("sharded", "--fsdp", chunk_size=2)
    assert whole == pytest.approx(two("replicated"), rel=1e-4)
    folder = Path(fields["output"]).parent / "sharded"
    (folder / "checkpoint-00000004" / "manifest.json").unlink()
    assert two("sharded", "--fsdp", chunk_size=2, resume=True) == whole
    assert MomeForConditionalGeneration.from_pretrained(folder).model.logit_scale.shape == ()


def test_an_epoch_shows_every_row_once_also_across_a_stop(fields):
    fields["augmentations"] = []  # so that the first pixel tells which row it is
    trainer = Trainer(Recipe.from_dict(fields))
    seen = list(rows_of_the_first_epoch(trainer, batches=3))
    trainer.checkpoints.save(trainer.progress.step)
    resumed = Trainer(Recipe.from_dict(fields | {"resume": True}))
    assert (resumed.progress.step, resumed.progress.batch) == (3, 3)
    seen += rows_of_the_first_epoch(resumed)
    assert len(seen) == len(set(seen)) == 40  # of 44: batches are whole
    whole = Trainer(Recipe.from_dict(elsewhere(fields, "whole")))
    assert seen == list(rows_of_the_first_epoch(whole))


def test_changed_settings_of_the_optimiser_hold_when_a_run_goes_on(fields):
    trainer = Trainer(Recipe.from_dict(fields | {"learning_rate": 1e-3, "weight_decay": 0.1}))
    trainer.checkpoints.save(trainer.progress.step)
    changes = {"learning_rate": 5e-4, "weight_decay": 0.2, "betas": [0.8, 0.95], "resume": True}
    resumed = Trainer(Recipe.from_dict(fields | changes))
    before, after = (each.optimizer.param_groups for each in (trainer, resumed))
    assert [group["peak_lr"] for group in after] == [group["peak_lr"] / 2 for group in before]
    assert [group["weight_decay"] for group in after] == [2 * group["weight_decay"] for group in before]
    assert {tuple(group["betas"]) for group in after} == {(0.8, 0.95)}


def rows_of_the_first_epoch(trainer: Trainer, batches: int = 5):
    for batch in trainer.batches():
        if trainer.progress.epoch:
            return
        yield from numbers(batch)
        trainer.progress.step, trainer.progress.batch = trainer.progress.step + 1, trainer.progress.batch + 1
        if trainer.progress.batch == batches:
            return


def test_a_run_is_not_written_over(finished):
    with pytest.raises(RecipeError, match="checkpoint-00000012 is from an earlier run: add --resume"):
        run(finished[0])


def test_going_on_with_other_data_is_refused(finished):
    with pytest.raises(RecipeError, match="was written with batch_size=8, the recipe says 4"):
        run(finished[0], resume=True, batch_size=4)


# -------------------------------------------------------------------------------------------------- bad luck


@pytest.mark.parametrize("damage", ["truncated", "missing", "changed", "no manifest"])
def test_a_broken_checkpoint_is_named_and_the_one_before_is_taken(damage, finished, fields, caplog):
    with pytest.raises(SystemExit), _stop_at(8):
        run(fields)
    broken = Path(fields["output"]) / "checkpoint-00000006"
    path = broken / ("manifest.json" if damage == "no manifest" else "optimizer.bin")
    if damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "changed":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    else:
        path.unlink()
    output = run(fields, resume=True)
    assert "checkpoint-00000006 is damaged" in caplog.text
    assert losses_of(output) == losses_of(finished[1])


def _stop_at(step: int):
    """Leaves a run without a checkpoint, as a kill would, within this process."""
    from unittest import mock

    train_step = Trainer.train_step

    def stopping(trainer, batch):
        result = train_step(trainer, batch)
        if trainer.progress.step == step:
            raise SystemExit
        return result

    return mock.patch.object(Trainer, "train_step", stopping)


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(finished, fields, caplog, monkeypatch):
    save_state, calls = Accelerator.save_state, []

    def sometimes_full(accelerator, folder, *arguments, **keywords):
        calls.append(folder)
        save_state(accelerator, folder, *arguments, **keywords)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Accelerator, "save_state", sometimes_full)
    output = run(fields)
    assert "could not write" in caplog.text and "No space left on device" in caplog.text
    assert "the last checkpoint is" in caplog.text
    assert losses_of(output) == losses_of(finished[1])
    names = sorted(each.name for each in output.glob("checkpoint-*"))
    assert names == ["checkpoint-00000009", "checkpoint-00000012"]


def test_a_crash_while_a_checkpoint_is_finished_leaves_the_old_one(fields, monkeypatch):
    monkeypatch.setattr(checkpoint.Checkpoints, "_finish", lambda *_: (_ for _ in ()).throw(OSError("gone")))
    output = run(fields, steps=4)
    assert not list(output.glob("checkpoint-*")) and (output / "model.safetensors").exists()


def with_corrupt_images(fields: dict, share: float) -> dict:
    saved = datasets.load_from_disk(fields["dataset"])
    rows = list(saved["train"].cast_column("image", datasets.Image(decode=False)))
    for index in range(0, len(rows), round(1 / share)):
        rows[index] = rows[index] | {"image": {"bytes": png(index)[:50], "path": None}}
    folder = Path(fields["dataset"]).parent / "corrupt"
    datasets.Dataset.from_list(rows, features=saved["train"].features).save_to_disk(folder)
    return fields | {"dataset": str(folder)}


def test_five_per_cent_of_corrupt_images_are_left_out_counted_and_named(fields, caplog):
    output = run(with_corrupt_images(fields, 0.05), max_bad_share=0.1)
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert records[-1]["bad"] > 0 and "skipped row 20: " in caplog.text
    assert f"{records[-1]['bad']} rows left out" in (output / "README.md").read_text()


def test_too_many_corrupt_images_stop_the_run(fields):
    with pytest.raises(RecipeError, match=r"rows could not be used, more than max_bad_share=0.01: row \d+: "):
        run(with_corrupt_images(fields, 0.05), max_bad_share=0.01, steps=50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_column": "caption"}, "has no column 'caption'"),
        ({"processor": "nowhere"}, "'nowhere' can't be loaded"),
        ({"model": None, "checkpoint": "nowhere"}, "'nowhere' can't be loaded"),
        ({"model": {"size": "huge"}}, "unknown size 'huge'"),
        ({"model": {"hidden_sizes": 3}}, "unknown MomeConfig key 'hidden_sizes'"),
        ({"batch_size": 512}, "fewer than batch_size=512"),
        ({"max_text_tokens": 99}, "max_text_tokens=99 is more than the model's 16"),
        ({"freeze": ["*.nothing"]}, "matches no parameter"),
        ({"freeze": ["*"]}, "leaves nothing to train"),
        ({"rates": {"*.nothing": 0.5}}, "rates pattern '\\*.nothing' matches no parameter"),
        ({"rates": {"*.image.*": 0}}, "rates: '\\*.image.\\*' has 0: must be above 0"),
        ({"evaluations": {"a": {"dataset": "x", "pools": 3}}}, "unknown field 'pools'"),
    ],
)
def test_what_cannot_be_done_is_said_before_training(change, message, fields):
    with pytest.raises(MomeError, match=message):
        run(fields, **change)


def test_rates_are_shares_of_the_learning_rate(fields):
    shares = {"*.image.*": 0.1, "text_embedding.*": 0.5}
    trainer = Trainer(Recipe.from_dict(fields | {"rates": shares, "model": MODEL | {"share_attention": False}}))
    names = {id(each): captioner_name(name) for name, each in trainer.model.named_parameters()}
    found = {names[id(each)]: group["peak_lr"] for group in trainer.optimizer.param_groups for each in group["params"]}
    for name, rate in found.items():
        share = 0.1 if ".image." in name else 0.5 if "text_embedding." in name else 1.0
        assert rate == pytest.approx(share * trainer.recipe.learning_rate), name
    assert len(set(found.values())) == 3


def test_a_scale_that_does_not_learn_or_has_a_bias_is_not_clamped():
    clip, frozen = tiny_captioner(), tiny_captioner()
    siglip = tiny_captioner("siglip")
    for model in (clip, frozen, siglip):
        model.model.logit_scale.data.fill_(4.8)
    frozen.model.logit_scale.requires_grad_(False)
    for model, clamped in ((clip, True), (frozen, False), (siglip, False)):
        optimisation.clamp_logit_scale(model)
        assert (model.model.logit_scale.item() < 4.7) == clamped


def test_a_loss_that_is_no_number_stops_the_run(fields):
    with pytest.raises(RecipeError, match="the loss is nan at step 2: lower learning_rate"):
        run(fields, learning_rate=float("inf"), max_grad_norm=0.0)


def test_ruined_weights_are_never_saved_between_two_lines_of_the_log(fields):
    with pytest.raises(RecipeError, match="the loss is nan at step 3"):
        run(fields, learning_rate=float("inf"), max_grad_norm=0.0, log_every=100, checkpoint_every=3)
    assert not list(Path(fields["output"]).glob("checkpoint-*"))


# ------------------------------------------------------------------------------------------------ fine-tuning


def test_adapters_train_few_parameters_and_load_through_peft(finished, fields):
    start = {"model": None, "processor": None, "checkpoint": str(finished[1])}
    trainer = Trainer(Recipe.from_dict(fields | start | {"lora": {"r": 1}, "learning_rate": 1e-2}))
    trained = sum(each.numel() for each in trainer.captioner.parameters() if each.requires_grad)
    assert all("lora" in name for name, each in trainer.captioner.named_parameters() if each.requires_grad)
    assert 0 < trained < 0.1 * sum(each.numel() for each in trainer.captioner.parameters())
    output = trainer.train()
    base = MomeForConditionalGeneration.from_pretrained(finished[1])
    adapted = peft.PeftModel.from_pretrained(base, output / "adapter").eval()
    merged = MomeForConditionalGeneration.from_pretrained(output).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = adapted.get_image_features(pixels).pooler_output
        torch.testing.assert_close(merged.get_image_features(pixels).pooler_output, found)
        before = MomeForConditionalGeneration.from_pretrained(finished[1]).eval().get_image_features(pixels)
    assert (before.pooler_output - found).abs().max() > 1e-3


def test_frozen_parameters_stay_and_lower_layers_learn_more_slowly(finished, fields):
    start = {"model": None, "processor": None, "checkpoint": str(finished[1]), "layer_decay": 0.5}
    recipe = Recipe.from_dict(fields | start | {"freeze": ["text_embedding.*"], "ema_decay": None})
    trainer = Trainer(recipe)
    rates = {group["peak_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {1e-3 * 0.5**depth for depth in range(4)}
    output = trainer.train()
    before, after = (MomeForConditionalGeneration.from_pretrained(each).state_dict() for each in (finished[1], output))
    same = [name for name in before if torch.equal(before[name], after[name])]
    # The caption head's matrix is that of the words.
    expected = [name for name in before if "text_embedding" in name or name == "lm_head.decoder.weight"]
    assert sorted(same) == sorted(expected)


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"chunk_size": 8}, {"num_workers": 1}])
def test_what_saves_memory_or_time_changes_no_loss(changes, finished, fields):
    found, expected = losses_of(run(fields, **changes)), losses_of(finished[1])
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_stream_trains_and_goes_on(fields, tmp_path):
    saved = datasets.load_from_disk(fields["dataset"])["train"]
    (tmp_path / "stream").mkdir()
    saved.to_parquet(tmp_path / "stream" / "train.parquet")
    stream = fields | {"dataset": str(tmp_path / "stream"), "streaming": True, "shuffle_buffer": 10}
    whole = losses_of(run(elsewhere(stream, "whole")))
    with pytest.raises(SystemExit), _stop_at(8):
        run(stream)
    assert losses_of(run(stream, resume=True)) == whole


def test_a_compiled_model_learns_the_same(fields, monkeypatch):
    """With dropout it draws other random numbers, so without. Inductor would take a minute: a quick backend."""
    graphs, compile_module = [], torch.nn.Module.compile

    def counted(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend=counted))
    plain = fields | {"model": fields["model"] | {"hidden_dropout": 0.0}, "steps": 4}
    found = run(elsewhere(plain, "compiled"), compile=True)
    assert losses_of(found) == pytest.approx(losses_of(run(plain)), rel=1e-4)
    assert len(graphs) == 1, "the forward pass breaks into several graphs"


def test_routing_is_logged_for_every_layer_and_group(fields):
    routed = fields["model"] | {"experts_per_group": 4, "experts_per_token": 2, "expert_intermediate_size": 32}
    output = run(fields, model=routed, steps=3)
    record = json.loads((output / "log.jsonl").read_text().splitlines()[-1])
    for group in ("image", "text"):
        for layer in range(2):
            least, most = (record[f"routing/{group}/layer_{layer}/{bound}"] for bound in ("least", "most"))
            assert 0 <= least <= 0.25 <= most <= 0.5
    assert record["router"] > 0


def test_trackers_get_the_figures(fields):
    output = run(fields, tracker="tensorboard", steps=3)
    assert list(output.rglob("events.out.tfevents.*"))


def test_a_second_signal_ends_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    stop = StopSignal()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        stop.restore()
        signal.signal(signal.SIGINT, before)
