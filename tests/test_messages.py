"""Whatever a caller passes by mistake, a message is one short line that begins to name it: base64 data, a book, a
table of 5,000 columns.
"""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from builders import build_processor
from mome import MomeConfig
from mome.cli import app
from mome.configuration_mome import listed, quoted, shortened
from mome.convert import convert
from mome.convert.__main__ import main as convert_command
from mome.data.pairs import load_pairs, load_rows
from mome.embedder import Embedder
from mome.errors import MomeError, first_line
from mome.export.folder import export_checkpoint
from mome.onnx_embedder import load_embedder
from mome.pipeline_mome import MomeImageCaptioningPipeline, MomeZeroShotImageClassificationPipeline
from mome.publish import main as publish_command
from mome.retrieval import Searcher, embed_corpus, load_table, open_image, open_source
from mome.retrieval.sheet import write_sheet
from mome.training.device.recipe import DeviceRecipe
from mome.training.model import config_for, load_processor
from mome.training.recipe import Recipe
from retrieval_corpora import make_pictures, save_checkpoint

LONG = {"data": "data:image/png;base64," + "iVBORw0KGgo" * 9000, "book": "word " * 20_000}
LONGEST = 600  # characters of a message

pytestmark = pytest.mark.parametrize("long", LONG.values(), ids=LONG)


def check(message: str, long: str, start: int = 15):
    """One line, not long, with the beginning of the value."""
    assert len(message) <= LONGEST and "\n" not in message.strip(), message[:1000]
    assert long[:start] in message, message


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def embedder(checkpoint):
    return Embedder.load(checkpoint, "cpu", captions=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder, 3)
    return folder


@pytest.fixture(scope="module")
def searcher(pictures, embedder, tmp_path_factory):
    table = tmp_path_factory.mktemp("table") / "table.parquet"
    embed_corpus(pictures, table, embedder, progress=False)
    return Searcher.open(table, embedder)


def test_a_value_is_cut_in_one_place_and_its_ends_stay(long, tmp_path):
    values = [long, long.encode(), [long] * 3, {"a": long}, list(range(10**6)), torch.zeros(99, 99), np.zeros((99, 9))]
    for value in [*values, 10**5000, [[long]], {long}, (long,), Image.new("RGB", (9, 9))]:
        assert len(quoted(value)) <= 82 and "\n" not in quoted(value)
    assert quoted(long) == repr(f"{long[:50]}…{long[-29:]}") and shortened("a\nb") == r"a\nb" and quoted("a") == "'a'"
    assert quoted([1, "a"]) == "[1, 'a']" and quoted(None) == "None" and shortened(None) == "None"
    assert listed(range(5000), 3) == "0, 1, 2 and 4,997 more" and listed(["a", "b"]) == "a, b" and listed([]) == ""
    assert len(listed([long] * 5000)) < 450
    assert len(quoted(Path(long))) == 242 and quoted(tmp_path / "x" / "file.txt") == repr(
        str(tmp_path / "x" / "file.txt")
    )
    there = tmp_path / ("x" * 130) / "file.txt"
    assert len(quoted(str(there))) == 82 and quoted(str(there)).endswith("file.txt'")
    there.parent.mkdir()
    there.touch()
    assert quoted(there) == quoted(str(there)) == repr(str(there)) and str(there) in str(MomeError(f"{there}: empty"))
    check(str(MomeError(f"column {LONG['data']}\n\nis not there")), LONG["data"])
    check(first_line(ValueError(f"could not read {long}")), long)
    check(first_line(OSError(36, "File name too long", long)), long)


