"""Checkpoints that are complete or not there at all.

    checkpoint-00001000.partial/   written by all processes: model, optimiser, random state, progress, moving average
        manifest.json              written last: size and hash of every file, and what the run's data were
    checkpoint-00001000/           the same folder, renamed

A checkpoint is intact if every file is as its manifest says. Older ones stay until a newer one is complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from ..configuration_mome import quoted
from ..errors import RecipeError, first_line
from .recipe import Recipe

logger = get_logger(__name__)

MANIFEST = "manifest.json"
# A resumed run with another value of these would see other data, or the same data twice.
SAME_DATA = ("dataset", "dataset_options", "split", "streaming", "shuffle_buffer", "batch_size", "seed", "chunk_size")


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: optimiser steps done.
        epoch, batch: number of the next batch, and of the epoch that it belongs to.
        pairs: pairs seen.
        bad: rows that could not be used.
        bad_names: some of these, with the reason.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    pairs: int = 0
    bad: int = 0
    bad_names: list[str] = field(default_factory=list)

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict):
        vars(self).update(state)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        accelerator: holds everything that goes into a checkpoint.
        folder: where the checkpoints are.
        recipe: says how many to keep, and is compared when a run is resumed.
        same_data: the fields that are compared.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, recipe: Recipe, same_data: Sequence[str] = SAME_DATA):
        self.accelerator, self.folder, self.recipe, self.same_data = accelerator, folder, recipe, same_data

    def save(self, step: int) -> Path | None:
        """Writes a checkpoint and returns its folder; `None` if that failed, for instance on a full disk.

        A failure is logged and leaves earlier checkpoints as they are.
        """
        final = self.folder / f"checkpoint-{step:08d}"
        partial = final.with_name(final.name + ".partial")
        error = None
        try:
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(partial))
        except Exception as raised:  # each writer has its own error for a full disk
            error = raised
        if self._on_any_process(error is not None):
            return self._give_up(partial, final, error)
        try:
            if self.accelerator.is_main_process:
                self._finish(partial, final, step)
        except OSError as raised:
            error = raised
        if self._on_any_process(error is not None):
            return self._give_up(partial, final, error)
        return final

    def _finish(self, partial: Path, final: Path, step: int):
        files = {path.relative_to(partial).as_posix(): _fingerprint(path) for path in _files(partial)}
        recipe = {name: getattr(self.recipe, name) for name in self.same_data}
        manifest = {"step": step, "files": files, "recipe": recipe}
        with (partial / MANIFEST).open("w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in self._folders()[: -self.recipe.keep_checkpoints]:
            shutil.rmtree(old, ignore_errors=True)
        for stale in self.folder.glob("checkpoint-*.partial"):
            shutil.rmtree(stale, ignore_errors=True)

    def _give_up(self, partial: Path, final: Path, error: Exception | None) -> None:
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free / 2**20
            reason = "another process failed" if error is None else first_line(error)
            kept = self._folders()
            logger.error(
                f"could not write {final}: {reason} ({free:.0f} MiB free); "
                + (f"the last checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint")
            )

    def newest(self) -> Path | None:
        """The newest intact checkpoint; damaged ones are skipped and named in the log.

        Raises:
            RecipeError: the checkpoint is of a run with other data.
        """
        found = [None]
        if self.accelerator.is_main_process:
            for folder in reversed(self._folders()):
                if reason := _damage(folder):
                    logger.warning(f"{folder} is damaged ({reason}): trying the one before")
                    continue
                found = [str(folder)]
                break
        broadcast_object_list(found)
        if found[0] is None:
            return None
        self._compare(Path(found[0]))
        return Path(found[0])

    def load(self, folder: Path):
        """Restores everything. Raises `RecipeError` for a checkpoint of another model."""
        try:
            self.accelerator.load_state(str(folder))
        except (RuntimeError, ValueError, KeyError) as error:
            raise RecipeError(f"{folder} does not fit this recipe: {first_line(error)}") from error

    def _compare(self, folder: Path):
        then = json.loads((folder / MANIFEST).read_text())["recipe"]
        for name in self.same_data:
            now = getattr(self.recipe, name)
            if then[name] != now:
                raise RecipeError(
                    f"{folder} was written with {name}={quoted(then[name])}, the recipe says {quoted(now)}: "
                    "change it back, or choose another output"
                )

    def _folders(self) -> list[Path]:
        """Oldest first."""
        return sorted(path for path in self.folder.glob("checkpoint-*") if path.suffix != ".partial")

    def _on_any_process(self, failed: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return failed
        flag = torch.tensor([int(failed)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _fingerprint(path: Path) -> list:
    """Size in bytes and hash of a file, after making sure that it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.blake2b(digest_size=16)
        while block := file.read(1 << 20):
            digest.update(block)
    return [path.stat().st_size, digest.hexdigest()]


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; `None` if it is intact."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return "no manifest"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _fingerprint(path)[1] != digest:
            return f"{name} has changed"
    return None
