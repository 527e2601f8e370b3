"""accelerate launch -m mome.training.finetune --config recipe.yaml [--field value ...]

Another name for `mome.training`, which fine-tunes where the recipe has a `checkpoint` and trains from scratch where it
has a `model`.
"""

from .__main__ import run
from .trainer import Trainer, main

__all__ = ["Trainer", "main"]

if __name__ == "__main__":
    run()
