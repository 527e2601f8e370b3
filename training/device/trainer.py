"""A run with everything on the device: texts, then pictures with them, then the held-out concepts as well.

    IconTensors ─ draw, descriptions, captions ─ IconPairs ─ pair_losses ─ AdamW ─ moving average ─ evaluate, save
    (on the device)        strength, patches ── phases.py says what holds when

A step is queued without a wait, on CUDA as one recorded graph; every `log_every` steps the host reads the losses, and
decides whether the plateau at the start is left. With several processes each has the whole data set and its share of
every batch.
"""

import contextlib
import copy
import datetime
import functools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, set_seed
from torch import nn

from ...configuration_mome import MomeConfig, quoted
from ...data.images import pixel_scale
from ...data.teacher import turn_words
from ...errors import RecipeError
from ...icons.drawing import draw
from ...icons.phrases import Phrases, bare_texts, captions, descriptions
from ...icons.tensors import load_icons, normalised
from ...modeling_mome import MomeForConditionalGeneration
from ..checkpoint import Checkpoints
from ..model import config_for, load_processor
from ..optimisation import MAX_LOGIT_SCALE, MovingAverage, build_optimizer
from ..report import Log
from ..stop import StopSignal
from . import phases, speed
from .capture import Dials, Recorder
from .card import write_card
from .evaluate import Evaluator
from .objective import IconPairs, StepLosses, Weights, average_gradients, pair_losses, text_losses
from .recipe import DeviceRecipe

SAME_RUN = ("data", "processor", "model", "splits", "second_splits", "second_times", "batch_size", "seed")


class StepShape(NamedTuple):
    """What steps that run the same kernels have in common.

    Attributes:
        batch_size: pairs or texts, over all processes.
        kept_patches: of each image; `None`: all.
        glosses: whether definitions are among the texts of a step without pictures.
    """

    batch_size: int
    kept_patches: int | None = None
    glosses: bool | None = None


@dataclass
class DeviceProgress:
    """Where a run stands.

    Attributes:
        step: optimiser steps done.
        text_steps: how many of them had texts alone.
        pairs: pictures seen.
        stage: that the last step belonged to.
        epoch, position: of the stage, and the next row of the epoch's order.
        plateau_left: the share of the run at which the plateau was left.
        seconds: that the run has taken.
    """

    step: int = 0
    text_steps: int = 0
    pairs: int = 0
    stage: str = "text"
    epoch: int = 0
    position: int = 0
    plateau_left: float | None = None
    seconds: float = 0.0

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict):
        vars(self).update(state)


