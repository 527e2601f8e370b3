"""Writes the tables of README, docs and model card from `evaluation/results.csv`: the last row of every measurement.

    python -m mome.benchmarks.table

Each stands between two comments, such as `<!-- speed -->` and `<!-- /speed -->`, in the files of `TABLES`.
"""

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path

from ..cards import HEADINGS, figures_table, replaced
from ..experiments.icons_card import CHECKPOINT, RESEARCH, ROWS, SHIPPED, icons_card, icons_figures

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "evaluation" / "results.csv"
CARD = CHECKPOINT / "README.md"
TABLES = {
    Path("README.md"): ("icons",),
    Path("docs", "results.md"): (
        "icons",
        "searches",
        "margins",
        "experts a token",
        "query forms",
        "speed",
        "speed gpu",
        "speed cpu icons",
        "speed cpu base",
        "training gpu",
        "guidance",
        "ablation 128",
        "ablation 256",
    ),
}

# What else is searched by in `mome.experiments.icons` → heading.
SEARCHES = {
    "broader, R-precision": "a broader word, R-precision",
    "glosses, R@10": "a definition, R@10",
    "templates, '{}', text_to_image_r10": "the name, R@10",
    "templates, 'This is a photo of {}.', text_to_image_r10": "in a sentence, R@10",
}
GUIDANCE = "test-00000-of-00001.parquet, 1500 images"
ABLATIONS = {
    "ablation 128": "mome-icons validation, 76800 pairs",
    "ablation 256": "mome-icons validation, width 256, ",
}
# What is shown of `mome.experiments.icons --experts-per-token K` → heading.
EXPERTS_A_TOKEN = {
    "unseen set healthicons: text_to_image_r10": "healthicons, R@10 t→i",
    "unseen set healthicons: image_to_text_r10": "i→t",
    "unseen set freehand: text_to_image_r10": "freehand, R@10 t→i",
    "unseen set freehand: image_to_text_r10": "i→t",
    "image embeddings per second at batch 1": "images/s, batch 1",
    "image embeddings per second at batch 32": "batch 32",
    "text embeddings per second at batch 32": "texts/s, batch 32",
    "greedy captions per second at batch 1": "captions/s, batch 1",
    "greedy captions per second at batch 32": "batch 32",
}
# Canvases and ways of `mome.experiments.icons --only padded` → what the table calls them.
MARGINS = {
    "full size": "none",
    "a quarter of the side": "a quarter of the side, white",
    "a quarter on yellow": "a quarter of the side, yellow",
    "twice as wide": "twice as wide, white",
}
WAYS = {"as it is": "as they are", "trimmed": "trimmed"}
FORMS = "query forms, R@1 of "  # begins the metrics of `mome.experiments.query_forms`
# What `mome.benchmarks.cpu` measures → heading.
CPU_COLUMNS = {
    "images/s, batch 1": "images/s, batch 1",
    "images/s, batch 32": "batch 32",
    "captions/s, batch 1": "captions/s, batch 1",
    "captions/s, batch 8": "batch 8",
}
DEVICE = "training on a device, pairs per second: "  # begins the metrics of `mome.training.device`'s speed
ABLATION_METRICS = {
    "text_to_image_r1": "R@1 t→i",
    "text_to_image_r10": "R@10 t→i",
    "image_to_text_r1": "R@1 i→t",
    "image_to_text_r10": "R@10 i→t",
    "zero_shot_top1": "zero-shot",
    "caption_f1": "caption F1",
}


