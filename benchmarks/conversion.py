"""Conversion of full-size checkpoints, and converted weights against their upstream implementation.

    python -m mome.benchmarks.conversion --threads 2 --rounds 5 --results evaluation/results.csv

- `convert`: random weights of the published base models in upstream layout; time of `python -m mome.convert` against a
  plain copy of the file, and its peak memory against the file's size;
- `image`, `text`: embeddings of the converted BEiT-3 base against torchscale's with the same weights;
- `caption`: its greedy captions against unilm's decoding loop over torchscale's, with and without its cache.

Before anything is timed, both sides must give the same embeddings and captions.
"""

import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import timeit
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.nn import functional as F

from ..convert import convert
from ..convert.operations import Options
from ..evaluation.results import append_rows
from ..modeling_mome import MomeForConditionalGeneration, MomeModel
from .command import begin, parser_of
from .inference import CAPTION_BATCHES, CAPTION_TOKENS, IMAGES, TEXTS, Competitor, Race
from .layouts import BEIT3, VLMO, beit3_shapes, random_state, vlmo_shapes

BOS, MASK = 0, 64001
QUICK = {"width": 64, "inner": 128, "layers": 2, "image": 32, "patch": 8}


def beit3_sizes(quick: bool) -> dict[str, int]:
    return {"image": 224, "patch": 16} | (QUICK if quick else BEIT3["base"])


# ------------------------------------------------------------------------------------------------- torchscale


class Torchscale(nn.Module):
    """BEiT-3 as published: torchscale's trunk with the heads of unilm `beit3/modeling_finetune.py`."""

    def __init__(self, sizes: dict[str, int], state: dict[str, torch.Tensor]):
        super().__init__()
        # torchscale takes stochastic depth from timm, which drags in torchvision; at drop rate 0 it is never called.
        sys.modules.setdefault("timm.models.layers", ModuleType("timm.models.layers")).drop_path = None
        from torchscale.architecture.config import EncoderConfig
        from torchscale.model.BEiT3 import BEiT3 as Trunk

        config = EncoderConfig(
            multiway=True, no_output_layer=True, vocab_size=state["beit3.text_embed.weight"].shape[0]
        )
        config.encoder_embed_dim, config.encoder_ffn_embed_dim = sizes["width"], sizes["inner"]
        config.encoder_layers, config.encoder_attention_heads = sizes["layers"], heads_of(sizes)
        config.img_size, config.patch_size = sizes["image"], sizes["patch"]
        self.beit3 = Trunk(config)
        for name in ("vision_head", "language_head", "mlm_head"):
            if f"{name}.weight" in state:
                rows, width = state[f"{name}.weight"].shape
                setattr(self, name, nn.Linear(width, rows, bias=f"{name}.bias" in state))
        self.load_state_dict({key: tensor for key, tensor in state.items() if key != "logit_scale"})

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.vision_head(self.beit3(visual_tokens=pixels)["encoder_out"][:, 0]), dim=-1)

    def embed_texts(self, input_ids: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.language_head(self.beit3(textual_tokens=input_ids)["encoder_out"][:, 0]), dim=-1)

    def caption(self, pixels: torch.Tensor, steps: int, cached: bool) -> torch.Tensor:
        """Greedy ids (images, 1 + steps): append `[MASK]`, read its row, keep the argmax, as unilm decodes.

        With a cache the newest token and `[MASK]` alone go through the model, and `[MASK]` is dropped from the cache.
        """
        batch, images = pixels.shape[0], self.beit3.vision_embed.num_position_embeddings()
        ids, mask = (
            pixels.new_full((batch, 1), BOS, dtype=torch.long),
            pixels.new_full((batch, 1), MASK, dtype=torch.long),
        )
        cache = {layer: {} for layer in range(self.beit3.encoder.num_layers)} if cached else None
        for step in range(steps):
            tokens = ids.shape[1] + 1
            hidden = torch.ones(images + tokens, images + tokens, dtype=pixels.dtype).triu(1)
            hidden[:images, :images] = 0
            text, visual, positions = torch.cat([ids, mask], dim=1), pixels, None
            if cached and step:
                text, visual, hidden = text[:, -2:], None, hidden[-2:]
                positions = torch.arange(tokens, tokens + 2)[None]  # from row 2 on: those of the last two tokens
            states = self.beit3(
                textual_tokens=text,
                visual_tokens=visual,
                attn_mask=hidden,
                incremental_state=cache,
                positions=positions,
            )["encoder_out"]
            ids = torch.cat([ids, self.mlm_head(states[:, -2:])[:, -1:].argmax(dim=-1)], dim=1)
            for entry in (cache or {}).values():
                for name in entry:
                    entry[name] = entry[name][:, :, :-1]
        return ids


