"""Converted SigLIP against transformers' `SiglipModel` with the same random weights.

    python -m mome.benchmarks.siglip --threads 2 --rounds 5 --results evaluation/results.csv

- `convert`: time of `python -m mome.convert siglip` for a full-size base model against a copy of its weights, and its
  peak memory against their size;
- `image`, `text`: embeddings a second, texts of 64 tokens as SigLIP pads them.

Before anything is timed, both sides must give the same embeddings.
"""

import functools
import json
import os
import tempfile
from pathlib import Path

import torch
from transformers import SiglipConfig, SiglipModel

from ..convert import convert
from ..evaluation.results import append_rows
from ..modeling_mome import MomeModel
from .command import begin, parser_of
from .conversion import time_conversion
from .inference import BASE, IMAGES, QUICK, TEXTS, Competitor, Race

TOKENS = 64  # of every text
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def write_upstream(folder: Path, shape: dict, words: int):
    """A random model as published, without a tokenizer."""
    sizes = {name: shape[name] for name in SIZES}
    images = {name: shape[name] for name in ("image_size", "patch_size")}
    model = SiglipModel(SiglipConfig(text_config=sizes | {"vocab_size": words}, vision_config=sizes | images))
    with torch.no_grad():
        model.logit_scale.fill_(4.7)
        model.logit_bias.fill_(-16)
    model.save_pretrained(folder)
    size = {"height": shape["image_size"], "width": shape["image_size"]}
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": size, "resample": 2}))


@torch.no_grad()
def embed(race: Race, folder: Path, modality: str):
    theirs = SiglipModel.from_pretrained(folder, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as made:
        convert("siglip", folder, Path(made) / "out", with_tokenizer=False)
        ours = MomeModel.from_pretrained(Path(made) / "out", dtype=torch.float32).eval()
    for dtype in race.dtypes:
        ours.to(dtype), theirs.to(dtype)
        if modality == "image":
            inputs, items, call = race.pixels(IMAGES, dtype), IMAGES, "get_image_features"
        else:
            inputs, items = torch.randint(8, theirs.config.text_config.vocab_size, (TEXTS, TOKENS)), TEXTS
            call = "get_text_features"
        runs = {"MoME": getattr(ours, call), "SiglipModel": getattr(theirs, call)}
        if dtype == torch.float32:
            found, wanted = (run(inputs).pooler_output for run in runs.values())
            wanted = torch.nn.functional.normalize(wanted, dim=-1)
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        competitors = [Competitor(name, _pooled(run), inputs, items).counted() for name, run in runs.items()]
        pairs = [("MoME", "SiglipModel"), ("MoME compiled", "SiglipModel compiled")]
        competitors += race.compiled(competitors)
        race.run(f"converted SigLIP, {modality} embeddings", competitors, dtype, pairs)


def _pooled(run):
    return lambda inputs: run(inputs).pooler_output


def conversion(race: Race, folder: Path):
    with tempfile.TemporaryDirectory() as made:
        output = Path(made) / "out"
        command = ["siglip", "--checkpoint", str(folder), "--output", str(output), "--no-tokenizer"]
        time_conversion(race, "SigLIP base", command, folder / "model.safetensors", output)


SECTIONS = {"convert": conversion}
SECTIONS |= {modality: functools.partial(embed, modality=modality) for modality in ("image", "text")}


def main(argv: list[str] | None = None) -> list[dict]:
    parser = parser_of(__doc__, SECTIONS, "everything is")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="of the sections image and text")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled competitors")
    parser.add_argument("--words", type=int, default=32_000, help="rows of the word embedding; SigLIP 2 has 256,000")
    options, sections, common = begin(parser, "siglip", argv)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the conversions
    dtypes = tuple(getattr(torch, name) for name in options.dtypes.split(","))
    shape = QUICK if options.quick else BASE
    race = Race(shape, options.rounds, not options.no_compile, dtypes)
    with tempfile.TemporaryDirectory() as folder:
        write_upstream(Path(folder), shape, 96 if options.quick else options.words)
        for section in sections:
            SECTIONS[section](race, Path(folder))
    if options.results:
        append_rows(options.results, [common | row for row in race.rows])
    return race.rows


if __name__ == "__main__":
    main()
