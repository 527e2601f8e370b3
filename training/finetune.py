"""Train MoME from scratch or fine-tune it, on one process or many.

    accelerate launch -m mome.training.finetune --config recipe.yaml [--field value ...]

    recipe ─ build_model ─ captioner, processor
           ─ load_rows ─── batches ─ backward (losses of the whole batch) ─ optimiser ─┬─ checkpoints
                                                                                       ├─ evaluations, contact sheets
                                                                                       └─ a folder for from_pretrained

Processes, mixed precision, DDP and FSDP2 are Accelerate's: nothing here asks how many there are.
"""

import contextlib
import copy
import dataclasses
import datetime
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.logging import get_logger
from accelerate.utils import InitProcessGroupKwargs, set_seed
from torch import nn
from tqdm import tqdm

from . import report
from .augment import build_augmentations
from .checkpoint import Checkpoints, Progress
from .data import Batch, Batches, Collator, Slice, epoch_of_batches, load_rows
from .evaluate import Evaluation, caption_images
from .model import build_model, give_scalars_a_dimension, plain_name
from .objective import LOSSES, PairModel, StepLosses, Totals, backward
from .optimisation import MovingAverage, build_optimizer, clamp_logit_scale, freeze_parameters, set_learning_rates
from .pixels import pixel_scale
from .recipe import Recipe, RecipeError
from .stop import StopSignal
from .teacher import Teacher

logger = get_logger(__name__)

FROM_RECIPE = ("peak_lr", "weight_decay", "betas")  # of the optimiser's groups


