"""The results file: one row for each measurement, with what is needed to repeat it; rows are only appended."""

import csv
import datetime
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers

COLUMNS = "commit date command hardware data metric value peer peer_value ratio".split()


def environment() -> dict[str, str]:
    """`commit`, `date` and `hardware` of a row, as they are now."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "unknown"
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    processor = re.search(r"model name\s*: (.*)", info)
    hardware = f"{processor[1] if processor else platform.machine()}, {torch.get_num_threads()} threads"
    hardware += f", torch {torch.__version__}, transformers {transformers.__version__}"
    return {"commit": commit, "date": datetime.date.today().isoformat(), "hardware": hardware}


def append_rows(path: Path, rows: list[dict]):
    """Appends rows to the CSV file, which is created with its header if needed. Missing columns stay empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


def append_figures(
    path: Path,
    module: str,
    data: str,
    figures: Mapping[str, float],
    prefix: str = "",
    arguments: Sequence[str] | None = None,
):
    """Appends a row for each figure.

    Args:
        path: the results file.
        module: what was run with `python -m`, and `arguments`, with which; default: those of this process.
        data: what was measured on.
        figures: metric → value; `prefix` is put before the metrics.
    """
    common = environment() | {"command": command_of(module, arguments), "data": data}
    rows = [common | {"metric": prefix + name, "value": f"{value:.4g}"} for name, value in figures.items()]
    append_rows(path, rows)


def command_of(module: str, arguments: Sequence[str] | None = None) -> str:
    """The command line that runs a module; default: with the arguments of this process."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)])


__all__ = ["COLUMNS", "append_figures", "append_rows", "command_of", "environment"]
