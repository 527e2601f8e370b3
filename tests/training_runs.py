"""A small training run, for the tests of the trainer: in this process, in another, or in two.

python tests/training_runs.py RECIPE.yaml [--kill-at STEP] [--fsdp]
"""

import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import datasets
import yaml
from accelerate.state import AcceleratorState, DistributedType, PartialState

from builders import build_processor
from mome.training.recipe import Recipe
from mome.training.trainer import Trainer, main
from test_training_data import as_dataset

MODEL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "projection_dim": 16,
    "hidden_dropout": 0.1,
}


def write_data(folder: Path, count: int = 44) -> dict:
    """Data set and processor of a run; returns the recipe's fields."""
    rows = as_dataset(count)
    datasets.DatasetDict({"train": rows, "validation": rows.select(range(8))}).save_to_disk(folder / "data")
    build_processor().save_pretrained(folder / "processor")
    return {
        "output": str(folder / "run"),
        "dataset": str(folder / "data"),
        "processor": str(folder / "processor"),
        "model": MODEL,
        "steps": 12,
        "batch_size": 8,
        "warmup_steps": 2,
        "checkpoint_every": 3,
        "ema_decay": 0.9,
        "image_dropout": 0.25,
        "log_every": 1,
        "tracker": "none",
        "augmentations": [{"name": "random_crop", "scale": [0.8, 1.0]}],
    }


def write_recipe(path: Path, fields: dict) -> Path:
    path.write_text(yaml.safe_dump(fields))
    return path


def losses_of(output: str | Path) -> dict[int, float]:
    """Step → loss, from the log of a run."""
    records = [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]
    found = [(each["step"], each["loss"]) for each in records if "loss" in each]
    assert len(found) == len(dict(found)), "a step is logged twice"
    return dict(found)


def kill_at(step: int):
    """SIGKILL right after the optimiser's step of this number, before anything is logged or saved."""
    train_step = Trainer.train_step

    def deadly(trainer, batch):
        result = train_step(trainer, batch)
        if trainer.progress.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return mock.patch.object(Trainer, "train_step", deadly)


def shard_on_the_cpu():
    """FSDP2 with gloo: Accelerate offers it for accelerators only, PyTorch for the CPU too."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    given = Recipe.from_yaml(sys.argv[1])
    if "--fsdp" in sys.argv:
        shard_on_the_cpu()
    if "--kill-at" in sys.argv:
        with kill_at(int(sys.argv[sys.argv.index("--kill-at") + 1])):
            main(given)
    else:
        main(given)
    if "--fsdp" in sys.argv:
        assert AcceleratorState().is_fsdp2
