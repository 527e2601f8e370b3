"""The tables of README, docs and model card: written from the results file, and as it says."""

import csv

import pytest
from huggingface_hub import ModelCard

from mome.benchmarks import table
from mome.benchmarks.table import CARD, RESULTS, ROOT, TABLES
from mome.cards import HEADINGS
from mome.experiments.icon_measures import CANVASES
from mome.experiments.icons_card import RESEARCH, ROWS, SHIPPED, icons_figures


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def test_readme_docs_and_card_hold_the_tables_of_the_results_file(rows):
    for path, text in table.filled(rows).items():
        assert (ROOT / path).read_text() == text, f"{path} is old: python -m mome.benchmarks.table"


def test_readme_results_and_card_tell_the_same_of_the_shipped_weights(rows):
    shown = table.tables(rows)["icons"]
    assert shown.count("\n") == 5  # two lines of headings, four of figures
    for path in ("README.md", "docs/results.md", CARD):
        assert shown in (ROOT / path).read_text()
    card = ModelCard.load(ROOT / CARD)
    evaluations = {(each.dataset_name, each.metric_name): each.metric_value for each in card.data.eval_results}
    assert evaluations == {(each.data, each.metric): each.value for each in icons_figures(rows, [*HEADINGS])}
    assert len(evaluations) == len(ROWS) * (1 + len(HEADINGS))
    assert evaluations["unseen set `streamline-freehand-color`", "text_to_image_r10"] >= 0.58


def test_unseen_concepts_are_those_of_weights_that_had_not_seen_them():
    rows = []
    for data, value in ((SHIPPED, 0.9), (RESEARCH, 0.4)):
        rows += [result(f"icons, {name}: {metric}", value, data) for name in ROWS for metric in ("images", "hits")]
        rows += [result(f"icons, {name}: {key}", value, data) for name in ROWS for key in table.SEARCHES]
    found = {each.data: each.value for each in icons_figures(rows, ["hits"]) if each.metric == "hits"}
    assert found.pop(ROWS["unseen concepts"]) == 0.4 and set(found.values()) == {0.9} and len(found) == 3
    lines = table.searches_table(rows).splitlines()[2:]
    assert [line.count("90.0 %") for line in lines] == [4, 4, 0, 4] and lines[2].count("40.0 %") == 4


def result(metric: str, value: float, data: str = "icons, seed 0") -> dict:
    return {"metric": metric, "value": str(value), "data": data}


def test_the_last_row_of_a_measurement_counts_and_seeds_are_put_together():
    rows = [
        result("ablation, dual: text_to_image_r1", 0.9),
        result("ablation, dual: text_to_image_r1", 0.1),
        result("ablation, dual: text_to_image_r1", 0.2, "icons, seed 1"),
        result("ablation, dual: text_to_image_r1", 0.7, "another, seed 0"),
        result("ablation, dual: zero_shot_top1", 0.25),
        result("ablation, dual: parameters", 2.265e6),
    ]
    (line,) = table.ablation_table(rows, "icons, ").splitlines()[2:]
    assert line == "| dual | 2.27 M | 15.0 ± 5.0 | – | – | – | 25.0 | – |"


def test_speed_on_a_device_has_a_row_for_each_step_and_the_last_measurement_counts():
    first = {"ratio": "", "hardware": "a GPU"}
    rows = [
        result(f"{table.DEVICE}plain", 900) | first,
        result(f"{table.DEVICE}plain", 1000) | first,
        result(f"{table.DEVICE}+ compiled", 1500) | {"ratio": "1.500", "hardware": "a GPU"},
        result("GPU, training step, per second: MoME", 3),
    ]
    assert table.device_table(rows).splitlines()[2:] == [
        "| plain | 1,000 | 1 |",
        "| + compiled | 1,500 | 1.500 |",
        "",
        "Measured on a GPU.",
    ]


def test_speed_on_a_cpu_has_a_row_for_each_way_and_the_last_measurement_counts():
    def measured(metric: str, value: float, ratio: str) -> dict:
        return result(f"CPU, base, {metric}", value) | {"ratio": ratio, "hardware": "a CPU"}

    rows = [
        measured("images/s, batch 1: MoME int8", 1, "0.1"),
        measured("images/s, batch 1: CLIP float32", 10, "0.5"),
        measured("images/s, batch 1: MoME int8", 41.239, "2.062"),
        measured("captions/s, batch 8: MoME int8", 3, "2.500"),
        measured("images/s, batch 1: MoME int8", 7, "9") | {"metric": "CPU, icons, images/s, batch 1: MoME int8"},
    ]
    assert table.cpu_table(rows, "base").splitlines()[2:] == [
        "| MoME int8 | 41.24 (2.06) | – | – | 3 (2.50) |",
        "| CLIP float32 | 10 (0.50) | – | – | – |",
        "",
        "Measured on a CPU.",
    ]
    assert table.cpu_table(rows[:0], "base").endswith("Not measured yet.")


def test_margins_have_a_row_for_each_canvas_and_a_column_for_each_way():
    begins = "icons, unseen set freehand: padded, a quarter of the side"
    rows = [
        result(f"{begins}, as it is, text_to_image_r10", 0.1, SHIPPED),
        result(f"{begins}, trimmed, text_to_image_r10", 0.5, SHIPPED),
        result(f"{begins}, trimmed, image_to_text_r10", 0.9, SHIPPED),
        result(f"{begins}, trimmed, text_to_image_r10", 0.8, RESEARCH),
    ]
    lines = table.margins_table(rows).splitlines()[2:]
    assert lines[1] == "| a quarter of the side, white | – | – | 10.0 % | 50.0 % |" and len(lines) == 4
    assert list(table.MARGINS) == list(CANVASES)


def test_guidance_has_a_row_for_each_method():
    rows = [
        result("captions, R@1: unguided", 0.1234, table.GUIDANCE),
        result("captions, CIDEr: unguided", 0.5, table.GUIDANCE),
        result("captions, R@1: beam 4", 0.2, table.GUIDANCE),
        result("captions, CIDEr: beam 4", 0.6, table.GUIDANCE),
        result("captions, R@1: beam 4", 0.3, "other data"),
    ]
    assert table.guidance_table(rows).splitlines() == [
        "| captions | R@1 | CIDEr |",
        "| --- | --- | --- |",
        "| unguided | 0.123 | 0.500 |",
        "| beam 4 | 0.200 | 0.600 |",
    ]


def test_a_page_without_a_place_for_its_table_is_an_error(rows, tmp_path):
    for path in (*TABLES, CARD):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("---\nlicense: mit\n---\n\n# Nothing\n")
    with pytest.raises(ValueError, match=r"README.md has no <!-- icons -->"):
        table.filled(rows, tmp_path)
