"""When what is learnt: pure functions of the share of the run that is over.

share   0 ──── text_share ───────────────────────────── second_from ───────────── 1
stage     text             first                                      second
rate      up, down         warm-up, cosine to 3 %                     up, cosine
patches                    some ................. all                 some ... all
strength                   0 until the plateau is left, then up to 1  1
"""

import math
import time
from dataclasses import dataclass

from .recipe import DeviceRecipe

LATE_FIRST, LATE_SECOND = 0.85, 0.6  # from these shares of a stage on no patch is left out
FINAL_FIRST = 0.03  # the rate at the end of the first stage
FEW_PATCHES = 4  # kept patches are a multiple of it, so that not every step has a shape of its own


@dataclass(frozen=True)
class Moment:
    """What holds at some share of a run.

    Attributes:
        stage: `text`, `first`, `second` or `end`.
        progress: share of the stage that is over.
        rate: the learning rate as a share of the peak.
        batch_size: pairs or texts of a step, over all processes.
        late: no patches are left out any more.
    """

    stage: str
    progress: float
    rate: float
    batch_size: int
    late: bool


def moment(recipe: DeviceRecipe, share: float) -> Moment:
    """What holds at `share` in 0…1 of a run."""
    if share >= 1:
        return Moment("end", 1.0, 0.0, recipe.batch_size, True)
    if share < recipe.text_share:
        progress = share / recipe.text_share
        rate = min(1.0, (progress + 0.01) / 0.1) * (1 - 0.7 * progress)
        return Moment("text", progress, rate, recipe.text_batch_size, False)
    batch_size = recipe.start_batch_size if share < recipe.start_share else recipe.batch_size
    if share < recipe.second_from:
        length = recipe.second_from - recipe.text_share
        progress = (share - recipe.text_share) / length
        warmth = min(1.0, (progress + 0.001) / max(recipe.warmup_share / length, 0.001))
        rate = warmth * (FINAL_FIRST + (1 - FINAL_FIRST) * _cosine(progress))
        return Moment("first", progress, rate, batch_size, progress > LATE_FIRST)
    progress = (share - recipe.second_from) / (1 - recipe.second_from)
    rate = recipe.second_learning_rate * min(1.0, (progress + 0.001) / 0.05) * _cosine(progress)
    return Moment("second", progress, rate, batch_size, progress > LATE_SECOND)


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def strength(recipe: DeviceRecipe, share: float, plateau_left: float | None) -> float:
    """Strength of drawing and sentences in 0…1, where the plateau was left at the share `plateau_left`, if it was."""
    if plateau_left is None:
        return 0.0
    return min(1.0, (share - plateau_left) / max(recipe.ramp_share, 1e-9))


def leaves_plateau(recipe: DeviceRecipe, relative_loss: float, steps: int) -> bool:
    """Whether pictures and texts see something in each other.

    Args:
        recipe: says where the plateau ends.
        relative_loss: contrastive loss of pictures as a share of ln(batch), which is what guessing costs; a mean over
            some steps.
        steps: how many steps with pictures there were.
    """
    return steps >= recipe.plateau_steps and relative_loss < recipe.plateau


def kept_patches(recipe: DeviceRecipe, patches: int, strength: float, late: bool) -> int | None:
    """How many patches of an image are computed, `None` for all: half of the others are left out at no strength."""
    share = 1 - (1 - recipe.kept_patches) * (1 + strength) / 2
    kept = max(1, round(share * patches / FEW_PATCHES) * FEW_PATCHES)
    return None if late or kept >= patches else kept


class Clock:
    """The share of a run that is over, by steps or by time.

    Between two looks at the clock, steps are taken to last as long as before: so that all processes agree without a
    word in every step. `look` is where they agree.

    Args:
        recipe: says how long the run is.
        seconds: spent by the run before it was interrupted.
        step: steps done.
    """

    def __init__(self, recipe: DeviceRecipe, seconds: float = 0.0, step: int = 0):
        self.recipe, self.started = recipe, time.monotonic() - seconds
        self.seen_seconds, self.seen_step, self.step_seconds = seconds, step, 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def share(self, step: int) -> float:
        if self.recipe.steps is not None:
            return step / self.recipe.steps
        return (self.seen_seconds + (step - self.seen_step) * self.step_seconds) / self.recipe.seconds

    def look(self, step: int, seconds: float):
        """Takes the time, `seconds` as the first process has it."""
        if step > self.seen_step:
            self.step_seconds = (seconds - self.seen_seconds) / (step - self.seen_step)
        self.seen_seconds, self.seen_step = seconds, step