def heads_of(sizes: dict[str, int]) -> int:
    return max(sizes["width"] // 64, 2)


def both(sizes: dict[str, int], kind: str) -> tuple[MomeForConditionalGeneration | MomeModel, Torchscale]:
    """Ours, through the converter, and torchscale's with the same random weights."""
    state = random_state(beit3_shapes(**sizes, kind=kind))
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": state}, Path(folder) / "upstream.pth")
        output = Path(folder) / "mome"
        options = Options(num_attention_heads=heads_of(sizes))
        convert("beit3", Path(folder) / "upstream.pth", output, with_tokenizer=False, options=options)
        ours = (MomeModel if kind == "retrieval" else MomeForConditionalGeneration).from_pretrained(output)
    return ours.eval(), Torchscale(sizes, state).eval()


# --------------------------------------------------------------------------------------------------- sections


@torch.no_grad()
def embed(race: Race, sizes: dict[str, int], modality: str):
    ours, theirs = both(sizes, "retrieval")
    for dtype in race.dtypes:
        ours.to(dtype), theirs.to(dtype)
        if modality == "image":
            inputs, items, run = race.pixels(IMAGES, dtype), IMAGES, theirs.embed_images
        else:
            inputs, items, run = race.token_ids(TEXTS), TEXTS, theirs.embed_texts
        features = ours.get_image_features if modality == "image" else ours.get_text_features
        if dtype == torch.float32:
            torch.testing.assert_close(features(inputs).pooler_output, run(inputs), atol=1e-5, rtol=0)
        competitors = [
            Competitor(
                "MoME", lambda inputs, features=features: features(inputs).pooler_output, inputs, items
            ).counted(),
            Competitor("torchscale", run, inputs, items).counted(),
        ]
        pairs = [("MoME", "torchscale"), ("MoME compiled", "torchscale"), ("MoME compiled", "torchscale compiled")]
        competitors += race.compiled(competitors)
        race.run(f"converted BEiT-3, {modality} embeddings", competitors, dtype, pairs)


@torch.no_grad()
def caption(race: Race, sizes: dict[str, int]):
    length = {"min_new_tokens": CAPTION_TOKENS, "max_new_tokens": CAPTION_TOKENS, "do_sample": False}
    ours, theirs = both(sizes, "captioning")
    for dtype in race.dtypes:
        ours.to(dtype), theirs.to(dtype)
        for batch in CAPTION_BATCHES:
            pixels = race.pixels(batch, dtype)
            runs = {
                "MoME": lambda pixels: ours.generate(pixel_values=pixels, **length),
                "unilm's loop": functools.partial(theirs.caption, steps=CAPTION_TOKENS, cached=True),
                "unilm's loop uncached": functools.partial(theirs.caption, steps=CAPTION_TOKENS, cached=False),
            }
            if dtype == torch.float32:
                ids = [run(pixels).tolist() for run in runs.values()]
                assert ids[0] == ids[1] == ids[2], "the captions of the same weights differ"
            competitors = [Competitor(name, run, pixels, batch).counted() for name, run in runs.items()]
            pairs = [("MoME", peer) for peer in list(runs)[1:]]
            race.run(
                f"converted BEiT-3, captions of {CAPTION_TOKENS} tokens, batch {batch}", competitors, dtype, pairs
            )


# In a process of its own: a command's time, and the most memory that it ever held.
MEASURE = """
import json, resource, sys, time
start = time.perf_counter()
from mome.convert.__main__ import main
assert main(sys.argv[1:]) == 0
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([time.perf_counter() - start, peak]))
"""


def conversion(race: Race, sizes: dict[str, int], quick: bool):
    vlmo = VLMO["base"] | (QUICK | {"heads": 2, "joint": 1} if quick else {})
    files = {
        "BEiT-3 base, retrieval": ("beit3", beit3_shapes(**sizes)),
        "BEiT-3 base, captioning": ("beit3", beit3_shapes(**sizes, kind="captioning")),
        "VLMo base, pretraining": ("vlmo", vlmo_shapes(**vlmo)),
    }
    for title, (kind, shapes) in list(files.items())[:: 2 if quick else 1]:
        options = ["--num-attention-heads", str(heads_of(sizes))] if quick else []
        with tempfile.TemporaryDirectory() as folder:
            path, output = Path(folder) / "upstream.pth", Path(folder) / "out"
            torch.save({"model": random_state(shapes)}, path)
            command = [kind, "--checkpoint", str(path), "--output", str(output), "--no-tokenizer", *options]
            time_conversion(race, title, command, path, output)


def time_conversion(race: Race, title: str, command: list[str], weights: Path, output: Path):
    """Times `python -m mome.convert` with a command line, against a copy of the file of the weights."""
    seconds, peaks, copies = [], [], []
    for _ in range(race.rounds):
        copies.append(timeit.timeit(lambda: shutil.copyfile(weights, f"{weights}.copy"), number=1))
        os.remove(f"{weights}.copy")
        run = [sys.executable, "-c", MEASURE, *command]
        printed = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True).stdout
        took, peak = json.loads(printed.splitlines()[-1])
        seconds.append(took)
        peaks.append(peak / 1e6)
        shutil.rmtree(output)
    megabytes = weights.stat().st_size / 1e6
    name = f"conversion of {title}, {megabytes:.0f} MB"
    print(f"{name}: {statistics.median(seconds):.1f} s, peak {max(peaks) / megabytes:.2f} × the file")
    ratios = [took / copy for took, copy in zip(seconds, copies)]
    race.keep(
        f"{name}, seconds: MoME", statistics.median(seconds), "copy of the file", statistics.median(copies), ratios
    )
    shares = [peak / megabytes for peak in peaks]
    race.keep(f"{name}, peak memory in MB: MoME", max(peaks), "size of the file", megabytes, shares)


SECTIONS = ("convert", "image", "text", "caption")


def main(argv: list[str] | None = None) -> list[dict]:
    parser = parser_of(__doc__, SECTIONS, "everything is")
    parser.add_argument("--dtypes", default="float32", help="of the sections image, text and caption")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled competitors")
    options, sections, common = begin(parser, "conversion", argv)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the conversions
    sizes = beit3_sizes(options.quick)
    shape = {"image_size": sizes["image"], "patch_size": sizes["patch"], "vocab_size": MASK}
    shape |= {"hidden_size": sizes["width"], "intermediate_size": sizes["inner"]}
    dtypes = tuple(getattr(torch, name) for name in options.dtypes.split(","))
    race = Race(shape, options.rounds, not options.no_compile, dtypes)
    for section in sections:
        try:
            if section == "convert":
                conversion(race, sizes, options.quick)
            elif section == "caption":
                caption(race, sizes)
            else:
                embed(race, sizes, section)
        except ModuleNotFoundError as error:
            print(f"{section} is left out: {error}")
    if options.results:
        append_rows(options.results, [common | row for row in race.rows])
    return race.rows


if __name__ == "__main__":
    main()
