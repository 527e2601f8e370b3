"""accelerate launch -m mome.training.device --config training/recipes/icons-gpu.yaml [--field value ...]"""

import sys

from ...errors import MomeError
from .recipe import DeviceRecipe
from .trainer import main

if __name__ == "__main__":
    try:
        main(DeviceRecipe.from_command_line())
    except MomeError as error:
        sys.exit(f"error: {error}")
