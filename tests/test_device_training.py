"""Training with everything on the device, on the CPU at tiny size."""

import contextlib
import functools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModel, AutoModelForImageTextToText

import device_worker
from builders import build_processor
from icon_data import GLOSSES, RELATED, SHAPES, TAGS, words, write_data, write_teacher
from mome.errors import MomeError
from mome.losses_mome import contrastive_loss
from mome.training.device import capture, phases, speed, trainer
from mome.training.device.objective import StepLosses
from mome.training.device.recipe import DeviceRecipe

MODEL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "patch_embedding_type": "conv_stem",
    "share_attention": False,
    "projection_dim": 16,
    "experts_per_group": 4,
    "experts_per_token": 2,
    "expert_intermediate_size": 32,
    "hidden_dropout": 0.1,
}


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    """A recipe's fields, with data set, teacher and processor of their own."""
    folder = tmp_path_factory.mktemp("device")
    write_data(folder / "data", {"train": 96, "validation": 16, "test": 16, "freehand": 16})
    texts = [*SHAPES, *sum(TAGS.values(), []), *sum(RELATED.values(), []), *GLOSSES.values(), "red", "round"]
    write_teacher(folder / "teacher.parquet", texts)
    build_processor(32, words()).save_pretrained(folder / "processor")
    return {
        "data": str(folder / "data"),
        "teacher": str(folder / "teacher.parquet"),
        "processor": str(folder / "processor"),
        "model": MODEL,
        "steps": 60,
        "text_share": 0.25,
        "second_from": 0.7,
        "second_times": 2,
        "batch_size": 16,
        "start_batch_size": 8,
        "start_share": 0.4,
        "text_batch_size": 32,
        "text_tokens": 12,
        "caption_tokens": 6,
        "learning_rate": 3e-3,
        "plateau": 1.2,
        "plateau_steps": 5,
        "drawing": {
            "colour": 0.5,
            "redraw": 0.3,
            "stretch": 0.2,
            "turn": 0.3,
            "warp": 0.02,
            "recolour": 0.2,
            "noise": 0.03,
        },
        "evaluations": {"freehand": ["freehand"]},
        "log_every": 5,
        "ema_decay": 0.9,
    }


def recipe(fields, output, **changes) -> DeviceRecipe:
    return DeviceRecipe.from_dict(fields | {"output": str(output)} | changes)


def records(output, key) -> list[dict]:
    return [
        each for line in (Path(output) / "log.jsonl").read_text().splitlines() if key in (each := json.loads(line))
    ]


@pytest.fixture(scope="module")
def finished(fields, tmp_path_factory):
    """The folder of an uninterrupted run."""
    return trainer.main(recipe(fields, tmp_path_factory.mktemp("run") / "run"))


def test_the_losses_fall(finished):
    rows = records(finished, "contrastive")
    text = [each for each in rows if each["stage"] == "text"]
    pairs = [each for each in rows if each["stage"] != "text"]
    assert [each["step"] for each in rows] == list(range(5, 61, 5))
    assert [each["stage"] for each in rows] == ["text"] * 3 + ["first"] * 5 + ["second"] * 4
    assert text[-1]["teacher"] < text[0]["teacher"] - 0.1 and text[-1]["caption"] < text[0]["caption"]
    # Batches grow meanwhile, and with them the loss of guessing.
    first, last = pairs[0]["contrastive"] / math.log(8), pairs[-1]["contrastive"] / math.log(16)
    assert last < 0.95 * first, (first, last)
    assert pairs[-1]["caption"] < 0.9 * pairs[0]["caption"]
    assert pairs[-1]["pairs"] == 9 * 8 + 36 * 16
    assert len(records(finished, "plateau_left")) == 1


def test_both_stages_leave_weights_that_auto_classes_load(finished, fields):
    research, final = finished / "research", finished
    runs = [json.loads((folder / "run.json").read_text()) for folder in (research, final)]
    assert [run["steps"] for run in runs] == [42, 60] and runs[0]["pairs"] < runs[1]["pairs"]
    states = []
    for folder in (research, final):
        model, captioner = AutoModel.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
        assert {parameter.dtype for parameter in captioner.parameters()} == {torch.float16}
        assert captioner.config.experts_per_group == 4 and not captioner.config.output_router_logits
        states.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert not torch.equal(*states)
    cards = [(folder / "README.md").read_text() for folder in (research, final)]
    for card, run, splits in zip(cards, runs, ("train", "train, validation, test")):
        assert f"splits {splits}; {run['pairs']:,} pairs" in card
        assert card.startswith("---\n") and "text_to_image_r10" in card and "15 steps of 32 texts" in card
    evaluations = records(finished, "evaluation")
    assert [each["when"] for each in evaluations] == ["before the held-out concepts", "after"]
    for each in evaluations:
        assert each["pictures"] == len(SHAPES) and 0 <= each["name, text to image, R@1"] <= 1
        assert each["name, image to text, R@10"] == 1.0  # there are fewer names than ten
        assert 0 <= each["caption F1"] <= 1


