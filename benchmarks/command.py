"""What the command lines of the benchmarks have in common."""

import argparse
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from ..evaluation.results import environment


def parser_of(
    description: str, sections: Iterable[str], timed: str = "every competitor is"
) -> argparse.ArgumentParser:
    """Arguments of every benchmark: rounds, threads, sections, results.

    Args:
        sections: names of what `--only` may choose from, all of them its default.
        timed: what is timed once a round, with its verb.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help=f"how often {timed} timed (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default=",".join(sections), metavar="NAME,...", help="sections, in this order")
    parser.add_argument("--quick", action="store_true", help="tiny dimensions: shows that it runs, measures nothing")
    parser.add_argument("--results", type=Path, help="append the rows to this CSV file")
    return parser


def begin(
    parser: argparse.ArgumentParser, name: str, argv: list[str] | None
) -> tuple[argparse.Namespace, list[str], dict[str, str]]:
    """Reads the arguments, sets threads and seed, and prints the hardware.

    Args:
        parser: made by `parser_of`.
        name: of the benchmark, as in `python -m mome.benchmarks.NAME`.
        argv: its arguments; `None`: those of the process.

    Returns:
        The options, the sections to run, and the columns that all rows of the results file share.
    """
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    sections, known = options.only.split(","), parser.get_default("only").split(",")
    if unknown := [each for each in sections if each not in known]:
        parser.error(f"unknown section {unknown[0]!r}: choose from {', '.join(known)}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    common = environment() | {"command": shlex.join(["python", "-m", f"mome.benchmarks.{name}", *argv])}
    print(common["hardware"])
    return options, sections, common
