"""Train MoME from scratch or fine-tune it, on one process or many.

    accelerate launch -m mome.training --config recipe.yaml [--field value ...]

    recipe ─ build_model ─ captioner, processor
           ─ load_rows ─── batches ─ backward (losses of the whole batch) ─ optimiser ─┬─ checkpoints
                                                                                       ├─ evaluations, contact sheets
                                                                                       └─ a folder for from_pretrained

Accelerate takes care of processes, mixed precision, DDP and FSDP2: the code is the same for one process and for many.
"""

import contextlib
import copy
import dataclasses
import datetime
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.logging import get_logger
from accelerate.utils import InitProcessGroupKwargs, set_seed
from torch import nn
from tqdm import tqdm

from ..configuration_mome import quoted
from ..data.augment import build_augmentations
from ..data.images import pixel_scale
from ..data.pairs import load_rows
from ..data.teacher import Teacher
from ..embedder import Embedder
from ..errors import RecipeError
from ..evaluation.evaluator import Evaluation
from ..evaluation.results import append_figures
from . import report
from .batches import Batch, Batches, Collator, Shard, epoch_of_batches
from .checkpoint import Checkpoints, Progress
from .model import build_model, captioner_name, give_scalars_a_dimension
from .objective import LOSSES, PairModel, StepLosses, Totals, backward
from .optimisation import MovingAverage, build_optimizer, clamp_logit_scale, freeze_parameters, set_learning_rates
from .recipe import Recipe
from .speed import Speed, flops_per_pair, gemm_rate, image_sizes
from .stop import StopSignal

logger = get_logger(__name__)

# What the recipe sets in the optimiser's groups, also when a checkpoint was written with other values.
GROUP_SETTINGS = ("peak_lr", "weight_decay", "betas")