def test_a_run_that_is_stopped_and_goes_on_equals_one_that_is_not(finished, fields, tmp_path, monkeypatch):
    """Stopped twice: while there are only texts, and in the second stage."""
    output = tmp_path / "run"
    for stop_at, done in ((5, False), (50, False), (None, True)):
        changes = {"resume": True, "checkpoint_every": 0}

        def step_and_stop(self, now, share, step=trainer.DeviceTrainer.step, stop_at=stop_at):
            losses = step(self, now, share)
            if self.progress.step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return losses

        with monkeypatch.context() as patch:
            patch.setattr(trainer.DeviceTrainer, "step", step_and_stop)
            folder = trainer.main(recipe(fields, output, **changes))
        assert (folder is not None) == done
    losses = [[each["total"] for each in records(each_run, "total")] for each_run in (finished, output)]
    assert losses[0] == losses[1]
    states = [AutoModel.from_pretrained(folder).state_dict() for folder in (finished, output)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class Looks(TorchDispatchMode):
    """Names of the operators that make the host wait for an accelerator."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        indices = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        by_mask = any(isinstance(each, torch.Tensor) and each.dtype in (torch.bool, torch.uint8) for each in indices)
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh")
        # torch.where takes numbers as tensors of the CPU, which are copied while the host waits.
        forward = torch._C._current_autograd_node() is None  # gradients take numbers of the device
        numbers = [each for each in args[1:] if isinstance(each, torch.Tensor) and not each.dim()]
        by_number = forward and name.startswith("where") and bool(numbers)
        if by_mask or by_number or any(each in name for each in waits):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device(fields, tmp_path):
    run = trainer.DeviceTrainer(recipe(fields, tmp_path / "run"))
    run.progress.plateau_left = 0.3
    for share in (0.1, 0.5):
        now = phases.moment(run.recipe, share)
        run.step(now, share)  # makes the tables that are copied to the device once
        with Looks() as looks:
            run.step(now, share)
        assert looks.found == []
        run.captioner.model.looks_at_values = True
        with Looks() as looks:
            run.step(now, share)
        assert looks.found, "the test sees no wait where there is one"
        run.captioner.model.looks_at_values = False


class Tape(TorchDispatchMode):
    """What a CUDA graph is, for the CPU: the kernels of a step with their tensors, without the Python around them."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, made))
        return made

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        if self.replays == 1:  # recording it has already run it, which it does not on CUDA
            return
        current = {}
        for function, args, kwargs, made in self.calls:
            args, kwargs = tree_map_only(torch.Tensor, lambda each: current.get(id(each), each), (args, kwargs))
            for before, now in zip(tree_leaves(made), tree_leaves(function(*args, **kwargs))):
                current[id(before)] = now
        for before, now in ((each, current[id(each)]) for each in self.results):
            before.copy_(now)


class FakeCuda(mock.MagicMock):
    """`torch.cuda` for `Recorder`: streams and events do nothing, a graph is a `Tape`."""

    CUDAGraph = Tape

    @contextlib.contextmanager
    def graph(self, tape, **_):
        with tape:
            yield


def test_a_recorded_step_is_the_step(fields, tmp_path, monkeypatch):
    """Replaying the kernels of one step, whatever the host knows by then, gives the losses and weights of others."""
    shares = (0.01, 0.03, 0.05, 0.07, 0.09, 0.11, *torch.linspace(0.41, 0.55, 9).tolist(), *[0.69] * 6, *[0.72] * 6)
    runs, seen = [], []
    for recorded in (False, True):
        # No patch is left out: steps have one shape while drawing and sentences get harder.
        told = recipe(fields, tmp_path / str(recorded), evaluations={}, kept_patches=0.99, start_batch_size=16)
        run = trainer.DeviceTrainer(told)
        if recorded:
            monkeypatch.setattr(capture, "cuda", FakeCuda())
            run.recorder = capture.Recorder(torch.device("cuda"), True, pytest.fail)
        losses = []
        for index, share in enumerate(shares):
            run.progress.plateau_left = None if index < 11 else 0.45
            now = phases.moment(told, share)
            if now.stage != run.progress.stage:
                run._enter(now.stage)
            losses.append(torch.stack(run.step(now, share)))
            if recorded and run.recorder.graph is not None:
                run.recorder.graph.results = run.recorder.outputs
                seen.append(run.recorder.graph.replays)
        runs.append([torch.stack(losses), *run.parameters, *run.average.averages, run.sums])
    assert len(seen) == (6 - 3) + (15 - 3) + (6 - 3) and max(seen) == 12  # three of each shape run as they are
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*runs))


