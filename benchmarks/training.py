"""Training steps side by side with open_clip's CoCa, and what GradCache needs of memory.

    python -m mome.benchmarks.training --threads 2 --rounds 5 --only step,memory --results evaluation/results.csv

- `step`: forward, backward and AdamW of a batch with the contrastive and the caption loss. MoME with the project's
  trainer, CoCa with open_clip's model and its `CoCaLoss`; same batch, threads, dtype, width, depth, patches and
  vocabulary; eager against eager, compiled against compiled.
- `memory`: peak resident memory of a process that makes one contrastive step with GradCache, at 256 and 4,096 pairs in
  chunks of 64.

Turns, medians and ratios are those of `mome.benchmarks.inference`.
"""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from ..configuration_mome import MomeConfig
from ..data.images import PixelScale
from ..evaluation.results import append_rows
from ..modeling_mome import MomeForConditionalGeneration
from ..training import objective
from ..training.batches import Batch
from ..training.optimisation import build_optimizer
from ..training.recipe import Recipe
from .captioning import coca, import_coca
from .command import begin, parser_of
from .inference import BF16, FP32, Competitor, Race

# The small icon model of the design: 20.6 million parameters, 16 patches.
SMALL = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
SMALL |= {"image_size": 64, "patch_size": 16, "vocab_size": 6000}
QUICK = SMALL | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
QUICK |= {"image_size": 32, "vocab_size": 96}
TOKENS, PAIRS, CHUNK, MEMORY_PAIRS = 12, 256, 64, (256, 4096)


def pairs_for(shape: dict, count: int) -> Batch:
    """Random 8-bit images, texts of 3 to 12 tokens."""
    generator = torch.Generator().manual_seed(0)
    side, lengths = shape["image_size"], torch.randint(3, TOKENS + 1, (count, 1), generator=generator)
    input_ids = torch.randint(6, shape["vocab_size"], (count, TOKENS), generator=generator)
    mask = torch.arange(TOKENS).expand(count, -1) < lengths
    input_ids[:, 0] = 1
    input_ids = input_ids.scatter(1, lengths - 1, 2).masked_fill(~mask, 0)
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    valid = torch.ones(count, dtype=torch.bool)
    return Batch(pixels, input_ids, mask.long(), torch.arange(count)[:, None], valid)


def mome_trainer(shape: dict, **recipe):
    """MoME and a training step of it, compiled or not."""
    config = MomeConfig(**shape, max_position_embeddings=16, projection_dim=256)
    settings = Recipe(output="-", dataset="-", checkpoint="-", steps=1, **recipe).with_weights_of(config)
    scale = PixelScale(1 / 255, (0.5,) * 3, (0.5,) * 3)
    model = objective.PairModel(
        MomeForConditionalGeneration(config).train(), captions=bool(settings.caption_weight), pixel_scale=scale
    )
    accelerator = Accelerator(cpu=True)
    optimizer = build_optimizer(model, settings, config.num_hidden_layers, torch.device("cpu"))

    def step(batch: Batch):
        objective.backward(accelerator, model, batch, settings)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def coca_trainer(shape: dict):
    """open_clip's CoCa and a training step of it, as its `open_clip_train` makes one."""
    width, heads = shape["hidden_size"], shape["num_attention_heads"]
    text = {"context_length": TOKENS, "vocab_size": shape["vocab_size"], "width": width, "heads": heads}
    model = coca(shape, text | {"layers": shape["num_hidden_layers"]}).train()
    loss = import_coca()[1](caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    scale = PixelScale(1 / 255, (0.5,) * 3, (0.5,) * 3)

    def step(batch: Batch):
        outputs = model(scale(batch.pixel_values), batch.input_ids)
        sum(loss(**outputs, output_dict=True).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def step(race: Race):
    for dtype in race.dtypes:
        batch, competitors = pairs_for(race.shape, PAIRS), []
        for compiled in (False, True)[: 1 + race.compile_models]:
            for name, build in {"MoME": mome_trainer, "CoCa": coca_trainer}.items():
                model, run = build(race.shape)
                run = torch.autocast("cpu", dtype, enabled=dtype != FP32)(run)
                one = Competitor(name, run, batch, PAIRS).counted()
                if compiled:
                    model.compile()
                    one = replace(one, name=f"{name} compiled")
                competitors.append(one)
        pairs = [("MoME", "CoCa"), ("MoME compiled", "CoCa compiled"), ("MoME compiled", "CoCa")]
        race.run("training step", competitors, dtype, pairs, training=True)
        for name in ("MoME", "CoCa"):
            model, _ = {"MoME": mome_trainer, "CoCa": coca_trainer}[name](race.shape)
            print(f"  {name}: {sum(each.numel() for each in model.parameters()) / 1e6:.1f} million parameters")


def _peak(shape: dict, count: int, threads: int, connection):
    torch.set_num_threads(threads)
    batch = pairs_for(shape, count)
    _, run = mome_trainer(shape, caption_weight=0.0, chunk_size=CHUNK)
    run(batch)
    connection.send(_peak_of_this_process())


def _peak_of_this_process() -> float:
    """Peak resident memory in MiB. `ru_maxrss` is no use here: a process starts with its parent's."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def memory(race: Race):
    """Each size in a fresh process; the embeddings of the batch and their gradients are taken off."""
    peaks = {}
    for count in MEMORY_PAIRS:
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        arguments = (race.shape, count, torch.get_num_threads(), theirs)
        process = multiprocessing.get_context("spawn").Process(target=_peak, args=arguments)
        process.start()
        embeddings = 4 * count * 256 * 4 / 2**20  # two sides, values and gradients, float32
        peaks[count] = ours.recv() - embeddings
        process.join()
        print(
            f"  GradCache, {count} pairs in chunks of {CHUNK}: {peaks[count]:.0f} MiB + {embeddings:.0f} of embeddings"
        )
    few, many = (peaks[count] for count in MEMORY_PAIRS)
    print(f"  {many / few:.3f} times as much")
    race.rows.append(
        {
            "data": f"random weights and inputs, chunks of {CHUNK}, embeddings and their gradients not counted",
            "metric": f"GradCache, peak memory in MiB: {MEMORY_PAIRS[1]} pairs",
            "value": f"{many:.4g}",
            "peer": f"{MEMORY_PAIRS[0]} pairs",
            "peer_value": f"{few:.4g}",
            "ratio": f"{many / few:.3f}",
        }
    )


SECTIONS = {"step": step, "memory": memory}


def main(argv: list[str] | None = None) -> list[dict]:
    parser = parser_of(__doc__, SECTIONS)
    parser.add_argument("--dtypes", default="float32", help="bfloat16 is autocast")
    parser.add_argument("--shape", type=json.loads, default={}, help="dimensions to change, as JSON")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled competitors")
    options, sections, common = begin(parser, "training", argv)
    dtypes = tuple({"float32": FP32, "bfloat16": BF16}[name] for name in options.dtypes.split(","))
    race = Race((QUICK if options.quick else SMALL) | options.shape, options.rounds, not options.no_compile, dtypes)
    for section in sections:
        SECTIONS[section](race)
    if options.results:
        append_rows(options.results, [common | row for row in race.rows])
    return race.rows


if __name__ == "__main__":
    main()
