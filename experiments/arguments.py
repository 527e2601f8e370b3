"""What the commands of this folder share: their arguments, and the pairs and models that these name."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..data.pairs import Pair, load_pairs


def add_results_argument(parser: argparse.ArgumentParser):
    parser.add_argument("--results", type=Path, metavar="FILE", help="CSV file to append the figures to")


def add_icons_arguments(parser: argparse.ArgumentParser):
    """A checkpoint, and the folder of the icons data set."""
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder that mome.icons.build wrote")


def add_pair_arguments(parser: argparse.ArgumentParser):
    """Arguments that say which pairs; `pairs_from` reads them."""
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="PARQUET")
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--text-column", default="texts", help="a text or a list of texts (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=1000, help="take the first so many (default: %(default)s)")


def pairs_from(options: argparse.Namespace) -> list[Pair]:
    """See `load_pairs`."""
    return load_pairs(options.data, options.image_column, options.text_column, options.limit)


def described(options: argparse.Namespace, pairs: Sequence[Pair]) -> str:
    """For the results file: which files, how many pairs."""
    return f"{' '.join(path.name for path in options.data)}, {len(pairs)} images"


__all__ = ["add_icons_arguments", "add_pair_arguments", "add_results_argument", "described", "pairs_from"]
