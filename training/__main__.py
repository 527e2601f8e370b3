"""accelerate launch -m mome.training --config recipe.yaml [--field value ...]"""

import sys

from ..errors import MomeError
from .recipe import Recipe
from .trainer import main


def run():
    """Trains what the command line says; an error of the recipe or its data is one line."""
    try:
        main(Recipe.from_command_line())
    except MomeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
