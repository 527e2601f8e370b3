"""Names in every form that people write them in are one to the shipped tokenizers, by tokenizer.json alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoProcessor, AutoTokenizer

from mome.embedder import Embedder
from mome.experiments.query_forms import FORMS, TEMPLATES, query_forms, read_gallery
from mome.icons.spelling import emoji_names, respell, spelling
from mome.icons.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]
CHECKPOINTS = [ROOT / "checkpoints" / name for name in ("mome-icons", "mome-icons-small")]
SAME = {
    "http server": [
        "HTTPServer",
        "httpServer",
        "HTTP_SERVER",
        "ＨＴＴＰServer",
        "http-server",
        "http/server",
        "http|server",
    ],
    "red bicycle": [
        "red\tbicycle\n",
        "RED BICYCLE",
        '"red bicycle"',
        "“Red bicycle”",
        "'red bicycle'.",
        "red  bi\u200bcycle",
    ],
    "creme brulee": ["Crème brûlée", "cre\u0300me bru\u0302le\u0301e", "CRÈME BRÛLÉE!"],
    "fish": ["ﬁsh", "\ufefffish", "fish 🎁", "fish🐟🎣!", "слон fish", "fish слон", "(fish)", "fish — ", "fish…"],
    "t-shirt": ["t–shirt", "tShirt", "t_shirt", "T-Shirt", "t shirt"],
    "o'clock": ["o’clock", "O'CLOCK"],
    "youtube": ["YouTube", "YOUTUBE"],
    "salt & pepper": ["Salt & Pepper", "& salt & pepper &"],
    "flag france": ["🇫🇷", "flag: France"],
    "honeybee on a hat": ["🐝 on a hat", "🐝on a hat"],
    "my dog face": ["my 🐶"],
    "waving hand medium skin tone": ["👋🏽"],
    "woman technologist medium skin tone": ["👩🏽\u200d💻"],
    "men with bunny ears light skin tone dark skin tone": ["👨🏻\u200d🐰\u200d👨🏿"],
    "red heart": ["❤️", "❤", "❤\ufe0e"],
    "keycap 2": ["2️⃣"],
    "flag england": ["🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"],
}
FRAGILE = '!"#$%()*+,/:;<=>?@[\\]^_`{|}~–—“”„«»…•·€©™°→✓'


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_forms_of_a_name_have_its_ids_however_the_tokenizer_is_loaded(folder):
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    readers = (
        lambda text: Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids,
        lambda text: AutoTokenizer.from_pretrained(folder)(text)["input_ids"],
        lambda text: processor(text=text)["input_ids"][0],
    )
    for plain, forms in SAME.items():
        expected = processor.tokenizer(plain)["input_ids"]
        assert processor.tokenizer.unk_token_id not in expected
        assert processor.tokenizer(forms)["input_ids"] == [expected] * len(forms), plain
        assert [read(forms[0]) for read in readers] == [expected] * 3
    whole = processor.tokenizer("red bicycle")["input_ids"]
    for mark in FRAGILE:
        for text in (f"red bicycle{mark}", f"{mark} red bicycle", f"red {mark} bicycle", f"red{mark}bicycle"):
            if mark not in "©™°" or text.endswith(mark):  # these have names
                assert processor.tokenizer(text)["input_ids"] == whole, text


def test_words_that_nobody_knows_stay_unknown_where_they_stand_alone():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS[0])
    assert tokenizer("слон")["input_ids"] == [1, tokenizer.unk_token_id, 2]
    assert tokenizer(["!!!", " ", "…"])["input_ids"] == [[1, 2]] * 3


def test_a_tokenizer_saved_again_spells_as_before(tmp_path):
    processor = AutoProcessor.from_pretrained(CHECKPOINTS[1], trust_remote_code=True)
    processor.save_pretrained(tmp_path)
    names = ("tokenizer.json", "tokenizer.json")
    saved, shipped = (
        json.loads((folder / name).read_text()) for folder, name in zip((tmp_path, CHECKPOINTS[1]), names)
    )
    assert saved["normalizer"] == shipped["normalizer"] and saved["model"]["vocab"] == shipped["model"]["vocab"]


def test_respelling_changes_nothing_but_the_spelling(tmp_path):
    (tmp_path / "en").mkdir()
    entries = [{"emoji": "🐝", "label": "honeybee"}, {"emoji": "👋", "label": "wave", "skins": []}]
    entries[1]["skins"] = [{"emoji": "👋🏽", "label": "wave: medium skin tone"}]
    (tmp_path / "en" / "data.json").write_text(json.dumps(entries))
    emoji = emoji_names(tmp_path)
    assert emoji == {"🐝": "honeybee", "👋": "wave", "👋🏽": "wave: medium skin tone"}
    tokenizer = train_tokenizer(["honeybee wave"] * 9, 60, 16)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    before = json.loads((tmp_path / "tokenizer.json").read_text())
    respell(tmp_path / "tokenizer.json", emoji)
    after = json.loads((tmp_path / "tokenizer.json").read_text())
    assert after.pop("normalizer") != before.pop("normalizer") and after == before
    assert spelling(emoji).normalize_str("🐝 👋 Bee").split() == ["honeybee", "wave", "bee"]


def test_every_form_of_the_names_in_the_gallery_finds_nearly_as_much_as_the_name():
    names, _ = read_gallery()
    some = np.arange(0, len(names), 4)
    with np.load(ROOT / "space" / "embeddings.npz") as arrays:
        images = torch.nn.functional.normalize(torch.from_numpy(arrays["images"].astype(np.float32)), dim=1)[some]
    figures = query_forms(Embedder.load(CHECKPOINTS[0], "cpu"), [names[place] for place in some], images)
    assert figures["name"] > 0.25
    for form in FORMS.keys() - set(TEMPLATES):
        assert figures[form] >= 0.95 * figures["name"], (form, figures)
    for form in TEMPLATES:
        assert figures[form] >= 0.85 * figures["name"], (form, figures)