class Trainer:
    """One run of a recipe.

    Args:
        recipe: what to do.

    Raises:
        RecipeError: anything in the recipe that can't be done, before any training.
    """

    def __init__(self, recipe: Recipe):
        self.recipe, self.output = recipe, Path(recipe.output)
        self.accelerator = Accelerator(
            # Or torchrun without a GPU would start processes that don't know of each other.
            cpu=not torch.accelerator.is_available(),
            project_dir=recipe.output,
            log_with=None if recipe.tracker == "none" else recipe.tracker,
            # Other processes wait while the first one evaluates.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=3))],
        )
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started != self.accelerator.num_processes:
            raise RecipeError(f"{started} processes were started, Accelerate sees {self.accelerator.num_processes}")
        self.output.mkdir(parents=True, exist_ok=True)
        self._load_data_and_model()
        self._prepare()
        self._resume()

    def _load_data_and_model(self):
        recipe, accelerator = self.recipe, self.accelerator
        self.part = Slice(recipe.batch_size, accelerator.process_index, accelerator.num_processes)
        columns = (recipe.positive_column,)
        with accelerator.main_process_first():  # the first process fills the cache that the others read
            self.rows, image_column = load_rows(
                recipe.dataset,
                recipe.split,
                recipe.dataset_options,
                recipe.streaming,
                recipe.image_column,
                recipe.text_column,
                columns,
            )
        self.evaluations = {name: Evaluation.from_dict(name, each) for name, each in recipe.evaluations.items()}
        for each in self.evaluations.values():
            build_augmentations(each.augmentations)
        set_seed(recipe.seed)
        captioner, self.processor = build_model(recipe)
        longest = captioner.config.max_position_embeddings
        self.tokens = recipe.max_text_tokens or longest
        if self.tokens > longest:
            raise RecipeError(f"max_text_tokens={self.tokens} is more than the model's {longest}")
        augmentations = build_augmentations(recipe.augmentations)
        self.collator = Collator(
            self.processor,
            self.tokens,
            image_column,
            recipe.text_column,
            recipe.positive_column,
            augmentations,
            self._teacher(captioner),
        )
        if recipe.steps is not None:
            self.steps = recipe.steps
        else:
            self.steps = math.ceil(recipe.epochs * len(Batches(self.rows, self.collator, self.part, recipe.seed)))
        unreached = freeze_parameters(captioner, recipe)
        if unreached:
            logger.info(f"{len(unreached)} parameters that no loss reaches stay as they are: {unreached[0]}, …")
        self.twin = copy.deepcopy(captioner)  # for evaluating and saving: plain, whole, not compiled
        self.captioner = captioner

    def _teacher(self, captioner: nn.Module) -> Teacher | None:
        """The recipe's teacher; a model that starts from scratch takes its word embeddings from it."""
        if self.recipe.teacher is None:
            return None
        teacher = Teacher(self.recipe.teacher, captioner.config.projection_dim)
        if self.recipe.checkpoint is None:
            tokenizer = self.processor.tokenizer
            tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
            teacher.initialise_words(captioner.get_input_embeddings(), tokens)
        return teacher

    def _prepare(self):
        recipe, accelerator, config = self.recipe, self.accelerator, self.captioner.config
        captions = bool(recipe.caption_weight)
        scale = pixel_scale(self.processor.image_processor)
        model = PairModel(self.captioner.train(), recipe.label_smoothing, recipe.image_dropout, captions, scale)
        if accelerator.distributed_type == DistributedType.FSDP:
            give_scalars_a_dimension(model)
        optimizer = build_optimizer(model, recipe, config.num_hidden_layers, accelerator.device)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if recipe.compile:  # Accelerate's own option is lost where a process has had another Accelerator before
            self.model.compile()
        self.average = MovingAverage(self.model, recipe.ema_decay) if recipe.ema_decay else None
        self.progress = Progress()
        accelerator.register_for_checkpointing(self.progress, *[self.average] * (self.average is not None))
        self.checkpoints = Checkpoints(accelerator, self.output, recipe)

    def _resume(self):
        newest = self.checkpoints.newest()
        if newest is not None and not self.recipe.resume:
            raise RecipeError(f"{newest} is from an earlier run: add --resume to go on, or choose another output")
        set_seed(self.recipe.seed, device_specific=True)
        if newest is not None:
            own = [{key: group[key] for key in FROM_RECIPE} for group in self.optimizer.param_groups]
            self.checkpoints.load(newest)
            for group, settings in zip(self.optimizer.param_groups, own):
                group.update(settings)  # as the recipe has them now
            logger.info(f"going on from {newest}")
        elif self.recipe.resume:
            logger.info(f"no whole checkpoint in {self.output}: starting anew")
        if self.accelerator.is_main_process:
            self.log = report.Log(self.output / "log.jsonl", self.progress.step)
        values = dataclasses.asdict(self.recipe)
        plain = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in values.items()}
        self.accelerator.init_trackers(self.recipe.project, config=plain)

    # Training.

    def train(self) -> Path | None:
        """Trains, evaluates and saves; returns the folder of the trained model, `None` if the run was stopped."""
        recipe, progress = self.recipe, self.progress
        if recipe.evaluate_before and progress.step == 0:
            self.evaluate("before")
        stop = StopSignal()
        speed = self._speed()
        bar = tqdm(total=self.steps, initial=progress.step, unit="step", disable=not self.accelerator.is_main_process)
        try:
            for batch in self.batches():
                losses, totals = self.train_step(batch)
                bar.update()
                self._count_bad(batch, totals)
                if progress.step % recipe.log_every == 0 or progress.step == self.steps:
                    self._log(losses, speed, bar)
                if stop.anywhere(self.accelerator):
                    self._check_finite(losses)
                    self._stop(stop.received)
                    return None
                if recipe.checkpoint_every and progress.step % recipe.checkpoint_every == 0:
                    self._check_finite(losses)
                    self.checkpoints.save(progress.step)
                    speed.restart(progress.step)
                if recipe.evaluate_every and progress.step % recipe.evaluate_every == 0 and progress.step < self.steps:
                    self.evaluate("during")
                    speed.restart(progress.step)
        finally:
            stop.restore()
            bar.close()
        if progress.step % (recipe.checkpoint_every or sys.maxsize):
            self.checkpoints.save(progress.step)
        return self.finish()

    def batches(self) -> Iterator[Batch]:
        """From where the run stands to its last step, epoch after epoch."""
        recipe, progress = self.recipe, self.progress
        while progress.step < self.steps:
            loader = epoch_of_batches(
                self.rows,
                self.collator,
                self.part,
                recipe.seed,
                progress.epoch,
                progress.batch,
                recipe.shuffle_buffer,
                recipe.num_workers,
            )
            start = progress.step
            for batch in loader:
                yield batch.to(self.accelerator.device)
                if progress.step == self.steps:
                    return
            if progress.step == start and progress.batch == 0:
                raise RecipeError(f"{recipe.dataset!r} has fewer rows than batch_size={recipe.batch_size}")
            progress.epoch, progress.batch = progress.epoch + 1, 0

    def train_step(self, batch: Batch) -> tuple[StepLosses, Totals]:
        """One optimiser step."""
        set_learning_rates(self.optimizer, self.progress.step, self.steps, self.recipe)
        losses, totals = backward(self.accelerator, self.model, batch, self.recipe)
        if self.recipe.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        clamp_logit_scale(self.model)
        if self.average is not None:
            self.average.update()
        self.progress.step += 1
        self.progress.batch += 1
        self.progress.pairs += totals.pairs
        return losses, totals

    def _speed(self) -> report.Speed:
        accelerator, recipe, config = self.accelerator, self.recipe, self.captioner.config
        captions = bool(recipe.caption_weight)
        flops = report.flops_per_pair(self.twin, self.tokens, captions, recipe.image_dropout if captions else 0.0)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
        rows = min(recipe.chunk_size or recipe.batch_size // accelerator.num_processes, 256) * config.num_image_tokens
        gemm = report.gemm_rate(rows, config.hidden_size, config.intermediate_size, accelerator.device, dtype)
        return report.Speed(recipe.batch_size, flops, gemm * accelerator.num_processes, self.progress.step)

    def _count_bad(self, batch: Batch, totals: Totals):
        """Names rows that could not be used, and stops the run if they are too many."""
        progress, recipe = self.progress, self.recipe
        for name in batch.bad[:5]:
            logger.warning(f"left out {name}", main_process_only=False)
        progress.bad += totals.bad
        progress.bad_names = (progress.bad_names + batch.bad)[:20]
        seen = progress.pairs + progress.bad
        known = len(self.rows) if hasattr(self.rows, "__len__") else 1000
        if progress.bad > recipe.max_bad_share * max(seen, min(known, 1000)):
            raise RecipeError(
                f"{progress.bad} of {seen} rows could not be used, more than max_bad_share={recipe.max_bad_share}: "
                + "; ".join(progress.bad_names[:5])
            )

    def _log(self, losses: StepLosses, speed: report.Speed, bar: tqdm):
        step = self.progress.step
        figures = {name: getattr(losses, name).item() for name in LOSSES}
        self._check_finite(losses)
        figures |= {"epoch": self.progress.epoch, "learning_rate": self.optimizer.param_groups[-1]["lr"]}
        figures |= {"bad": self.progress.bad, **report.routing_figures(losses.assignments)}
        timing = speed.since_last(step)
        self.accelerator.log(figures | timing, step=step)
        if self.accelerator.is_main_process:
            self.log.write(step, **figures, **timing)
            shown = {name: f"{figures[name]:.3f}" for name in ("contrastive", "caption")}
            bar.set_postfix(**shown, pairs_per_s=f"{timing['pairs_per_s']:.0f}", gemm=f"{timing['share_of_gemm']:.0%}")

    def _check_finite(self, losses: StepLosses):
        """Before anything is logged or saved: a checkpoint of ruined weights would push out the good ones."""
        loss = losses.loss.item()
        if not math.isfinite(loss):
            raise RecipeError(
                f"the loss is {loss} at step {self.progress.step}: lower learning_rate="
                f"{self.recipe.learning_rate:g}; the checkpoints in {self.output} are untouched"
            )

    def _stop(self, received: str | None):
        saved = self.checkpoints.save(self.progress.step)
        logger.warning(f"stopped by {received or 'another process'} after step {self.progress.step}: {saved}")
        self.accelerator.end_training()
        if saved is None:
            raise RecipeError("stopped, and no checkpoint could be written")
        if self.accelerator.is_main_process:
            print(f"stopped after step {self.progress.step}; go on with the same command and --resume")

    # Evaluating and saving.

    def update_twin(self) -> nn.Module:
        """The weights, or their average, in a plain captioner. Every process has to call it."""
        with self.average.in_place() if self.average is not None else contextlib.nullcontext():
            state = self.accelerator.get_state_dict(self.model)
            if self.accelerator.is_main_process:
                own = self.twin.state_dict()
                weights = {plain_name(name): tensor for name, tensor in state.items()}
                self.twin.load_state_dict({name: weights[name].reshape(own[name].shape) for name in own})
        return self.twin

    def evaluate(self, stage: str) -> dict[str, dict[str, float]]:
        """Every evaluation of the recipe, logged and drawn as a contact sheet: evaluation → metric → figure."""
        captioner, figures, step = self.update_twin(), {}, self.progress.step
        if self.accelerator.is_main_process:
            captioner.to(self.accelerator.device).eval()
            for name, evaluation in self.evaluations.items():
                figures[name] = evaluation.run(captioner, self.processor)
                self.log.write(step, evaluation=name, stage=stage, **figures[name])
                shown = ", ".join(f"{metric} {value:.3f}" for metric, value in figures[name].items())
                tqdm.write(f"{name}, step {step}: {shown}")
                if self.recipe.sheet_images:
                    self._draw_sheet(captioner, name, evaluation)
                if self.recipe.results and stage != "during":
                    data = f"{evaluation.source}, split {evaluation.split}, {self.progress.pairs} pairs trained on"
                    report.write_results(Path(self.recipe.results), name, data, figures[name], stage)
        flat = {f"{name}/{key}": value for name, values in figures.items() for key, value in values.items()}
        self.accelerator.log(flat, step=step)
        self.accelerator.wait_for_everyone()
        return figures

    def _draw_sheet(self, captioner: nn.Module, name: str, evaluation: Evaluation):
        few = dataclasses.replace(evaluation, max_samples=self.recipe.sheet_images)
        examples = few.examples()
        images = [each["image"] for each in examples]
        captions = caption_images(captioner, self.processor, images, max_new_tokens=evaluation.max_new_tokens)
        folder = self.output / "sheets"
        folder.mkdir(exist_ok=True)
        sheet = report.contact_sheet(images, captions, [each["text"] for each in examples])
        sheet.save(folder / f"{name}-{self.progress.step:08d}.png")

    def finish(self) -> Path:
        """Evaluates, and writes the folder that `from_pretrained` loads: weights, processor, model card."""
        figures, captioner = self.evaluate("after"), self.twin
        if self.accelerator.is_main_process:
            if self.recipe.lora is not None:
                captioner.save_pretrained(self.output / "adapter")
                captioner = captioner.merge_and_unload()
            captioner.save_pretrained(self.output)
            self.processor.save_pretrained(self.output)
            history = {"steps": self.progress.step, "pairs": self.progress.pairs, "bad": self.progress.bad}
            report.write_card(self.output, self.recipe, captioner, figures, history)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return self.output


def main(recipe: Recipe) -> Path | None:
    """Runs a recipe; returns the folder of the trained model, `None` if the run was stopped by a signal."""
    return Trainer(recipe).train()


if __name__ == "__main__":
    try:
        main(Recipe.from_command_line())
    except RecipeError as error:
        sys.exit(f"error: {error}")
