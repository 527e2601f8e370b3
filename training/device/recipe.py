"""The recipe of a run with everything on the device, as one checked record."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ...configuration_mome import quoted
from ...errors import RecipeError
from ...icons.drawing import Drawing
from ...icons.phrases import Phrasing
from ..fields import RecipeFields


@strict
@dataclass
class DeviceRecipe(RecipeFields):
    r"""One run: texts, then pictures with them, then the held-out concepts as well.

    Args:
        output: folder of the run: checkpoints, log, `research` and at the end the trained model.
        data: folder of the data set's parquet files, or a file that `IconTensors.save` wrote.
        processor: folder or Hub id of the processor.
        model: `MomeConfig` fields of the model.
        teacher: parquet file with the embeddings of texts by another model, where `data` is a folder; see `Recipe`.
        seconds, steps: length of the run; exactly one of them. All shares below are of it.
        text_share: how long the text tower learns alone: first names and tags, then definitions as well.
        second_from: from where on the `second_splits` join; the weights before that are `research`.
        splits, second_splits: of the data set.
        second_times: how often each row of the `second_splits` comes in an epoch.
        batch_size: pairs of a step, over all processes; all are negatives of each other.
        start_batch_size: pairs of a step at first.
        start_share: up to which share of the run that is.
        text_batch_size: texts of a step while there are no pictures.
        text_tokens, caption_tokens: texts and captions are cut and padded to so many.
        learning_rate: peak of text and first stage.
        second_learning_rate: peak of the second stage, as a share of `learning_rate`.
        warmup_share: length of the linear warm-up; a cosine follows in each stage.
        weight_decay, betas: of AdamW.
        max_grad_norm: of gradient clipping.
        plateau: nothing gets harder before the contrastive loss of pictures is below this times ln(batch).
        plateau_steps: steps with pictures before that is asked for the first time.
        ramp_share: how long drawing and sentences then take to reach their full strength.
        drawing: fields of `mome.icons.drawing.Drawing` at full strength.
        phrasing: fields of `mome.icons.phrases.Phrasing` at full strength.
        kept_patches: share of an image's patches that are computed; all of them in the last part of each stage.
        caption_weight, teacher_weight: of these losses beside the contrastive one.
        image_teacher_weight: of the loss that draws an image to the teacher's embedding of its name.
        label_smoothing: of the caption loss.
        image_dropout: share of the rows whose caption is also learnt without its image.
        ema_decay: of the moving average of the weights, which is what is evaluated and saved.
        evaluations: name → splits of the data set.
        evaluation_pool: distinct names that each of them has at most.
        experts_implementation: of routed experts, as `from_pretrained` takes it; `None`: the model's own choice.
        channels_last: memory format of the stem.
        half_states: bfloat16 states between the layers, on CUDA.
        compile: compile layers and stem before the clock starts, on CUDA.
        cuda_graphs: record the step and replay it, on CUDA with one process; one that can't be recorded runs as it is.
        seed: of weights, order, drawing and dropout.
        resume: go on from the newest whole checkpoint of `output`, if there is one.
        checkpoint_every: steps between checkpoints; 0: only on a signal.
        keep_checkpoints: older ones are removed.
        export_every: steps between exports of the averaged weights to `output/latest`; 0: none.
        log_every: steps between lines of the log, at which the host waits for the device.
        max_shard_size: of the saved weights, as `save_pretrained` takes it.
        card: `language`, `license`, `datasets`, `limitations`, ... for the model card.
    """

    PROGRAM: ClassVar[str] = "mome.training.device"
    PURPOSE: ClassVar[str] = "Train MoME for icons with everything on the device."
    layer_decay: ClassVar[float] = 1.0  # all layers learn at one rate
    rates: ClassVar[dict[str, float]] = {}

    output: str
    data: str
    processor: str
    model: dict[str, Any]
    teacher: str | None = None
    # Length and stages.
    seconds: float | None = None
    steps: int | None = None
    text_share: float = 0.04
    second_from: float = 0.72
    splits: list[str] = field(default_factory=lambda: ["train"])
    second_splits: list[str] = field(default_factory=lambda: ["validation", "test"])
    second_times: int = 4
    # Batches.
    batch_size: int = 2048
    start_batch_size: int = 1024
    start_share: float = 0.2
    text_batch_size: int = 4096
    text_tokens: int = 16
    caption_tokens: int = 12
    # Optimisation.
    learning_rate: float = 1.2e-3
    second_learning_rate: float = 0.4
    warmup_share: float = 0.03
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    # How hard it is.
    plateau: float = 0.85
    plateau_steps: int = 50
    ramp_share: float = 0.2
    drawing: dict[str, Any] = field(default_factory=dict)
    phrasing: dict[str, Any] = field(default_factory=dict)
    kept_patches: float = 0.6
    # Objectives.
    caption_weight: float = 1.0
    teacher_weight: float = 1.0
    image_teacher_weight: float = 0.5
    label_smoothing: float = 0.05
    image_dropout: float = 0.1
    # Evaluation.
    evaluations: dict[str, list[str]] = field(default_factory=dict)
    evaluation_pool: int = 1000
    # Speed.
    experts_implementation: str | None = "all_experts"
    channels_last: bool = True
    half_states: bool = True
    compile: bool = True
    cuda_graphs: bool = True
    # The run.
    seed: int = 0
    resume: bool = False
    checkpoint_every: int = 0
    keep_checkpoints: int = 1
    export_every: int = 0
    log_every: int = 50
    max_shard_size: str = "5GB"
    card: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if (self.seconds is None) == (self.steps is None):
            raise RecipeError(f"seconds={self.seconds} and steps={self.steps}: set exactly one of them")
        for name in ("batch_size", "start_batch_size"):
            if getattr(self, name) < 2:
                raise RecipeError(f"{name}={getattr(self, name)}: must be at least 2, pairs are compared with others")
        at_least_one = "text_batch_size keep_checkpoints evaluation_pool log_every steps second_times plateau_steps"
        for name in at_least_one.split():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name}={value}: must be at least 1")
        for name in ("text_tokens", "caption_tokens"):
            if getattr(self, name) < 3:
                raise RecipeError(f"{name}={getattr(self, name)}: [BOS], a word and [EOS] need 3")
        shares = "text_share second_from start_share warmup_share ramp_share label_smoothing image_dropout ema_decay"
        for name in shares.split():
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name}={getattr(self, name)}: must be in 0…1")
        for name in ("checkpoint_every", "export_every", "weight_decay", "caption_weight", "teacher_weight"):
            if getattr(self, name) < 0:
                raise RecipeError(f"{name}={getattr(self, name)}: must not be negative")
        for name in ("seconds", "learning_rate", "second_learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise RecipeError(f"{name}={value}: must be above 0")
        if not 0 < self.kept_patches <= 1:
            raise RecipeError(f"kept_patches={self.kept_patches}: must be above 0 and at most 1")
        if self.text_share >= self.second_from:
            raise RecipeError(f"text_share={self.text_share} is not below second_from={self.second_from}")
        if len(self.betas) != 2:
            raise RecipeError(f"betas={quoted(self.betas)}: give two numbers")
        self.full_drawing(), self.full_phrasing()  # unknown fields are an error before any data is read

    def full_drawing(self) -> Drawing:
        return _record("drawing", Drawing, self.drawing)

    def full_phrasing(self) -> Phrasing:
        return _record("phrasing", Phrasing, self.phrasing)


def _record(name: str, kind: type, values: dict[str, Any]):
    known = [each.name for each in fields(kind)]
    for key, value in values.items():
        if key not in known:
            raise RecipeError(f"{name} has no field {quoted(key)}: choose among {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise RecipeError(f"{name}: {key}={quoted(value)} must be a number of at least 0")
    return kind(**values)