class DeviceTrainer:
    """One run of a recipe.

    Args:
        recipe: what to do.

    Raises:
        MomeError: something in the recipe or its data that can't be used; before any training.
    """

    def __init__(self, recipe: DeviceRecipe):
        self.recipe, self.output = recipe, Path(recipe.output)
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=1))],
        )
        self.device, self.processes = self.accelerator.device, self.accelerator.num_processes
        for name in ("batch_size", "start_batch_size", "text_batch_size"):
            if getattr(recipe, name) % self.processes:
                raise RecipeError(f"{name}={getattr(recipe, name)} is no multiple of {self.processes} processes")
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
        self.output.mkdir(parents=True, exist_ok=True)
        self._load()
        self._prepare()
        self._resume()

    def _load(self):
        """Data, tokenizer and a new model, whose words begin where the teacher has them."""
        recipe = self.recipe
        self.processor = load_processor(recipe.processor)
        set_seed(recipe.seed)
        config = config_for(self.processor, dict(recipe.model))
        for name in ("caption_experts", "contrastive_objective", "fixed_text_length", "text_start_token"):
            if getattr(config, name) != getattr(MomeConfig, name):
                value = getattr(config, name)
                raise RecipeError(
                    f"model: {name}={quoted(value)} is not trained on a device: use `python -m mome.training`"
                )
        self.captioner = MomeForConditionalGeneration(config)
        longest = config.max_position_embeddings
        for name in ("text_tokens", "caption_tokens"):
            if getattr(recipe, name) > longest:
                raise RecipeError(f"{name}={getattr(recipe, name)} is more than the model's {longest}")
        teacher = None if recipe.teacher is None else Path(recipe.teacher)
        width, tokenizer = config.projection_dim, self.processor.tokenizer
        with self.accelerator.main_process_first():  # the first process writes the file that the others read
            self.icons = load_icons(Path(recipe.data), tokenizer, teacher, width, self.device)
        rows, joining = self.icons.rows_of(recipe.splits), self.icons.rows_of(recipe.second_splits)
        self.rows = {"first": rows, "second": torch.cat([rows, joining.repeat(recipe.second_times)])}
        for splits in recipe.evaluations.values():
            self.icons.rows_of(splits)  # errors before training, not after
        if self.icons.side != config.image_size:
            raise RecipeError(f"pictures of {self.icons.side} pixels for a model of image_size={config.image_size}")
        for name, rows in self.rows.items():
            if len(rows) < max(recipe.batch_size, recipe.start_batch_size):
                raise RecipeError(f"the {name} stage has {len(rows)} rows, fewer than a batch")
        self.phrases = Phrases(tokenizer, self.device)
        self.teacher = normalised(self.icons.teacher, width)
        self.known_texts = {glosses: self.icons.known_texts(glosses) for glosses in (False, True)}
        if recipe.text_share and not len(self.known_texts[False]):
            raise RecipeError(f"text_share={recipe.text_share} needs a teacher that knows the texts of {recipe.data}")
        turn_words(self.captioner.get_input_embeddings(), self.icons.word_teacher.cpu())

    def _prepare(self):
        recipe = self.recipe
        self.captioner.to(self.device)
        self.twin = copy.deepcopy(self.captioner).eval()  # for evaluating and saving: plain, not compiled
        speed.prepare(self.twin, recipe.experts_implementation, look_at_values=True)
        speed.prepare(
            self.captioner.train(),
            recipe.experts_implementation,
            recipe.channels_last,
            recipe.half_states and self.cuda,
            recipe.compile and self.cuda,
        )
        captions_too = bool(recipe.caption_weight)
        self.model = IconPairs(self.captioner, recipe.label_smoothing, recipe.image_dropout, captions_too)
        for parameter in self._unreached():
            parameter.requires_grad_(False)
        self.parameters = [each for each in self.captioner.parameters() if each.requires_grad]
        self.optimizer = build_optimizer(self.captioner, recipe, self.device)
        self.average = MovingAverage(self.captioner, recipe.ema_decay)
        self.sums = torch.zeros(len(StepLosses._fields), device=self.device)
        self.relative_sum = torch.zeros((), device=self.device)  # of contrastive losses, each as a share of ln(batch)
        self.dials = Dials(self.device)
        self.recorder = Recorder(self.device, recipe.cuda_graphs and self.processes == 1, self.say)
        self.progress = DeviceProgress()
        self.accelerator.register_for_checkpointing(self.captioner, self.optimizer, self.average, self.progress)
        self.checkpoints = Checkpoints(self.accelerator, self.output, recipe, SAME_RUN)
        self.scale = self._pixel_scale()
        self.evaluator = Evaluator(self.icons, self.phrases, self.processor, self.scale, recipe.evaluation_pool)

    def _pixel_scale(self):
        """What makes pixel values of pictures in 0…1, as the processor does."""
        scale = pixel_scale(self.processor.image_processor)
        if scale is None:
            raise RecipeError(
                f"processor={quoted(self.recipe.processor)} does more than resize, rescale and normalise"
            )
        return scale.for_shares(self.device)

    def _unreached(self) -> list[nn.Parameter]:
        """Parameters of the caption head of its own, where no captions are learnt."""
        head = self.captioner.lm_head
        tied = self.captioner.get_input_embeddings().weight
        return [] if self.recipe.caption_weight else [each for each in head.parameters() if each is not tied]

    def _resume(self):
        newest = self.checkpoints.newest()
        if newest is not None and not self.recipe.resume:
            raise RecipeError(f"{newest} is from an earlier run: add --resume to go on, or choose another output")
        set_seed(self.recipe.seed, device_specific=True)
        if newest is not None:
            self.checkpoints.load(newest)
        for group in self.optimizer.param_groups:  # loading has put others in their place
            group["lr"], group["capturable"] = torch.zeros((), device=self.device), self.recorder.enabled
        progress = self.progress
        self.clock = phases.Clock(self.recipe, progress.seconds, progress.step)
        self.order: torch.Tensor | None = None
        self._forget_losses(progress.seconds)
        self.log = Log(self.output / "log.jsonl", progress.step) if self.accelerator.is_main_process else None
        self.say(f"{sum(each.numel() for each in self.parameters):,} parameters, {len(self.icons):,} pictures")

    def _forget_losses(self, seconds: float):
        """Means of losses, and of the pairs per second, are those of the steps from here on."""
        progress = self.progress
        self.sums.zero_()
        self.relative_sum.zero_()
        self.since = (progress.step, progress.pairs, seconds)

    # Training.

    def train(self) -> Path | None:
        """Trains, evaluates and saves; returns the folder of the trained model, `None` if the run was stopped."""
        stop, progress = StopSignal(), self.progress
        if self.recipe.compile and self.cuda:
            self._compile()
        try:
            while True:
                if self.processes == 1:
                    self.clock.look(progress.step, self.clock.seconds)
                share = self.clock.share(progress.step)
                now = phases.moment(self.recipe, share)
                if now.stage != progress.stage:
                    self._enter(now.stage)
                if now.stage == "end":
                    break
                self.step(now, share)
                if progress.step % self.recipe.log_every == 0:
                    self._report(now, share)
                    if stop.anywhere(self.accelerator):
                        self._checkpoint()
                        self.say(f"stopped by {stop.received or 'another process'}; go on with --resume")
                        return None
                if self.recipe.checkpoint_every and progress.step % self.recipe.checkpoint_every == 0:
                    self._checkpoint()
                if self.recipe.export_every and progress.step % self.recipe.export_every == 0:
                    self._save("latest")
        finally:
            stop.restore()
        return self._finish("", "after")

    def _compile(self):
        """Makes steps of every size, without their updates, so that no time is lost when it counts."""
        kept = self.progress.state_dict()
        with torch.random.fork_rng([self.device] if self.cuda else []), self.recorder.on_stream():
            for share in (0.0, self.recipe.text_share, (self.recipe.text_share + self.recipe.second_from) / 2):
                shape, inputs = self._plan(phases.moment(self.recipe, share), strength=0.0)
                self._losses(shape, *inputs).total.backward()
                self.optimizer.zero_grad()
        self.progress.load_state_dict(kept)
        self.order = None
        if self.cuda:
            torch.cuda.synchronize()
        self.say("compiled")
        self.clock = phases.Clock(self.recipe, self.progress.seconds, self.progress.step)

    def _enter(self, stage: str):
        """What happens once between two stages."""
        progress, left = self.progress, self.progress.stage
        self.recorder.forget()
        if left == "text":  # what AdamW knows of the texts' gradients says little of those to come
            self.optimizer.state.clear()
            self.average.restart()
            progress.text_steps = progress.step
        if left == "first" and stage == "second":
            self._finish("research", "before the held-out concepts")
        progress.stage, progress.epoch, progress.position, self.order = stage, 0, 0, None
        self._forget_losses(self.clock.seconds)

    def step(self, now: phases.Moment, share: float) -> StepLosses:
        """One optimiser step, its losses without gradient; nothing waits for the device."""
        recipe, progress = self.recipe, self.progress
        strength = phases.strength(recipe, share, progress.plateau_left)
        # Before the plateau is left, captions would have the image tokens to themselves.
        caption_weight = recipe.caption_weight * (0.5 if progress.plateau_left is None else 1.0)
        self.dials.turn(strength, caption_weight, self.average.advance())
        for group in self.optimizer.param_groups:
            group["lr"].fill_(group["peak_lr"] * now.rate)
        shape, inputs = self._plan(now, strength)
        losses = self.recorder(shape, functools.partial(self._update, shape), *inputs)
        progress.step += 1
        progress.pairs += 0 if now.stage == "text" else now.batch_size
        return losses

    def _plan(self, now: phases.Moment, strength: float) -> tuple[StepShape, tuple[torch.Tensor, ...]]:
        """What a step does, and the rows that it does it with."""
        if now.stage == "text":
            return StepShape(now.batch_size, glosses=now.progress >= 0.5), ()
        patches = self.captioner.config.grid_size**2
        kept = phases.kept_patches(self.recipe, patches, strength, now.late)
        return StepShape(now.batch_size, kept_patches=kept), (self._next_rows(now),)

    def _update(self, shape: StepShape, *rows: torch.Tensor) -> StepLosses:
        """Losses, gradients, new weights, their average: all that is recorded. What changes are `dials` and rates."""
        try:
            losses = self._losses(shape, *rows)
            losses.total.backward()
            average_gradients(self.parameters)
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.max_grad_norm)
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad()
        with torch.no_grad():
            self.captioner.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
            losses = StepLosses(*(loss.detach() for loss in losses))
            self.sums += torch.stack(losses)
            self.relative_sum.add_(losses.contrastive, alpha=1 / math.log(shape.batch_size))
        self.average.take_in(self.dials.averaging)
        return losses

    def _losses(self, shape: StepShape, *rows: torch.Tensor) -> StepLosses:
        return self._pair_losses(shape, *rows) if rows else self._text_losses(shape)

    def _text_losses(self, shape: StepShape) -> StepLosses:
        pool = self.known_texts[shape.glosses]
        text = pool[torch.randint(len(pool), (shape.batch_size // self.processes,), device=self.device)]
        texts = bare_texts(self.icons, self.phrases, text, self.recipe.text_tokens)
        with self._autocast():
            return text_losses(self.captioner, texts, self.teacher, bool(self.recipe.caption_weight))

    def _pair_losses(self, shape: StepShape, rows: torch.Tensor) -> StepLosses:
        recipe, icons, phrases, strength = self.recipe, self.icons, self.phrases, self.dials.strength
        with torch.no_grad():
            dtype = torch.float16 if self.cuda else torch.float32
            drawn = draw(icons, rows, recipe.full_drawing().eased(strength), dtype)
            phrasing = recipe.full_phrasing().eased(strength)
            texts = descriptions(icons, phrases, rows, drawn, phrasing, recipe.text_tokens)
            captioned = captions(icons, phrases, rows, phrasing, recipe.caption_tokens)
            pixel_values = self.scale(drawn.pictures)
            if recipe.channels_last:
                pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
            kept = self._kept_patches(len(rows), shape.kept_patches)
        weights = Weights(self.dials.caption_weight, recipe.teacher_weight, recipe.image_teacher_weight)
        with self._autocast():
            states = self.model(pixel_values, kept, texts, captioned)
        return pair_losses(states, icons, self.teacher, rows, texts, weights)

    def _kept_patches(self, rows: int, kept: int | None) -> torch.Tensor | None:
        """(rows, kept) int64, other patches of each image in each step, or `None` for all of them."""
        patches = self.captioner.config.grid_size**2
        return None if kept is None else torch.rand(rows, patches, device=self.device).argsort(dim=1)[:, :kept]

    def _next_rows(self, now: phases.Moment) -> torch.Tensor:
        """(rows,) int64: this process's part of the next batch. Every epoch has an order of its own."""
        progress, pool = self.progress, self.rows[now.stage]
        if progress.position + now.batch_size > len(pool):
            progress.epoch, progress.position, self.order = progress.epoch + 1, 0, None
        if self.order is None:
            stage = ("first", "second").index(now.stage)
            seed = (self.recipe.seed * 2 + stage) * 100_000 + progress.epoch
            self.order = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).to(self.device)]
        part = now.batch_size // self.processes
        start = progress.position + self.accelerator.process_index * part
        progress.position += now.batch_size
        return self.order[start : start + part]

    def _autocast(self):
        return torch.autocast("cuda", torch.bfloat16) if self.cuda else contextlib.nullcontext()

    # Telling and saving.

    def say(self, line: str, log: dict | None = None):
        if self.accelerator.is_main_process:
            print(f"[{self.clock.seconds:6.1f}] {line}", flush=True)
            if log:
                self.log.write(self.progress.step, **log)

    def _report(self, now: phases.Moment, share: float):
        """Reads the losses since the last report; says whether the plateau is left.

        Raises:
            RecipeError: a loss that is not finite.
        """
        progress, (step, pairs, seconds) = self.progress, self.since
        sums = torch.cat([self.sums, self.relative_sum[None]])
        means = self.accelerator.reduce(sums, "mean") / (progress.step - step)
        *values, relative = means.tolist()  # here the host waits
        losses = dict(zip(StepLosses._fields, values))
        if not math.isfinite(losses["total"]):
            raise RecipeError(f"the loss is {losses['total']} at step {progress.step}: lower learning_rate")
        spent = [self.clock.seconds]
        broadcast_object_list(spent)
        self.clock.look(progress.step, spent[0])
        rate = (progress.pairs - pairs) / max(spent[0] - seconds, 1e-9)
        self._forget_losses(spent[0])
        shown = " ".join(f"{name} {value:.3f}" for name, value in losses.items() if value)
        line = f"{now.stage} {share:.1%} step {progress.step}: {shown}, {rate:,.0f} pairs/s"
        self.say(line, {"share": share, "stage": now.stage, "pairs": progress.pairs, "pairs_per_s": rate, **losses})
        if now.stage != "text" and progress.plateau_left is None:
            if phases.leaves_plateau(self.recipe, relative, progress.step - progress.text_steps):
                progress.plateau_left = share
                self.say(f"left the plateau at {share:.1%}", {"plateau_left": share})

    def _checkpoint(self):
        self.progress.seconds = self.clock.seconds
        self.checkpoints.save(self.progress.step)

    def update_twin(self) -> MomeForConditionalGeneration:
        """The averaged weights in a plain captioner."""
        with self.average.in_place():
            self.twin.load_state_dict(self.captioner.state_dict())
        return self.twin

    def _save(self, name: str) -> Path:
        """Writes the averaged weights as float16, and the processor, to a folder of the run, which then is whole."""
        final = self.output / name
        if self.accelerator.is_main_process:
            partial = final if final == self.output else final.with_name(f"{name}.partial")
            halved = copy.deepcopy(self.update_twin()).half()
            halved.save_pretrained(partial, max_shard_size=self.recipe.max_shard_size)
            self.processor.save_pretrained(partial)
            (partial / "run.json").write_text(json.dumps(self._history(), indent=1) + "\n")
            if partial != final:
                replace_folder(partial, final)
        self.accelerator.wait_for_everyone()
        return final

    def _history(self) -> dict:
        progress = self.progress
        done = {"steps": progress.step, "text_steps": progress.text_steps, "pairs": progress.pairs}
        return done | {"seconds": round(self.clock.seconds), "recipe": dict(vars(self.recipe))}

    def _finish(self, name: str, stage: str) -> Path:
        """Saves to a folder of the run, evaluates, and writes the card."""
        folder, recipe = self._save(name), self.recipe
        if self.accelerator.is_main_process:
            figures = {label: self.evaluator.run(self.twin, splits) for label, splits in recipe.evaluations.items()}
            for label, values in figures.items():
                shown = ", ".join(f"{metric} {value:.3f}" for metric, value in values.items())
                self.say(f"{label}, {stage}: {shown}", {"evaluation": label, "when": stage, **values})
            seen = recipe.splits + (recipe.second_splits if self.progress.stage != "first" else [])
            write_card(folder, recipe, self.twin, figures, self._history(), seen)
        self.accelerator.wait_for_everyone()
        return folder


def replace_folder(partial: Path, final: Path):
    """Gives a folder that is whole the name of one that may be there already."""
    old = final.with_name(f"{final.name}.old")
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    if old.exists():
        for path in old.iterdir():
            path.unlink()
        old.rmdir()


def main(recipe: DeviceRecipe) -> Path | None:
    """Runs a recipe; returns the folder of the trained model, `None` if the run was stopped by a signal."""
    return DeviceTrainer(recipe).train()
