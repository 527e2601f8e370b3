"""A converted CoCa against open_clip with the same weights, side by side.

    python -m mome.benchmarks.coca --threads 2 --rounds 5 --results evaluation/results.csv

- `convert`: random weights of `coca_ViT-B-32` in open_clip's layout; time of `python -m mome.convert` against a plain
  copy of the file, and its peak memory against the file's size;
- `image`, `text`: embeddings;
- `greedy`, `beams`: captions of 20 tokens, one image and eight at a time, one beam and six.

Before anything is timed, both sides must give the same embeddings and greedy captions. Their beams differ: open_clip
adds up logits that are not normalised. Its beam search wants a class that transformers 5 has no more, see
`mome.benchmarks.captioning`, whose stand-in does less.
"""

import functools
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..convert.coca import CONFIG_FILE
from ..convert.open_clip import convert_coca
from ..evaluation.results import append_rows
from ..modeling_coca import CocaForConditionalGeneration
from .captioning import generate_call, import_coca
from .command import begin, parser_of
from .conversion import time_conversion
from .inference import CAPTION_BATCHES, CAPTION_TOKENS, IMAGES, TEXTS, Competitor, Race
from .layouts import COCA, coca_config, coca_shapes, random_state

BEAMS = 6
QUICK = {"vision_width": 64, "vision_layers": 2, "patch": 8, "width": 32, "layers": 2, "head_dim": 4}
QUICK |= {"vocab": 96, "image": 32, "texts": 24, "queries": 9}
OURS, THEIRS = "CoCa", "open_clip"


def write_upstream(folder: Path, sizes: dict[str, int]) -> Path:
    """Random weights of these sizes, and their config, as open_clip would write them."""
    path, shapes = folder / "open_clip_model.safetensors", {**sizes}
    shapes.pop("head_dim")
    save_file(random_state(coca_shapes(**shapes)), path)
    (folder / CONFIG_FILE).write_text(json.dumps(coca_config(**sizes)))
    return path


def both(sizes: dict[str, int]) -> tuple[CocaForConditionalGeneration, nn.Module]:
    """Ours, through the converter, and open_clip's with the same random weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_upstream(Path(folder), sizes)
        convert_coca(path, Path(folder) / "out", with_tokenizer=False)
        ours = CocaForConditionalGeneration.from_pretrained(Path(folder) / "out")
        parts = coca_config(**sizes)["model_cfg"]
        names = ("embed_dim", "multimodal_cfg", "text_cfg", "vision_cfg")
        theirs = import_coca()[0](*(parts[name] for name in names))
        theirs.load_state_dict(load_file(path))
    return ours.eval(), theirs.eval()


def embed(race: Race, models: tuple[CocaForConditionalGeneration, nn.Module], modality: str):
    ours, theirs = models
    config = ours.config
    for dtype in race.dtypes:
        ours.to(dtype), theirs.to(dtype)
        if modality == "image":
            inputs, items = race.pixels(IMAGES, dtype), IMAGES
            runs = lambda pixels: ours.get_image_features(pixels).pooler_output, theirs.encode_image
        else:
            inputs, items = texts_of(config), TEXTS
            runs = lambda ids: ours.get_text_features(ids).pooler_output, theirs.encode_text
        if dtype == torch.float32:
            torch.testing.assert_close(runs[0](inputs), runs[1](inputs), atol=1e-5, rtol=0)
        competitors = [Competitor(name, run, inputs, items).counted() for name, run in zip((OURS, THEIRS), runs)]
        race.run(f"converted CoCa, {modality} embeddings", competitors, dtype, [(OURS, THEIRS)])


def texts_of(config) -> torch.Tensor:
    """(texts, tokens) ids of 16 tokens, filled up to the whole table as open_clip's tokenizer does."""
    words = torch.randint(1, config.bos_token_id, (TEXTS, 16))
    words[:, 0], words[:, -1] = config.bos_token_id, config.eos_token_id
    return nn.functional.pad(words, (0, config.max_position_embeddings - 16), value=config.filler_token_id)


def caption(race: Race, models: tuple[CocaForConditionalGeneration, nn.Module], beams: int):
    ours, theirs = models
    tokens = {"sot_token_id": ours.config.bos_token_id, "eos_token_id": ours.config.eos_token_id}
    # One token more: open_clip writes [EOS] in the last place.
    lengths = {"seq_len": CAPTION_TOKENS + 2, "min_seq_len": CAPTION_TOKENS + 1}
    how = {"generation_type": "top_k", "top_k": 1}
    if beams > 1:
        lengths = {"seq_len": CAPTION_TOKENS + 1, "min_seq_len": CAPTION_TOKENS}
        how = {"num_beams": beams, "num_beam_groups": 1}
    runs = {
        OURS: generate_call(ours, num_beams=beams),
        THEIRS: lambda inputs: theirs.generate(inputs["pixel_values"], **tokens, **lengths, **how),
    }
    for dtype in race.dtypes:
        ours.to(dtype), theirs.to(dtype)
        for batch in CAPTION_BATCHES:
            inputs = {"pixel_values": race.pixels(batch, dtype)}
            if dtype == torch.float32 and beams == 1:
                captions = [run(inputs)[:, : CAPTION_TOKENS + 1].tolist() for run in runs.values()]
                assert captions[0] == captions[1], "the captions of the same weights differ"
            competitors = [Competitor(name, run, inputs, batch).counted() for name, run in runs.items()]
            what = "greedy captions" if beams == 1 else f"captions with {beams} beams"
            race.run(
                f"converted CoCa, {what} of {CAPTION_TOKENS} tokens, batch {batch}",
                competitors,
                dtype,
                [(OURS, THEIRS)],
            )


def conversion(race: Race, sizes: dict[str, int]):
    with tempfile.TemporaryDirectory() as folder:
        path, output = write_upstream(Path(folder), sizes), Path(folder) / "out"
        command = ["coca", "--checkpoint", str(path), "--output", str(output), "--no-tokenizer"]
        command += ["--config", str(path.with_name(CONFIG_FILE))]
        time_conversion(race, "CoCa ViT-B-32", command, path, output)


SECTIONS = {
    "image": functools.partial(embed, modality="image"),
    "text": functools.partial(embed, modality="text"),
    "greedy": functools.partial(caption, beams=1),
    "beams": functools.partial(caption, beams=BEAMS),
}


@torch.no_grad()
def main(argv: list[str] | None = None) -> list[dict]:
    parser = parser_of(__doc__, ("convert", *SECTIONS), "everything is")
    parser.add_argument("--dtypes", default="float32", help="float32, bfloat16 or both")
    options, sections, common = begin(parser, "coca", argv)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the conversions
    sizes = QUICK if options.quick else COCA["base"]
    shape = {"image_size": sizes.get("image", 224), "patch_size": sizes["patch"]}
    shape |= {"hidden_size": sizes["vision_width"], "intermediate_size": 4 * sizes["vision_width"]}
    dtypes = tuple(getattr(torch, name) for name in options.dtypes.split(","))
    race, models = Race(shape, options.rounds, compile_models=False, dtypes=dtypes), None
    for section in sections:
        written = len(race.rows)
        try:
            if section == "convert":
                conversion(race, sizes)
            else:
                models = models or both(sizes)
                SECTIONS[section](race, models)
        except ModuleNotFoundError as error:
            print(f"{section} is left out: {error}")
        if options.results:  # section by section: open_clip's captions take minutes, and a run may be stopped
            append_rows(options.results, [common | row for row in race.rows[written:]])
    return race.rows


if __name__ == "__main__":
    main()