def test_a_step_that_cannot_be_recorded_goes_on(fields, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(capture, "cuda", FakeCuda())
    monkeypatch.setattr(FakeCuda, "graph", mock.Mock(side_effect=RuntimeError("operation not permitted\nmore")))
    recorder = capture.Recorder(torch.device("cuda"), True, said.append)
    assert [recorder("shape", lambda each: each + 1, torch.tensor(number)) for number in range(6)] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    assert said == ["the step can't be recorded and runs kernel by kernel: operation not permitted"]
    assert not recorder.enabled and not capture.Recorder(torch.device("cpu"), True).enabled


def test_layers_are_compiled_whole_and_compute_the_same(fields, tmp_path, monkeypatch):
    """Compiled before the clock starts, which changes neither weights nor the random numbers to come."""
    compiled_losses = []
    quick = functools.partial(torch.compile, backend="eager", fullgraph=True)  # an error where a graph breaks
    monkeypatch.setattr(torch, "compile", quick)
    for compiled in (False, True):
        run = trainer.DeviceTrainer(recipe(fields, tmp_path / str(compiled)))
        run.progress.stage = "first"
        if compiled:
            speed.prepare(run.captioner, compile_layers=True)
            before = [parameter.clone() for parameter in run.parameters]
            run._compile()
            assert all(torch.equal(*pair) for pair in zip(before, run.parameters))
        losses = [run.step(phases.moment(run.recipe, share), share).total.item() for share in (0.3, 0.5, 0.69)]
        compiled_losses.append(losses)
    assert compiled_losses[1] == pytest.approx(compiled_losses[0], rel=1e-4)


def test_two_processes_make_the_step_of_one(fields, tmp_path):
    """Losses and weights after a step over a batch are the same, however many processes share it."""
    quiet = {"model": MODEL | {"hidden_dropout": 0.0}, "image_dropout": 0.0}
    one = device_worker.step_of(recipe(fields, tmp_path / "one", **quiet))
    told = tmp_path / "two.yaml"
    told.write_text(yaml.safe_dump(fields | quiet | {"output": str(tmp_path / "two")}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [device_worker.__file__, told, tmp_path / "two.pt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    two = torch.load(tmp_path / "two.pt")
    for name in one["losses"]:
        assert one["losses"][name] == pytest.approx(two["losses"][name], rel=1e-4), name
    for name in one["gradients"]:
        assert torch.allclose(one["gradients"][name], two["gradients"][name], atol=2e-5), name


def test_the_phases_of_a_run(fields, tmp_path):
    told = recipe(fields, tmp_path)
    moments = {share: phases.moment(told, share) for share in (0.0, 0.2, 0.25, 0.3, 0.5, 0.69, 0.7, 0.75, 0.95, 1.0)}
    assert [each.stage for each in moments.values()] == ["text"] * 2 + ["first"] * 4 + ["second"] * 3 + ["end"]
    assert [moments[share].batch_size for share in (0.0, 0.3, 0.5)] == [32, 8, 16]
    assert [moments[share].late for share in (0.5, 0.69, 0.75, 0.95)] == [False, True, False, True]
    assert moments[0.25].rate < moments[0.3].rate and moments[0.69].rate < 0.05 < moments[0.75].rate <= 0.4
    assert phases.strength(told, 0.5, None) == 0 and phases.strength(told, 0.5, 0.4) == pytest.approx(0.5)
    assert phases.strength(told, 0.9, 0.4) == 1
    assert [phases.kept_patches(told, 64, strength, False) for strength in (0.0, 1.0)] == [52, 40]
    assert phases.kept_patches(told, 64, 1.0, True) is None
    assert phases.leaves_plateau(told, 1.1, 5)
    assert not phases.leaves_plateau(told, 1.3, 5) and not phases.leaves_plateau(told, 1.1, 4)


def test_the_losses_of_texts_say_nothing_about_the_plateau_of_pictures(fields, tmp_path):
    """Texts end with a small loss between two lines of the log; only that of pictures counts from there on."""
    told = recipe(fields, tmp_path / "run", plateau=0.85, plateau_steps=8)
    run = trainer.DeviceTrainer(told)
    batch, done = told.batch_size, {"text": 0.1, "first": 0.5}
    none = torch.zeros(())

    def steps(stage, contrastive, number):
        """So many steps of a stage with these contrastive losses, and the lines of the log that are due."""
        now, loss = phases.Moment(stage, 0.5, 0.5, batch, False), torch.tensor(contrastive, requires_grad=True)
        losses = StepLosses(loss, loss, none, none, none, none)
        if stage != run.progress.stage:
            run._enter(stage)
        with mock.patch.multiple(run, _text_losses=lambda *_: losses, _pair_losses=lambda *_: losses):
            for _ in range(number):
                run.step(now, done[stage])
                if run.progress.step % told.log_every == 0:
                    run._report(now, done[stage])

    guessing = math.log(batch)
    steps("text", 0.1, 8)
    steps("first", guessing, 2)
    assert run.progress.step == 10  # a line of the log whose interval began with texts
    assert records(tmp_path / "run", "contrastive")[-1]["contrastive"] == pytest.approx(guessing)
    assert run.progress.plateau_left is None
    steps("first", 0.86 * guessing, 15)
    assert run.progress.plateau_left is None
    steps("first", 0.84 * guessing, 5)
    assert run.progress.plateau_left == 0.5


def test_a_small_loss_of_the_first_pictures_is_not_believed(fields, tmp_path):
    """Before `plateau_steps` steps with pictures nothing gets harder, whatever the loss."""
    left = {}
    for least in (5, 30):
        output = tmp_path / str(least)
        trainer.main(recipe(fields, output, plateau=100.0, plateau_steps=least, evaluations={}))
        (left[least],) = [each["step"] for each in records(output, "plateau_left")]
    assert left == {5: 20, 30: 45}  # texts end at step 15


def test_a_run_by_time_ends_in_time_and_the_clock_agrees_between_looks(fields, tmp_path):
    told = recipe(fields, tmp_path, steps=None, seconds=100.0)
    clock = phases.Clock(told)
    clock.look(10, 20.0)
    assert clock.share(10) == pytest.approx(0.2) and clock.share(15) == pytest.approx(0.3)
    clock.look(20, 30.0)
    assert clock.share(25) == pytest.approx(0.35)
    short = {"steps": None, "seconds": 4.0, "evaluations": {}, "text_share": 0.3, "second_from": 0.6}
    folder = trainer.main(recipe(fields, tmp_path / "short", **short))
    assert 4.0 <= json.loads((folder / "run.json").read_text())["seconds"] < 8.0


def test_recipes_that_cannot_be_are_refused_in_a_line(fields, tmp_path):
    refused = {
        "set exactly one": {"seconds": 3.0},
        "drawing has no field 'colours'": {"drawing": {"colours": 1.0}},
        "noise=-1 must be a number of at least 0": {"drawing": {"noise": -1}},
        "kept_patches=0.0": {"kept_patches": 0.0},
        "text_share=0.8 is not below second_from=0.7": {"text_share": 0.8},
        "unknown recipe field 'bach_size': did you mean 'batch_size'": {"bach_size": 3},
        "no split 'valid'": {"second_splits": ["valid"]},
        "the first stage has 96 rows, fewer than a batch": {"batch_size": 100},
        "text_tokens=20 is more than the model's 16": {"text_tokens": 20},
        "model: caption_experts=True is not trained on a device": {"model": MODEL | {"caption_experts": True}},
        "needs a teacher": {"teacher": None},
        "pictures of 32 pixels for a model of image_size=64": {"model": MODEL | {"image_size": 64}},
    }
    for message, change in refused.items():
        with pytest.raises(MomeError, match=message.replace("(", r"\(")):
            trainer.DeviceTrainer(recipe(fields, tmp_path / "run", **change))


def test_the_shipped_recipe_is_one(fields, tmp_path):
    path = Path(__file__).parents[1] / "training" / "recipes" / "icons-gpu.yaml"
    told = DeviceRecipe.from_yaml(path)
    assert told.seconds and told.full_drawing().eased(1.0) == told.full_drawing()


def test_an_equal_text_or_a_true_one_is_no_negative():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    apart, together = torch.eye(2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)
    assert contrastive_loss(logits, together) != contrastive_loss(logits, apart)


def test_a_machine_without_datasets_can_train_on_a_device():
    """The data set is read by pyarrow, so that a bare machine with a GPU needs no `datasets`."""
    code = "import sys; sys.modules['datasets'] = None; import mome.training.device.trainer as it; print(it.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "mome.training.device.trainer", done.stderr[-500:]
