"""The quickstart: what it reads, what it prints, and that anybody's pictures will do."""

import json
from collections import Counter

import pytest
from PIL import Image

from builders import build_processor
from models import tiny_captioner
from mome import quickstart
from mome.icons import samples
from mome.icons.licences import HELD_OUT_SETS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    labels = " ".join([*quickstart.label_set(["night"]), "cat dog cow a"]).split()
    processor = build_processor(image_size=16, words=sorted(set(labels)))
    tiny_captioner(vocab_size=len(processor.tokenizer)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, mode in enumerate(("RGB", "RGBA", "L", "P")):
        Image.new(mode, (20 + number, 30)).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:40])
    return folder


def test_every_picture_gets_a_caption_labels_and_a_place_on_the_sheet(checkpoint, pictures, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    results = quickstart.run(pictures, checkpoint, ["a cat", "a dog"], ["cat", "dog", "cow"], sheet)
    assert [each.name for each in results] == ["0.png", "1.png", "2.png", "3.png"]
    assert all(len(each.labels) == 3 and -1 <= each.cosine <= 1 for each in results)
    said = capsys.readouterr()
    assert "cut.png" in said.err and "notes.txt" not in said.err
    assert all(name in said.out for name in ("0.png", "3.png", "'a cat': ", "'a dog': "))
    assert Image.open(sheet).width > 400


def test_pictures_that_say_what_they_show_are_called_so(checkpoint, pictures, tmp_path):
    record = {"file_name": "2.png", "text": "night"}
    (pictures / "metadata.jsonl").write_text(json.dumps(record) + "\n")
    results = quickstart.run(pictures, checkpoint, ["a cat"], None, tmp_path / "sheet.png")
    assert [each.name for each in results] == ["0.png", "1.png", "night", "3.png"]
    assert all(label in quickstart.label_set(["night"]) for each in results for label, _ in each.labels)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere"], "no folder 'nowhere'"),
        (["{empty}"], "no image in"),
        (["{pictures}", "--checkpoint", "{empty}"], "no weights in"),
        (["{pictures}", "--labels", "cat", "cat"], "'cat' is given twice"),
    ],
)
def test_what_can_not_be_done_is_one_line(arguments, words, checkpoint, pictures, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    arguments = [each.format(empty=tmp_path / "empty", pictures=pictures) for each in arguments]
    if "--checkpoint" not in arguments:
        arguments += ["--checkpoint", str(checkpoint)]
    assert quickstart.main([*arguments, "--sheet", str(tmp_path / "sheet.png")]) == 1
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")][0].count(words) == 1


def test_the_samples_are_of_the_sets_held_out_whole_and_attributed():
    records = [json.loads(line) for line in (quickstart.SAMPLES / "metadata.jsonl").read_text().splitlines()]
    attribution = (quickstart.SAMPLES / "ATTRIBUTION.md").read_text()
    sets = Counter(record["source"].partition(":")[0] for record in records)
    assert sets == {name: 12 for name in HELD_OUT_SETS}
    for record in records:
        assert (quickstart.SAMPLES / record["file_name"]).exists()
        assert f"| {record['file_name']} |" in attribution and record["license"] in attribution
    assert len(list(quickstart.SAMPLES.glob("*.png"))) == len({record["text"] for record in records}) == 24


def test_the_samples_come_in_the_order_of_a_hash_one_for_each_name_that_has_a_definition():
    names = ("ear", "eye", "ear", "data", "arm")
    rows = [{"name": name, "source_id": f"a:{place}", "gloss": "organ"} for place, name in enumerate(names)]
    rows[3]["gloss"] = ""
    in_order = sorted((row for row in rows if row["gloss"]), key=lambda row: samples.order(row["source_id"]))
    first = {}
    for row in in_order:
        first.setdefault(row["name"], row["source_id"])
    assert samples.choose(rows) == first and first.keys() == {"ear", "eye", "arm"}
    assert samples.choose(list(reversed(rows)), count=2) == dict(list(first.items())[:2])
    assert samples.choose(rows, known=["eye"]).keys() == {"ear", "arm"}