class Trainer:
    """One run of a recipe.

    Raises:
        MomeError: something in the recipe or its data that can't be used; before any training.
    """

    def __init__(self, recipe: Recipe):
        self.recipe, self.output = recipe, Path(recipe.output)
        self.accelerator = _start_accelerator(recipe)
        self.output.mkdir(parents=True, exist_ok=True)
        self.shard = Shard(recipe.batch_size, self.accelerator.process_index, self.accelerator.num_processes)
        image_column = self._load_data()
        self._build_model()
        self._build_batches(image_column)
        self._prepare()
        self._resume()

    # Building.

    def _load_data(self) -> str:
        """Opens the data sets; returns the name of the image column."""
        recipe = self.recipe
        with self.accelerator.main_process_first():  # the first process fills the cache that the others read
            self.rows, image_column = load_rows(
                recipe.dataset,
                recipe.split,
                recipe.dataset_options,
                recipe.streaming,
                recipe.image_column,
                recipe.text_column,
                (recipe.positive_column,),
            )
        self.evaluations = {name: Evaluation.from_dict(name, each) for name, each in recipe.evaluations.items()}
        for each in self.evaluations.values():
            build_augmentations(each.augmentations)  # errors before training, not after
        return image_column

    def _build_model(self):
        set_seed(self.recipe.seed)
        self.captioner, self.processor = build_model(self.recipe)
        self.recipe = self.recipe.with_weights_of(self.captioner.config)
        config = self.captioner.config
        longest = config.max_position_embeddings - (not config.text_start_token)  # captions have [BOS] as well
        self.text_tokens = self.recipe.max_text_tokens or longest
        if self.text_tokens > longest:
            raise RecipeError(f"max_text_tokens={self.text_tokens} is more than the model's {longest}")
        self.teacher = self._load_teacher()
        if untrained := freeze_parameters(self.captioner, self.recipe):
            logger.info(f"{len(untrained)} parameters are not trained, as no loss reaches them: {untrained[0]}, …")
        # For evaluating and saving: whole where training shards, and not compiled.
        self.plain_captioner = copy.deepcopy(self.captioner)

    def _load_teacher(self) -> Teacher | None:
        """The recipe's teacher, from which a new model takes its word embeddings."""
        if self.recipe.teacher is None:
            return None
        teacher = Teacher(self.recipe.teacher, self.captioner.config.projection_dim)
        if self.recipe.checkpoint is None:
            tokenizer = self.processor.tokenizer
            tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
            teacher.initialise_words(self.captioner.get_input_embeddings(), tokens)
        return teacher

    def _build_batches(self, image_column: str):
        recipe = self.recipe
        self.collator = Collator(
            self.processor,
            self.text_tokens,
            image_column,
            recipe.text_column,
            recipe.positive_column,
            build_augmentations(recipe.augmentations),
            self.teacher,
        )
        self.steps = recipe.steps
        if recipe.steps is None:
            self.steps = math.ceil(recipe.epochs * len(Batches(self.rows, self.collator, self.shard, recipe.seed)))

    def _prepare(self):
        recipe, accelerator = self.recipe, self.accelerator
        captions = bool(recipe.caption_weight)
        scale = pixel_scale(self.processor.image_processor)
        model = PairModel(self.captioner.train(), recipe.label_smoothing, recipe.image_dropout, captions, scale)
        if accelerator.distributed_type == DistributedType.FSDP:
            give_scalars_a_dimension(model)
        optimizer = build_optimizer(model, recipe, accelerator.device)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if recipe.compile:  # Accelerate's own option is lost where a process has had another Accelerator before
            self.model.compile()
        self.moving_average = MovingAverage(self.model, recipe.ema_decay) if recipe.ema_decay else None
        self.progress = Progress()
        stateful = [self.progress] if self.moving_average is None else [self.progress, self.moving_average]
        accelerator.register_for_checkpointing(*stateful)
        self.checkpoints = Checkpoints(accelerator, self.output, recipe)

    def _resume(self):
        """Loads the newest checkpoint, if the recipe says so, and opens the log and the tracker."""
        newest = self.checkpoints.newest()
        if newest is not None and not self.recipe.resume:
            raise RecipeError(f"{newest} is from an earlier run: add --resume to continue, or choose another output")
        set_seed(self.recipe.seed, device_specific=True)
        if newest is not None:
            settings = [{key: group[key] for key in GROUP_SETTINGS} for group in self.optimizer.param_groups]
            self.checkpoints.load(newest)
            for group, values in zip(self.optimizer.param_groups, settings):
                group.update(values)
            logger.info(f"resumed from {newest}")
        elif self.recipe.resume:
            logger.info(f"{self.output} has no intact checkpoint: starting from the beginning")
        if self.accelerator.is_main_process:
            self.log = report.Log(self.output / "log.jsonl", self.progress.step)
        values = dataclasses.asdict(self.recipe)
        plain = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in values.items()}
        self.accelerator.init_trackers(self.recipe.project, config=plain)

    # Training.

    def train(self) -> Path | None:
        """Trains, evaluates and saves; returns the folder of the trained model, `None` if a signal stopped the run."""
        recipe, progress = self.recipe, self.progress
        if recipe.evaluate_before and progress.step == 0:
            self.evaluate("before")
        stop, speed = StopSignal(), self._speed()
        bar = tqdm(total=self.steps, initial=progress.step, unit="step", disable=not self.accelerator.is_main_process)
        try:
            for batch in self.batches():
                losses, totals = self.train_step(batch)
                bar.update()
                self._count_bad(batch, totals)
                if self._is_due(recipe.log_every) or progress.step == self.steps:
                    self._log(losses, speed, bar)
                if stop.anywhere(self.accelerator):
                    self._check_finite(losses)
                    self._stop(stop.received)
                    return None
                if self._is_due(recipe.checkpoint_every):
                    self._check_finite(losses)
                    self.checkpoints.save(progress.step)
                    speed.restart(progress.step)
                if self._is_due(recipe.evaluate_every) and progress.step < self.steps:
                    self.evaluate("during")
                    speed.restart(progress.step)
        finally:
            stop.restore()
            bar.close()
        if not self._is_due(recipe.checkpoint_every):
            self.checkpoints.save(progress.step)
        return self.finish()

    def _is_due(self, every: int) -> bool:
        """Whether something that is done every so many steps is done now; 0: never."""
        return bool(every) and self.progress.step % every == 0

    def batches(self) -> Iterator[Batch]:
        """The batches from where the run stands to its last step, epoch after epoch."""
        recipe, progress = self.recipe, self.progress
        while progress.step < self.steps:
            loader = epoch_of_batches(
                self.rows,
                self.collator,
                self.shard,
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
                raise RecipeError(f"{quoted(recipe.dataset)} has fewer rows than batch_size={recipe.batch_size}")
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
        if self.moving_average is not None:
            self.moving_average.update()
        self.progress.step += 1
        self.progress.batch += 1
        self.progress.pairs += totals.pairs
        return losses, totals

    def _speed(self) -> Speed:
        accelerator, recipe, config = self.accelerator, self.recipe, self.captioner.config
        captions = bool(recipe.caption_weight)
        image_dropout = recipe.image_dropout if captions else 0.0
        flops = flops_per_pair(self.plain_captioner, self.text_tokens, captions, image_dropout)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
        images = min(recipe.chunk_size or recipe.batch_size // accelerator.num_processes, 256)
        tokens, width, inner = image_sizes(config)
        gemm = gemm_rate(images * tokens, width, inner, accelerator.device, dtype)
        return Speed(recipe.batch_size, flops, gemm * accelerator.num_processes, self.progress.step)

    def _count_bad(self, batch: Batch, totals: Totals):
        """Names rows that could not be used; raises `RecipeError` if there are too many."""
        progress, recipe = self.progress, self.recipe
        for name in batch.bad[:5]:
            logger.warning(f"skipped {name}", main_process_only=False)
        progress.bad += totals.bad
        progress.bad_names = (progress.bad_names + batch.bad)[:20]
        seen = progress.pairs + progress.bad
        known = len(self.rows) if hasattr(self.rows, "__len__") else 1000
        if progress.bad > recipe.max_bad_share * max(seen, min(known, 1000)):
            raise RecipeError(
                f"{progress.bad} of {seen} rows could not be used, more than max_bad_share={recipe.max_bad_share}: "
                + "; ".join(progress.bad_names[:5])
            )

    def _log(self, losses: StepLosses, speed: Speed, bar: tqdm):
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
        """Called before anything is saved: a checkpoint of ruined weights would push out a good one."""
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
            print(f"stopped after step {self.progress.step}; to continue, run the same command with --resume")

    # Evaluating and saving.

    def evaluate(self, stage: str) -> dict[str, dict[str, float]]:
        """Runs every evaluation of the recipe, on the first process: evaluation → metric → figure."""
        captioner, figures = self.update_plain_captioner(), {}
        if self.accelerator.is_main_process:
            embedder = Embedder(captioner.to(self.accelerator.device).eval(), self.processor)
            for name, evaluation in self.evaluations.items():
                figures[name] = evaluation.run(embedder)
                self._report(name, evaluation, stage, figures[name])
                if self.recipe.sheet_images:
                    self._draw_sheet(name, evaluation, embedder)
        flat = {f"{name}/{key}": value for name, values in figures.items() for key, value in values.items()}
        self.accelerator.log(flat, step=self.progress.step)
        self.accelerator.wait_for_everyone()
        return figures

    def update_plain_captioner(self) -> nn.Module:
        """Copies the weights, or their moving average, to `plain_captioner`. Every process has to call it."""
        with self.moving_average.in_place() if self.moving_average is not None else contextlib.nullcontext():
            state = self.accelerator.get_state_dict(self.model)
            if self.accelerator.is_main_process:
                plain = self.plain_captioner.state_dict()
                weights = {captioner_name(name): tensor for name, tensor in state.items()}
                self.plain_captioner.load_state_dict({n: weights[n].reshape(plain[n].shape) for n in plain})
        return self.plain_captioner

    def _report(self, name: str, evaluation: Evaluation, stage: str, figures: dict[str, float]):
        """Logs and prints the figures of an evaluation, and appends them to the results."""
        step, recipe = self.progress.step, self.recipe
        self.log.write(step, evaluation=name, stage=stage, **figures)
        shown = ", ".join(f"{metric} {value:.3f}" for metric, value in figures.items())
        tqdm.write(f"{name}, step {step}: {shown}")
        if recipe.results and stage != "during":
            data = f"{evaluation.source}, split {evaluation.split}, {self.progress.pairs} pairs trained on"
            append_figures(Path(recipe.results), "mome.training", data, figures, prefix=f"{name}, {stage}: ")

    def _draw_sheet(self, name: str, evaluation: Evaluation, embedder: Embedder):
        few = dataclasses.replace(evaluation, max_samples=self.recipe.sheet_images)
        examples = few.examples()
        images = [each["image"] for each in examples]
        captions = embedder.caption_images(images, max_new_tokens=evaluation.max_new_tokens)
        folder = self.output / "sheets"
        folder.mkdir(exist_ok=True)
        sheet = report.caption_sheet(images, captions, [each["text"] for each in examples])
        sheet.save(folder / f"{name}-{self.progress.step:08d}.png")

    def finish(self) -> Path:
        """Evaluates, and writes the folder that `from_pretrained` loads: weights, processor, model card."""
        figures, captioner = self.evaluate("after"), self.plain_captioner
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


def _start_accelerator(recipe: Recipe) -> Accelerator:
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # or torchrun without a GPU starts processes that ignore each other
        project_dir=recipe.output,
        log_with=None if recipe.tracker == "none" else recipe.tracker,
        # The other processes wait while the first one evaluates.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=3))],
    )
    started, seen = int(os.environ.get("WORLD_SIZE", 1)), accelerator.num_processes
    if started != seen:
        raise RecipeError(f"{started} processes were started, but Accelerate sees {seen}: use `accelerate launch`")
    return accelerator


def main(recipe: Recipe) -> Path | None:
    """Runs a recipe; returns the folder of the trained model, `None` if a signal stopped the run."""
    return Trainer(recipe).train()