CALLS = {
    "config, value": lambda long: MomeConfig(hidden_size=long),
    "config, choice": lambda long: MomeConfig(patch_embedding_type=long),
    "config, key": lambda long: MomeConfig(**{long: 1}),
    "config, size": MomeConfig.from_size,
    "processor, picture": lambda long: build_processor()(images=long),
    "processor, bytes as text": lambda long: build_processor()(text=long.encode()),
    "processor, too long": lambda long: build_processor()(text=f"{long} {'cat ' * 20}", truncation=False),
    "model": lambda long: Embedder.load(long),
    "device": lambda long: Embedder.load("somebody/something", device=long),
    "backend": lambda long: load_embedder("somebody/something", long),
    "model of a backend": lambda long: load_embedder(long, "onnx"),
    "corpus": open_source,
    "option of a corpus": lambda long: open_source("somebody/something", **{long: 1}),
    "table": load_table,
    "image of a table": open_image,
    "member of a tar file": lambda long: open_image(f"{long}.tar#a.png"),
    "row of a data set": lambda long: open_image(f"{long}#train:0"),
    "sheet": lambda long: write_sheet([], long),
    "place of a sheet": lambda long: write_sheet([], f"{long}.html"),
    "checkpoint to export": lambda long: export_checkpoint(long, "output"),
    "type of an export": lambda long: export_checkpoint("somebody/something", "output", [long]),
    "kind to convert": lambda long: convert(long, "file", "output"),
    "file to convert": lambda long: convert("beit3", long, "output"),
    "data set": lambda long: load_rows(long, "train"),
    "files of pairs": lambda long: load_pairs([long], "image", "text"),
    "processor to train": load_processor,
    "recipe file": Recipe.from_yaml,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_long_value_makes_a_short_message(call, long):
    with pytest.raises((ValueError, OSError)) as caught:
        call(long)
    check(str(caught.value), long)


EMBEDDER_CALLS = {
    "texts": lambda embedder, long: embedder.embed_texts(long),
    "no text": lambda embedder, long: embedder.embed_texts([long.encode()]),
    "long text": lambda embedder, long: embedder.embed_texts([long], long_texts="refuse"),
    "option": lambda embedder, long: embedder.embed_texts(["a cat"], long_texts=long),
    "picture": lambda embedder, long: embedder.embed_images([long]),
    "field of the config": lambda embedder, long: Embedder.load(embedder.name, **{long: 1}),
    "value of the config": lambda embedder, long: Embedder.load(embedder.name, experts_per_token=long),
}


@pytest.mark.parametrize("call", EMBEDDER_CALLS.values(), ids=EMBEDDER_CALLS)
def test_an_embedder_answers_a_long_value_in_a_line(call, embedder, long):
    with pytest.raises(ValueError) as caught:
        call(embedder, long)
    check(str(caught.value), long)


CAPTION_OPTIONS = ["prompt", "num_captions", "guidance", "on_error"]
LABELS = {"candidate_labels": ["cat"]}


def test_pipelines_answer_a_long_value_in_a_line(embedder, long):
    picture = Image.new("RGB", (32, 32), (0, 90, 0))
    options = {"model": embedder.model, "processor": embedder.processor}
    caption = MomeImageCaptioningPipeline(**options)
    calls = [lambda: caption(long), lambda: caption(picture, **{long: 1})]
    calls += [lambda name=name: caption(picture, **{name: [long]}) for name in CAPTION_OPTIONS]
    classify = MomeZeroShotImageClassificationPipeline(model=embedder.model.model, processor=embedder.processor)
    for changed in (
        {"candidate_labels": [long, long]},
        {"candidate_labels": [[long]]},
        LABELS | {"templates": long},
        LABELS | {"hypothesis_template": long},
        LABELS | {"top_k": long},
        LABELS | {"on_error": long},
        LABELS | {long: 1},
    ):
        calls.append(lambda changed=changed: classify(picture, **changed))
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        check(str(caught.value), long)


def test_generation_answers_a_long_value_in_a_line(embedder, long):
    pixels = embedder.processor(images=Image.new("RGB", (32, 32)), return_tensors="pt").pixel_values
    for name in ("guidance_scale", "rerank_weight", "rerank_candidates", "contrastive_weight"):
        with pytest.raises(ValueError) as caught:
            embedder.model.generate(pixel_values=pixels, **{name: long})
        check(str(caught.value), long)


def test_search_answers_a_long_value_in_a_line(searcher, long, caplog):
    table = searcher.index.table
    for options in (
        {"image": long},
        {"id": long},
        {"text": "a cat", "modality": long},
        {"text": "a cat", "top_k": long},
        {"text": "a cat", "where": long},
        {"text": "a cat", "where": {long: 1}},
        {"text": "a cat", "where": {"id": {long: 1}}},
        {"text": "a cat", "where": {"id": {"in": long}}},
        {"text": "a cat", "where": {"id": {"==": [long]}}},
    ):
        with pytest.raises(ValueError) as caught:
            searcher.search(**options)
        check(str(caught.value), long)
    for call in (
        lambda: Searcher.open(table, searcher.embedder, index=long),
        lambda: Searcher.open(table, long),
        lambda: load_table(table.name, fingerprint=long),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        check(str(caught.value), long)
    assert searcher.search(text="§" * 100_000) == []
    check(caplog.records[-1].getMessage(), "§§§§§§")


def test_a_corpus_answers_a_long_value_in_a_line(pictures, embedder, long, tmp_path):
    plain = tmp_path / "table.parquet"
    twice = datasets.Dataset.from_dict({"text": ["a", "b"], "id": [long, long]})
    for call in (
        lambda: open_source(pictures, image_column=long),
        lambda: open_source(pictures, metadata_columns=[long]),
        lambda: open_source(twice, split=long, id_column="nothing"),
        lambda: embed_corpus(twice, plain, embedder, id_column="id", progress=False),
        lambda: embed_corpus(pictures, plain, embedder, modalities=long, progress=False),
        lambda: embed_corpus(pictures, long, embedder, progress=False),
        lambda: embed_corpus(pictures, plain, embedder, batch_size=long, progress=False),
        lambda: embed_corpus(pictures, plain, long, progress=False),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        check(str(caught.value), "" if "nothing" in str(caught.value) else long)


def test_cells_of_a_metadata_file_are_cut(pictures, embedder, long, tmp_path, caplog):
    name = next(pictures.rglob("*.png")).name
    for file, text in (
        ("metadata.csv", f'"{long}",b\n1,2\n'),
        ("metadata.csv", f'file_name,"{long}","{long}"\n{name},1,2\n'),
        ("metadata.jsonl", json.dumps({"file_name": name, long: "a"}) + "\n" + json.dumps({"file_name": name})),
        ("metadata.csv", f'file_name\n"{long}"\n{name}\n'),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / name).write_bytes(next(pictures.rglob(name)).read_bytes())
        (folder / file).write_text(text)
        try:
            open_source(folder)
        except ValueError as error:
            check(str(error), long)
    assert [record for record in caplog.records if "there is no picture" in record.getMessage()]
    for record in caplog.records:
        check(record.getMessage(), "")


def test_names_of_many_columns_are_cut(long):
    wide = datasets.Dataset.from_dict({f"{long[:300].strip()}{number}": [1] for number in range(5000)})
    for call in (
        lambda: open_source(wide, image_column="picture"),
        lambda: open_source(datasets.DatasetDict({f"{long[:300].strip()}{number}": wide for number in range(50)})),
    ):
        with pytest.raises(ValueError, match=r" and [\d,]+ more") as caught:
            call()
        check(str(caught.value), long)


RECIPE = {"output": "run", "dataset": "pairs", "checkpoint": "model", "steps": 1}
DEVICE = {"output": "run", "data": "icons", "processor": "model", "model": {}, "steps": 1}


@pytest.mark.parametrize("name", ["steps", "learning_rate", "betas", "tracker", "freeze", "lora", "rates", "card"])
def test_a_recipe_answers_a_long_value_in_a_line(name, long, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{name}: [{long}: 1\n")
    for call in (
        lambda: Recipe.from_dict(RECIPE | {name: {long: 1} if name not in ("lora", "rates", "card") else long}),
        lambda: Recipe.from_dict(RECIPE | {long: 1}),
        lambda: Recipe.from_dict(RECIPE | {"rates": {long: 2}}),
        lambda: DeviceRecipe.from_dict(DEVICE | {"phrasing": {long: 1}}),
        lambda: DeviceRecipe.from_dict(DEVICE | {"drawing": {"colour": long}}),
        lambda: config_for(build_processor(), {"hidden_size": long}),
        lambda: config_for(build_processor(), {long: 1}),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        check(str(caught.value), long)
    with pytest.raises(ValueError) as caught:
        Recipe.from_yaml(file)
    check(str(caught.value), "recipe.yaml")


COMMANDS = {
    "caption": ["caption", "LONG", "--model", "MODEL"],
    "caption, model": ["caption", "a.png", "--model", "LONG"],
    "caption, guidance": ["caption", "PICTURE", "--model", "MODEL", "--guidance", "LONG"],
    "classify, template": ["classify", "PICTURE", "--model", "MODEL", "--labels", "cat", "--template", "LONG"],
    "embed": ["embed", "LONG", "--output", "OUTPUT", "--model", "MODEL"],
    "embed, output": ["embed", "PICTURES", "--output", "LONG", "--model", "MODEL"],
    "embed, column": ["embed", "PICTURES", "--output", "OUTPUT", "--model", "MODEL", "--image-column", "LONG"],
    "embed, modality": ["embed", "PICTURES", "--output", "OUTPUT", "--model", "MODEL", "--modality", "LONG"],
    "embed, backend": ["embed", "PICTURES", "--output", "OUTPUT", "--model", "MODEL", "--backend", "LONG"],
    "search, table": ["search", "LONG", "a cat"],
    "search, picture": ["search", "TABLE", "--image", "LONG"],
    "search, id": ["search", "TABLE", "--id", "LONG"],
    "search, filter": ["search", "TABLE", "a cat", "--where", "LONG"],
    "search, column": ["search", "TABLE", "a cat", "--where", "LONG=1"],
    "search, modality": ["search", "TABLE", "a cat", "--modality", "LONG"],
    "search, index": ["search", "TABLE", "a cat", "--index", "LONG"],
    "search, sheet": ["search", "TABLE", "a cat", "--sheet", "LONG"],
    "export": ["export", "LONG"],
    "export, type": ["export", "MODEL", "--dtype", "LONG"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_commands_answer_a_long_value_in_a_line(command, searcher, checkpoint, pictures, long, tmp_path):
    words = {"LONG": long, "MODEL": checkpoint, "PICTURES": pictures, "PICTURE": next(pictures.rglob("*.png"))}
    words |= {"TABLE": searcher.index.table.name, "OUTPUT": tmp_path / "table.parquet"}
    arguments = [str(words.get(word, word.replace("LONG", long))) for word in command]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    check(result.stderr, long)


@pytest.mark.parametrize(
    "command",
    [
        ["beit3", "--checkpoint", "LONG"],
        ["siglip", "--checkpoint", "LONG"],
        ["coca", "--checkpoint", "LONG"],
        ["mome", "--checkpoint", "LONG", "--experts-per-group", "4"],
        ["siglip", "--checkpoint", "MODEL", "--revision", "LONG"],
        ["publish", "LONG", "--repo-id", "a/b", "--dry-run"],
        ["publish", "MODEL", "--repo-id", "LONG", "--dry-run"],
        ["publish", "MODEL", "--repo-id", "a/b", "--dry-run", "--results", "LONG"],
    ],
    ids=" ".join,
)
def test_converting_and_publishing_answer_a_long_value_in_a_line(command, checkpoint, long, tmp_path, capfd):
    name, *arguments = [str({"LONG": long, "MODEL": checkpoint}.get(word, word)) for word in command]
    if name == "publish":
        assert publish_command(arguments) == 1
    else:
        assert convert_command([name, *arguments, "--output", str(tmp_path / "output")]) == 1
    check(capfd.readouterr().err.strip().splitlines()[-1], long)
