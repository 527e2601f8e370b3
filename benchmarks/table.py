"""Writes the results table of the README from `evaluation/results.csv`: the last row of every comparison.

python -m mome.benchmarks.table
"""

import csv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- results -->\n", "<!-- /results -->"


def table(rows: list[dict]) -> str:
    """Markdown: what was measured, MoME's rate, the peer's, and their ratio with its spread over the rounds."""
    latest = {(row["metric"], row["peer"]): row for row in rows if ", per second: " in row["metric"]}
    lines = ["| per second | MoME | peer | | ratio (min–max) |", "|---|---|---|---|---|"]
    for (metric, peer), row in latest.items():
        what, ours = metric.replace(", per second", "").rsplit(": ", 1)
        low, high = row["data"].rsplit("ratio ", 1)[1].split(" to ")
        what += "" if ours == "MoME" else f" ({ours})"
        lines.append(f"| {what} | {row['value']} | {peer} | {row['peer_value']} | {row['ratio']} ({low}–{high}) |")
    hardware = sorted({row["hardware"] for row in latest.values()})
    return "\n".join([*lines, "", "Measured on " + "; ".join(hardware) + "."]) + "\n"


def main():
    with (ROOT / "evaluation" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(before + START + table(rows) + END + after)


if __name__ == "__main__":
    main()
