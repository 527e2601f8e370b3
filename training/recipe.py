"""The recipe: everything that a training run can be told, as one checked record.

    recipe.yaml ─┐
                 ├─ Recipe.from_command_line ─ Recipe ─ finetune.main
    --field value┘

What concerns processes (how many, DDP or FSDP, mixed precision) is not in here: `accelerate launch` and
`accelerate config` tell it to `Accelerator`.
"""

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError


class RecipeError(ValueError):
    """A recipe that can't be used; one line with field, value and mend."""


class RecipeFields:
    """Reads a recipe, a strict dataclass, from a dict, a file or the command line."""

    PROGRAM: ClassVar[str]  # the module that runs such recipes
    PURPOSE: ClassVar[str]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises `RecipeError` for an unknown field, a missing one, a wrong type, an impossible value."""
        known = {each.name: each.type for each in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"the fields are {', '.join(known)}"
                raise RecipeError(f"unknown recipe field {name!r}: {hint}")
        required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
        if missing := [name for name in required if values.get(name) is None]:
            raise RecipeError(f"the recipe lacks {' and '.join(missing)}")
        try:
            return cls(**{name: _as_number(value, known[name]) for name, value in values.items()})
        except StrictDataclassFieldValidationError as error:
            name = next(name for name in known if f"field '{name}'" in str(error))
            wanted = getattr(known[name], "__name__", None) or known[name]
            wanted = known[name] if typing.get_args(known[name]) else wanted
            raise RecipeError(f"recipe field {name}={values[name]!r}: expected {wanted}") from None
        except StrictDataclassError as error:
            if isinstance(error.__cause__, RecipeError):
                raise error.__cause__ from None
            raise

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: dict[str, Any] | None = None) -> Self:
        """The recipe of a file, with some fields replaced."""
        try:
            values = yaml.safe_load(Path(path).read_text())
        except FileNotFoundError:
            raise RecipeError(f"no recipe {str(path)!r}") from None
        except yaml.YAMLError as error:
            raise RecipeError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise RecipeError(f"{path} holds no fields: write lines of `field: value`")
        return cls.from_dict(values | (overrides or {}))

    @classmethod
    def from_command_line(cls, arguments: Sequence[str] | None = None) -> Self:
        """`--config recipe.yaml [--field value ...]`; values are read as YAML, so that lists and dicts work too."""
        parser = argparse.ArgumentParser(
            prog=cls.PROGRAM,
            usage=f"accelerate launch -m {cls.PROGRAM} --config recipe.yaml [--field value ...]",
            description=f"{cls.PURPOSE} Any field of the recipe may be given as --field value.",
            allow_abbrev=False,
        )
        parser.add_argument("--config", help="the recipe, a YAML file")
        parser.add_argument("--resume", nargs="?", const=True, default=argparse.SUPPRESS, type=yaml.safe_load)
        for each in dataclasses.fields(cls):
            if each.name != "resume":
                parser.add_argument(f"--{each.name}", default=argparse.SUPPRESS, type=yaml.safe_load, metavar="VALUE")
        options, unknown = parser.parse_known_args(arguments)
        if unknown:
            close = difflib.get_close_matches(unknown[0].lstrip("-"), [f.name for f in dataclasses.fields(cls)], n=1)
            parser.error(f"unknown field {unknown[0]!r}" + (f": did you mean --{close[0]}?" if close else ""))
        overrides = vars(options)
        config = overrides.pop("config")
        try:
            return cls.from_dict(overrides) if config is None else cls.from_yaml(config, overrides)
        except RecipeError as error:
            parser.error(str(error))


@strict
@dataclass
class Recipe(RecipeFields):
    r"""One training run.

    Args:
        output: folder of the run: checkpoints, logs, and at the end the trained model.
        checkpoint: folder or Hub id to go on from (fine-tuning).
        model: `MomeConfig` fields of a model to train from scratch; `size` names one of `MOME_SIZES`.
        processor: folder or Hub id of the processor, where it isn't that of `checkpoint`.
        dataset: what `datasets.load_dataset` takes: a folder of images with `metadata.jsonl`, parquet or WebDataset
            files or their folder, a Hub id; or a folder written by `save_to_disk`.
        dataset_options: further keywords of `load_dataset` (`name`, `data_files`, `revision`, ...).
        split: the split to train on.
        streaming: read the data set as a stream, shuffled in a window of `shuffle_buffer` rows.
        image_column: column of images (files, bytes or decoded); `None`: the first of type Image.
        text_column: column with a text or a list of texts, of which each epoch draws one.
        positive_column: images and texts with an equal value here are positives of each other, as those with an
            equal text always are.
        max_text_tokens: texts are cut and padded to so many tokens; `None`: the model's longest.
        max_bad_share: share of rows with an unreadable image or an empty text above which the run stops.
        augmentations: what happens to the examples of a batch, in order: `{name: ..., keyword: value, ...}` with a
            name of `training.augment.AUGMENTATIONS` or `module:function`.
        num_workers: processes that prepare batches.
        steps, epochs: length of the run; exactly one of them.
        batch_size: pairs of one optimiser step, over all processes; all are negatives of each other.
        chunk_size: pairs that a process has in memory at once; fewer than its share of the batch turns GradCache on.
        learning_rate: peak, after warm-up.
        warmup_steps: steps of linear warm-up; then the rate falls along a cosine to `final_learning_rate_share`.
        final_learning_rate_share: the rate at the end, as a share of the peak.
        weight_decay, betas, max_grad_norm: of AdamW and of gradient clipping.
        layer_decay: a layer's rate is this times that of the layer above (fine-tuning: 0.6 to 0.9).
        freeze: patterns of parameter names that are not trained, as `fnmatch` takes them.
        lora: keywords of `peft.LoraConfig`; only the adapters are trained.
        ema_decay: decay of an exponential moving average of the weights, which is then what is evaluated and saved.
        compile: `torch.compile` the training forward.
        gradient_checkpointing: recompute activations in the backward pass.
        contrastive_weight, caption_weight: weights of the two losses (CoCa, 2205.01917: 1 and 2).
        teacher: parquet file with the embeddings of texts by another model (columns `text` and `embedding`), which
            those of the same texts are drawn to; a model that starts from scratch takes its word embeddings from it.
        teacher_weight: weight of 1 − cosine to the teacher.
        label_smoothing: of the caption loss.
        image_dropout: share of the rows whose caption is also learnt without its image, as classifier-free guidance
            needs (2307.16686).
        seed: of weights, order, augmentation and dropout.
        resume: go on from the newest whole checkpoint of `output`, if there is one.
        checkpoint_every: steps between checkpoints; 0: only at the end and on a signal.
        keep_checkpoints: older ones are removed.
        evaluations: name → `{dataset, split, max_samples, text_column, ...}`: what to evaluate on.
        evaluate_every: steps between evaluations; 0: only before and after.
        evaluate_before: evaluate the untrained model too.
        evaluation_pool: distinct texts that retrieval and zero-shot classification choose from.
        results: CSV file to which every final figure is appended as a row.
        sheet_images: pictures on the contact sheet that each evaluation draws; 0: none.
        log_every: steps between lines of the log.
        tracker: `trackio`, `tensorboard`, `wandb`, another name that Accelerate knows, or `none`.
        project: name of the run's project in the tracker.
        card: `language`, `license`, `datasets`, `limitations`, ... for the model card.
    """

    PROGRAM: ClassVar[str] = "mome.training.finetune"
    PURPOSE: ClassVar[str] = "Train or fine-tune MoME."

    output: str
    dataset: str
    # Where to start.
    checkpoint: str | None = None
    model: dict[str, Any] | None = None
    processor: str | None = None
    # Data.
    dataset_options: dict[str, Any] = field(default_factory=dict)
    split: str = "train"
    streaming: bool = False
    shuffle_buffer: int = 10_000
    image_column: str | None = None
    text_column: str = "text"
    positive_column: str | None = None
    max_text_tokens: int | None = None
    max_bad_share: float = 0.02
    augmentations: list[dict[str, Any]] = field(default_factory=list)
    num_workers: int = 0
    # Optimisation.
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 256
    chunk_size: int | None = None
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_learning_rate_share: float = 0.0
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    max_grad_norm: float = 1.0
    layer_decay: float = 1.0
    freeze: list[str] = field(default_factory=list)
    lora: dict[str, Any] | None = None
    ema_decay: float | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    # Objectives.
    contrastive_weight: float = 1.0
    caption_weight: float = 2.0
    teacher: str | None = None
    teacher_weight: float = 1.0
    label_smoothing: float = 0.0
    image_dropout: float = 0.0
    # The run.
    seed: int = 0
    resume: bool = False
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    # Evaluation.
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluate_every: int = 0
    evaluate_before: bool = False
    evaluation_pool: int = 1000
    results: str | None = None
    sheet_images: int = 16
    # Tracking.
    log_every: int = 10
    tracker: Literal["trackio", "tensorboard", "wandb", "mlflow", "comet_ml", "swanlab", "none"] = "trackio"
    project: str = "mome"
    card: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self._check_start()
        self._check_numbers()
        if (self.steps is None) == (self.epochs is None):
            raise RecipeError(f"steps={self.steps} and epochs={self.epochs}: set exactly one of them")
        if not self.contrastive_weight and not self.caption_weight:
            raise RecipeError("contrastive_weight and caption_weight are both 0: nothing would be learnt")
        if len(self.betas) != 2:
            raise RecipeError(f"betas={self.betas}: give two numbers")
        if self.streaming and self.epochs is not None:
            raise RecipeError(f"epochs={self.epochs} with streaming: the length of a stream is not known, set steps")

    def _check_start(self):
        if (self.checkpoint is None) == (self.model is None):
            raise RecipeError("set exactly one of checkpoint (to fine-tune) and model (to train from scratch)")
        if self.model is not None and self.processor is None:
            raise RecipeError("model without processor: name a folder that AutoProcessor can load")
        if self.lora is not None and self.model is not None:
            raise RecipeError("lora adapts a trained model: set checkpoint instead of model")

    def _check_numbers(self):
        at_least_one = ("batch_size", "chunk_size", "steps", "log_every", "keep_checkpoints", "evaluation_pool")
        for name in (*at_least_one, "max_text_tokens", "shuffle_buffer"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name}={value}: must be at least 1")
        not_negative = "num_workers warmup_steps weight_decay checkpoint_every evaluate_every sheet_images"
        for name in (*not_negative.split(), "contrastive_weight", "caption_weight", "teacher_weight", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise RecipeError(f"{name}={getattr(self, name)}: must not be negative")
        for name in ("max_bad_share", "label_smoothing", "image_dropout", "final_learning_rate_share", "layer_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name}={getattr(self, name)}: must be in 0…1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise RecipeError(f"ema_decay={self.ema_decay}: must be between 0 and 1")
        for name in ("learning_rate", "epochs"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise RecipeError(f"{name}={value}: must be above 0")


def _as_number(value: Any, annotation: Any) -> Any:
    """YAML reads `1e-3` as text and `1` as an integer; both are fine where a float is wanted."""
    choices = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if float in choices and int not in choices and not isinstance(value, bool):
        if isinstance(value, (int, str)):
            try:
                return float(value)
            except ValueError:
                return value
    if annotation == list[float] and isinstance(value, list):
        return [_as_number(each, float) for each in value]
    return value