def speed_table(rows: list[dict], gpu: bool = False) -> str:
    """What was measured, MoME's rate, the peer's, and their ratio with its spread over the rounds.

    Args:
        rows: of the results file.
        gpu: those of `mome.benchmarks.gpu`; otherwise those measured on a CPU.
    """
    timed = [row for row in rows if ", per second: " in row["metric"] and row["metric"].startswith("GPU, ") == gpu]
    latest = {(row["metric"].removeprefix("GPU, "), row["peer"]): row for row in timed}
    lines = ["| per second | MoME | peer | | ratio (min–max) |", "|---|---|---|---|---|"]
    for (metric, peer), row in latest.items():
        what, ours = metric.replace(", per second", "").rsplit(": ", 1)
        low, high = row["data"].rsplit("ratio ", 1)[1].split(" to ")
        what += "" if ours == "MoME" else f" ({ours})"
        lines.append(f"| {what} | {row['value']} | {peer} | {row['peer_value']} | {row['ratio']} ({low}–{high}) |")
    hardware = sorted({row["hardware"] for row in latest.values()})
    return "\n".join([*lines, "", "Measured on " + "; ".join(hardware) + "."])


def cpu_table(rows: Iterable[dict], model: str) -> str:
    """Each way of `mome.benchmarks.cpu` with a model, what it gives, and the ratio to the peer's fastest way."""
    begins = f"CPU, {model}, "
    latest = {row["metric"].removeprefix(begins): row for row in rows if row["metric"].startswith(begins)}
    cells: dict[str, dict[str, str]] = {}
    for metric, row in latest.items():
        column, way = metric.split(": ")
        cells.setdefault(way, {})[column] = f"{float(row['value']):,.4g} ({float(row['ratio']):.2f})"
    lines = [[way, *(own.get(column, "–") for column in CPU_COLUMNS)] for way, own in cells.items()]
    hardware = "; ".join(sorted({row["hardware"] for row in latest.values()}))
    table = _table(["", *CPU_COLUMNS.values()], sorted(lines, key=lambda line: not line[0].startswith("MoME")))
    return table + (f"\n\nMeasured on {hardware}." if hardware else "\n\nNot measured yet.")


def searches_table(rows: Iterable[dict]) -> str:
    """How well images are found by other texts than their names: a row for each data set."""
    latest = {(row["data"], row["metric"]): float(row["value"]) for row in rows if row["data"] in (SHIPPED, RESEARCH)}
    lines = []
    for name, label in ROWS.items():
        values = [
            latest.get((RESEARCH if "concepts" in name else SHIPPED, f"icons, {name}: {key}")) for key in SEARCHES
        ]
        if any(value is not None for value in values):
            lines.append([label, *("–" if value is None else f"{100 * value:.1f} %" for value in values)])
    return _table(["", *SEARCHES.values()], lines)


def experts_table(rows: Iterable[dict]) -> str:
    """What the shipped weights find, and how fast, with so many experts a token."""
    counts: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["data"].startswith(f"{SHIPPED}, ") and row["data"].endswith(" experts a token"):
            own = counts.setdefault(row["data"].split(", ")[-1].split()[0], {})
            own[row["metric"].removeprefix("icons, ")] = float(row["value"])
    lines = []
    for count, own in sorted(counts.items()):
        cells = [
            "–" if key not in own else f"{100 * own[key]:.1f} %" if "_r10" in key else f"{own[key]:.0f}"
            for key in EXPERTS_A_TOKEN
        ]
        lines.append([count, *cells])
    return _table(["experts a token", *EXPERTS_A_TOKEN.values()], lines)


def margins_table(rows: Iterable[dict]) -> str:
    """R@10 by names of pictures with wide margins, as they are and trimmed: a row for each canvas."""
    begins = "icons, unseen set "
    latest = {row["metric"].removeprefix(begins): float(row["value"]) for row in rows if row["data"] == SHIPPED}
    sets = [name.split()[-1] for name in ROWS if name.startswith("unseen set")]
    lines = []
    for canvas, label in MARGINS.items():
        values = [latest.get(f"{name}: padded, {canvas}, {way}, text_to_image_r10") for name in sets for way in WAYS]
        lines.append([label, *("–" if value is None else f"{100 * value:.1f} %" for value in values)])
    return _table(["margins", *(f"{name}, {way}" for name in sets for way in WAYS.values())], lines)


