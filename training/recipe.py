"""The recipe: everything that can be set for a training run, as one checked record.

Processes (how many, DDP or FSDP, mixed precision) are not part of it: `accelerate launch` and `accelerate config` set
them.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict

from ..configuration_mome import MomeConfig, quoted
from ..errors import RecipeError
from .fields import RecipeFields


@strict
@dataclass
class Recipe(RecipeFields):
    r"""One training run.

    Args:
        output: folder of the run: checkpoints, logs and, at the end, the trained model.
        dataset: what `datasets.load_dataset` takes (an image folder with `metadata.jsonl`, parquet or WebDataset
            files, a Hub id), or a folder written by `save_to_disk`.
        checkpoint: folder or Hub id of the model to fine-tune.
        model: `MomeConfig` fields of a model to train from scratch; `size` names one of `MOME_SIZES`.
        processor: folder or Hub id of the processor, if it is not that of `checkpoint`.
        dataset_options: more keywords of `load_dataset` (`name`, `data_files`, `revision`, ...).
        split: the split to train on.
        streaming: read the data set as a stream, shuffled in a window of `shuffle_buffer` rows.
        shuffle_buffer: rows in the window that a stream is shuffled in.
        image_column: column of images (files, bytes or decoded); null: the first of type Image.
        text_column: column with a text or a list of texts, one of which is drawn each epoch.
        positive_column: rows with an equal value in this column are positives of each other; rows with an equal text
            always are.
        max_text_tokens: texts are cut and padded to this many tokens; null: the model's limit.
        max_bad_share: the run stops when more than this share of rows has an unreadable image or no text.
        augmentations: what is done to the examples of a batch, in order: `{name: ..., keyword: value, ...}`, where the
            name is one of `data.augment.AUGMENTATIONS` or `module:function`.
        num_workers: processes that prepare batches.
        steps: optimiser steps of the run; set either this or `epochs`.
        epochs: passes over the data set; set either this or `steps`.
        batch_size: pairs of one optimiser step over all processes; all are negatives of each other.
        chunk_size: pairs that a process holds in memory at once; less than its share of the batch turns GradCache on.
        learning_rate: peak, reached after warm-up.
        warmup_steps: steps of linear warm-up; then the rate falls along a cosine to `final_learning_rate_share`.
        final_learning_rate_share: the rate at the end, as a share of the peak.
        weight_decay: of AdamW; vectors and positions have none.
        betas: of AdamW.
        max_grad_norm: gradients are clipped to this norm; 0: not at all.
        layer_decay: a layer's rate is this times the rate of the layer above (fine-tuning: 0.6 to 0.9).
        freeze: patterns, as `fnmatch` takes them, of parameters that are not trained.
        rates: pattern → share of the learning rate that parameters of that name have; the first that fits counts.
        lora: keywords of `peft.LoraConfig`; only the adapters are trained.
        ema_decay: decay of a moving average of the weights, which is evaluated and saved instead of the weights.
        compile: compile the training forward pass with `torch.compile`.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        contrastive_weight: weight of the contrastive loss; null: that of the model's config, by default 1 (CoCa,
            2205.01917).
        caption_weight: weight of the caption loss; null: that of the model's config, by default 2 (CoCa, 2205.01917).
        teacher: parquet file (columns `text` and `embedding`) with another model's embeddings of the texts, towards
            which the text embeddings are trained; a new model's word embeddings start from them.
        teacher_weight: weight of 1 − cosine to the teacher.
        label_smoothing: of the caption loss.
        image_dropout: share of rows whose caption is also learnt without the image, for classifier-free guidance
            (2307.16686).
        seed: of weights, order, augmentation and dropout.
        resume: continue from the newest intact checkpoint in `output`, if there is one.
        checkpoint_every: steps between checkpoints; 0: only at the end and on a signal.
        keep_checkpoints: how many checkpoints are kept; older ones are removed.
        evaluations: what to evaluate on: name → `{dataset, split, max_samples, text_column, ...}`.
        evaluate_every: steps between evaluations; 0: only before and after.
        evaluate_before: evaluate before training too.
        results: CSV file to which every figure before and after training is appended as a row.
        sheet_images: images on the contact sheet that each evaluation draws; 0: no sheet.
        log_every: steps between lines of the log.
        tracker: `trackio`, `tensorboard`, `wandb`, `mlflow`, `comet_ml`, `swanlab` or `none`.
        project: name of the run's project in the tracker.
        card: `language`, `license`, `datasets`, `limitations`, ... for the model card.
    """

    PROGRAM: ClassVar[str] = "mome.training"
    PURPOSE: ClassVar[str] = "Train MoME from scratch or fine-tune it."

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
    rates: dict[str, float | int] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    ema_decay: float | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    # Objectives.
    contrastive_weight: float | None = None
    caption_weight: float | None = None
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
        if self.contrastive_weight == 0 and self.caption_weight == 0:
            raise RecipeError("contrastive_weight and caption_weight are both 0: nothing would be learnt")
        if len(self.betas) != 2:
            raise RecipeError(f"betas={quoted(self.betas)}: give two numbers")
        if self.streaming and self.epochs is not None:
            raise RecipeError(f"epochs={self.epochs} with streaming: a stream has no known length; set steps")

    def _check_start(self):
        if (self.checkpoint is None) == (self.model is None):
            raise RecipeError("set exactly one of checkpoint (to fine-tune) and model (to train from scratch)")
        if self.model is not None and self.processor is None:
            raise RecipeError("model without processor: name a folder that AutoProcessor can load")
        if self.lora is not None and self.model is not None:
            raise RecipeError("lora adapts a trained model: set checkpoint instead of model")

    def _check_numbers(self):
        at_least_one = ("batch_size", "chunk_size", "steps", "log_every", "keep_checkpoints")
        for name in (*at_least_one, "max_text_tokens", "shuffle_buffer"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name}={value}: must be at least 1")
        not_negative = "num_workers warmup_steps weight_decay checkpoint_every evaluate_every sheet_images"
        for name in (*not_negative.split(), "contrastive_weight", "caption_weight", "teacher_weight", "max_grad_norm"):
            if (getattr(self, name) or 0) < 0:
                raise RecipeError(f"{name}={getattr(self, name)}: must not be negative")
        for name in ("max_bad_share", "label_smoothing", "image_dropout", "final_learning_rate_share", "layer_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name}={getattr(self, name)}: must be between 0 and 1")
        for pattern, share in self.rates.items():
            if not 0 < share <= 1:
                raise RecipeError(
                    f"rates: {quoted(pattern)} has {share}: must be above 0 and at most 1; freeze keeps it"
                )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise RecipeError(f"ema_decay={self.ema_decay}: must be between 0 and 1")
        for name in ("learning_rate", "epochs"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise RecipeError(f"{name}={value}: must be above 0")

    def with_weights_of(self, config: MomeConfig) -> "Recipe":
        """The same recipe with the loss weights of a model's config where it has none."""
        weights = {"contrastive_weight": config.contrastive_loss_weight, "caption_weight": config.caption_loss_weight}
        missing = {name: float(weight) for name, weight in weights.items() if getattr(self, name) is None}
        return replace(self, **missing) if missing else self