def forms_table(rows: Iterable[dict]) -> str:
    """R@1 of names in each form, and its ratio to that of the plain name."""
    found = {row["metric"].removeprefix(FORMS): float(row["value"]) for row in rows if row["metric"].startswith(FORMS)}
    plain = found.get("name")
    lines = [[f"`{form}`", f"{100 * value:.1f} %", f"{100 * value / plain:.0f} %"] for form, value in found.items()]
    return _table(["query", "R@1", "of the name's"], lines)


def device_table(rows: Iterable[dict]) -> str:
    """Pairs per second of `mome.training.device` after each measure, and the ratio to the first row."""
    latest = {row["metric"].removeprefix(DEVICE): row for row in rows if row["metric"].startswith(DEVICE)}
    lines = [[what, f"{float(row['value']):,.0f}", row["ratio"] or "1"] for what, row in latest.items()]
    hardware = sorted({row["hardware"] for row in latest.values()})
    return _table(["step", "pairs per second", "ratio"], lines) + "\n\nMeasured on " + "; ".join(hardware) + "."


def guidance_table(rows: Iterable[dict]) -> str:
    """What each way of guidance makes of the captions of held-out icons: a row for each, a column for each metric."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["data"] == GUIDANCE and row["metric"].startswith("captions, "):
            metric, method = row["metric"].removeprefix("captions, ").split(": ")
            found.setdefault(method, {})[metric] = f"{float(row['value']):.3f}"
    metrics = list(next(iter(found.values())))
    return _table(["captions", *metrics], [[method, *map(own.get, metrics)] for method, own in found.items()])


def ablation_table(rows: Iterable[dict], data: str) -> str:
    """Each variant of the design: parameters, and its figures in per cent, ± half the range of the seeds.

    Args:
        rows: of the results file.
        data: how the data of the ablation's rows begins; one seed a row.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}  # variant → metric → data → value
    for row in rows:
        if row["data"].startswith(data) and row["metric"].startswith("ablation, "):
            variant, metric = row["metric"].removeprefix("ablation, ").split(": ")
            found.setdefault(variant, {}).setdefault(metric, {})[row["data"]] = float(row["value"])
    lines = []
    for variant, own in found.items():
        (parameters,) = set(own["parameters"].values())
        cells = [_with_spread(list(own.get(metric, {}).values())) for metric in ABLATION_METRICS]
        lines.append([variant, f"{parameters / 1e6:.2f} M", *cells])
    return _table(["variant", "parameters", *ABLATION_METRICS.values()], lines)


def _with_spread(values: list[float]) -> str:
    if not values:
        return "–"
    middle, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{100 * middle:.1f}" + (f" ± {100 * half:.1f}" if len(values) > 1 else "")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def tables(rows: list[dict]) -> dict[str, str]:
    """Name → Markdown of all tables."""
    return {
        "icons": figures_table(icons_figures(rows, [*HEADINGS])),
        "searches": searches_table(rows),
        "margins": margins_table(rows),
        "experts a token": experts_table(rows),
        "query forms": forms_table(rows),
        "speed": speed_table(rows),
        "speed gpu": speed_table(rows, gpu=True),
        "speed cpu icons": cpu_table(rows, "icons"),
        "speed cpu base": cpu_table(rows, "base"),
        "training gpu": device_table(rows),
        "guidance": guidance_table(rows),
        **{name: ablation_table(rows, data) for name, data in ABLATIONS.items()},
    }


def filled(rows: list[dict], root: Path = ROOT) -> dict[Path, str]:
    """File → its text with the tables of these rows.

    Raises:
        ValueError: a file lacks the comments of one of its tables.
    """
    made, texts = tables(rows), {}
    for path, names in TABLES.items():
        text = (root / path).read_text(encoding="utf-8")
        for name in names:
            if f"<!-- {name} -->" not in text:
                raise ValueError(f"{path} has no <!-- {name} --> ... <!-- /{name} --> to write the table into")
            text = replaced(text, name, made[name])
        texts[path] = text
    texts[CARD] = icons_card(icons_figures(rows, [*HEADINGS]), root / CHECKPOINT)
    return texts


def main(argv: list[str] | None = None):
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for path, text in filled(rows).items():
        (ROOT / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
