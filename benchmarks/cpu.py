"""Ways to embed and caption faster on a CPU, beside CLIP and BLIP of the same size in all precisions that suit them.

    python -m mome.benchmarks.cpu --model icons --threads 2 --seconds 220 --results evaluation/results.csv
    python -m mome.benchmarks.cpu --model base --threads 2 --seconds 480 --results evaluation/results.csv

- `images`: image embeddings, batches of 1 and 32: float32 as loaded, bfloat16, bfloat16 compiled with the weights as
  constants, and dynamic int8 of torchao, compiled; of MoME also ONNX Runtime in float32 and int8 (`mome.export`);
- `captions`: greedy captions of a set length, batches of 1 and 8, in the same ways; compiled, decoding is, too.
  MoME decodes with a static cache, which BLIP does not take.

`icons` is `checkpoints/mome-icons` with icons' shapes, beside dense models of its width and depth with as many active
weights; `base` is a ViT-B/16 at 224 px. All but the checkpoint have random weights. The peer for images is CLIP, the
fastest of those in `mome.benchmarks.inference`. After a warm-up all take turns in an order that rotates, of one call
or as many as fill a part of a second; one that has used up its time waits for the others. A row is a median and the
median ratio to the peer's fastest way in a type that it was made for: float32 or bfloat16. The peer in int8 has a row,
too. A way that can't be, such as for want of a package, is named and left out.

Most of the time goes into compiling, whose kernels stay in inductor's cache. `--rounds 0` fills it, in its own time
and on a busy machine if need be; a run that follows with the same number of threads is done sooner.
"""

import functools
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import torch
import torch._inductor.config
from torch import nn
from transformers import CompileConfig
from transformers.utils import logging

from ..embedder import Embedder
from ..errors import first_line
from ..evaluation.results import append_rows
from ..modeling_mome import MomeForConditionalGeneration
from ..onnx_captions import greedy_ids
from ..onnx_embedder import DECODER, VISION, open_session
from .command import begin, parser_of
from .inference import BASE, BF16, QUICK, blip, clip, mome_captioner

ICONS = Path(__file__).resolve().parents[1] / "checkpoints" / "mome-icons"
BATCHES = {"images": (1, 32), "captions": (1, 8)}
CAPTION_TOKENS, ORT_TYPES, PEERS = 20, ("float32", "int8"), ("CLIP", "BLIP")
COMPILED, ALL_EXPERTS, INT8 = "bfloat16 compiled", "bfloat16 compiled, all experts", "int8 torchao compiled"
SHARE = 4.0  # seconds of measurements after which a way waits for the others
SHORTEST = 0.3  # seconds that a turn lasts at least, after a call that only fills caches, which others have emptied
Run = Callable[[torch.Tensor], object]
# A way: what it is called, and what makes it.
Way = tuple[str, Callable[[], Run]]


@dataclass
class Models:
    """What is measured: MoME's captioner, its peers of the same size, and how long captions are."""

    captioner: Callable[[], MomeForConditionalGeneration]
    shape: dict
    caption_tokens: int
    sessions: dict[str, dict] = field(default_factory=dict)


def models_of(name: str, quick: bool) -> Models:
    """`icons` or `base`; `quick`: `base` in tiny dimensions."""
    if name == "base":
        shape = QUICK if quick else BASE
        return Models(lambda: mome_captioner(shape).eval(), shape, CAPTION_TOKENS)
    build = functools.partial(MomeForConditionalGeneration.from_pretrained, ICONS, dtype=torch.float32)
    config = build().config
    shape = {key: getattr(config, key) for key in BASE}
    return Models(build, shape, min(CAPTION_TOKENS, config.max_position_embeddings - 1))  # [BOS] has a place, too


def compiled_ways(builders: dict[str, Callable[[], nn.Module]], run_of: Callable) -> Iterator[Way]:
    """Of each model in bfloat16 and int8, `run_of(builder, compiled=True)`; of a routed one also with all its experts,
    of which a compiler makes one product."""
    for name, build in builders.items():
        yield f"{name} {COMPILED}", functools.partial(run_of, lambda build=build: build().to(BF16), compiled=True)
        yield f"{name} {INT8}", functools.partial(run_of, lambda build=build: int8(build()), compiled=True)
    build = builders["MoME"]
    if build().config.experts_per_group > 1:
        yield f"MoME {ALL_EXPERTS}", functools.partial(run_of, lambda: all_experts(build().to(BF16)), compiled=True)


def all_experts(model: nn.Module) -> nn.Module:
    model.set_experts_implementation("all_experts")
    return model


def int8(model: nn.Module) -> nn.Module:
    """The model with torchao's int8 weights, by which it multiplies inputs that it rounds to int8 as they come."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


# ----------------------------------------------------------------------------------------------------------- ways


def embedding(build: Callable[[], nn.Module], compiled: bool = False) -> Run:
    model = build().eval()

    def embed(pixels: torch.Tensor) -> torch.Tensor:
        return model.get_image_features(pixel_values=pixels.to(model.dtype)).pooler_output

    return torch.compile(embed, dynamic=False) if compiled else embed


def image_ways(models: Models) -> Iterator[Way]:
    """Those that need no compiler first: time may run out."""
    builders = {"CLIP": lambda: clip(models.shape), "MoME": lambda: models.captioner().model}

    def by_runtime(kind: str) -> Run:
        session = models.sessions[kind][VISION]
        return lambda pixels: session.run(["image_embeds"], {"pixel_values": pixels.numpy()})

    for name, build in builders.items():
        yield f"{name} float32", functools.partial(embedding, build)
        yield f"{name} bfloat16", functools.partial(embedding, lambda build=build: build().to(BF16))
    for kind in models.sessions:
        yield f"MoME {kind} ONNX Runtime", functools.partial(by_runtime, kind)
    yield from compiled_ways(builders, embedding)


def captioning(models: Models, build: Callable[[], nn.Module], compiled: bool = False) -> Run:
    """Greedy captions; `compiled`: MoME's image pass and its step with a static cache, or the two parts of BLIP."""
    model, options = build().eval(), {"do_sample": False, "num_beams": 1}
    options |= dict.fromkeys(("max_new_tokens", "min_new_tokens"), models.caption_tokens)
    if compiled and hasattr(model, "image_pass_for_captions"):
        options |= {"cache_implementation": "static", "compile_config": CompileConfig(dynamic=False, mode="default")}
        options["compile_config"]._compile_all_devices = True
        model.image_pass_for_captions = torch.compile(model.image_pass_for_captions, dynamic=False)
    elif compiled:
        model.vision_model.compile(dynamic=False)
        model.text_decoder.compile(dynamic=True)
    return lambda pixels: model.generate(pixel_values=pixels.to(model.dtype), **options)


def caption_ways(models: Models) -> Iterator[Way]:
    """Those that need no compiler first: time may run out."""
    write = functools.partial(captioning, models)
    builders = {"BLIP": lambda: blip(models.shape), "MoME": models.captioner}

    def by_runtime(kind: str) -> Run:
        vision, decoder = models.sessions[kind][VISION], models.sessions[kind][DECODER]
        config = models.captioner().config
        return lambda pixels: greedy_ids(vision, decoder, config, [], pixels, models.caption_tokens)

    for name, build in builders.items():
        yield f"{name} float32", functools.partial(write, build)
        yield f"{name} bfloat16", functools.partial(write, lambda build=build: build().to(BF16))
    for kind in models.sessions:
        yield f"MoME {kind} ONNX Runtime", functools.partial(by_runtime, kind)
    yield from compiled_ways(builders, write)


WAYS = {"images": image_ways, "captions": caption_ways}


def sessions_of(captioner: MomeForConditionalGeneration, folder: Path) -> dict[str, dict]:
    """`float32`, `int8` → ONNX Runtime's sessions of the image tower and the caption step; none without packages."""
    try:
        from ..export.folder import parts_of
        from ..export.graphs import graph_of, quantised, save
    except ModuleNotFoundError as error:
        print(f"  MoME ONNX Runtime is left out: {error}")
        return {}
    parts = parts_of(Embedder(captioner, None))
    sessions: dict[str, dict] = {kind: {} for kind in ORT_TYPES}
    for part in (VISION, DECODER):
        graph = graph_of(parts[part])
        for kind in ORT_TYPES:
            path = folder / f"{part}-{kind}.onnx"
            (quantised if kind == "int8" else save)(graph, path)
            sessions[kind][part] = open_session(path)
    return sessions


# ---------------------------------------------------------------------------------------------------------- turns


def rates_of(ways: dict[str, Run], inputs: torch.Tensor, rounds: int, deadline: float) -> dict[str, list[float]]:
    """Items per second in each round of each way; one that fails or comes after the deadline is named and left out."""
    rates: dict[str, list[float]] = {}
    for name, run in ways.items():
        if rates and time.perf_counter() > deadline:
            print(f"  {name} is left out: the time is up", flush=True)
            continue
        try:
            run(inputs)  # compiles
        except Exception as error:
            print(f"  {name} is left out: {type(error).__name__}: {first_line(error)}", flush=True)
        else:
            rates[name] = []
    spent = dict.fromkeys(rates, 0.0)
    for turn in range(rounds):
        start = turn % max(len(rates), 1)
        for name in [*rates][start:] + [*rates][:start]:
            if spent[name] < SHARE:
                calls, seconds = turn_of(ways[name], inputs)
                spent[name] += seconds
                rates[name].append(len(inputs) * calls / seconds)
    return rates


def turn_of(run: Run, inputs: torch.Tensor) -> tuple[int, float]:
    """Calls, and how many seconds they took: one, or as many as fill a turn after the first."""
    begun = time.perf_counter()
    run(inputs)
    seconds = time.perf_counter() - begun
    if seconds >= SHORTEST:
        return 1, seconds
    calls, begun = 0, time.perf_counter()
    while (seconds := time.perf_counter() - begun) < SHORTEST:
        run(inputs)
        calls += 1
    return calls, seconds


def built(section: str, models: Models) -> dict[str, Run]:
    """Name → a way that is ready to run; one without its package is named and left out."""
    ways = {}
    for name, make in WAYS[section](models):
        try:
            ways[name] = make()
        except ModuleNotFoundError as error:
            print(f"  {name} is left out: {error}")
    return ways


def rows_of(title: str, rates: dict[str, list[float]]) -> Iterator[dict[str, str]]:
    """Each way's median rate and its ratio to the peer's fastest way within a round, which are also printed."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    peers = [name for name in rates if name.startswith(PEERS) and "int8" not in name]
    peer = max(peers, key=medians.get) if peers else next(iter(rates))
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(values, rates[peer])]
        spread = f"ratio {min(ratios):.3f} to {max(ratios):.3f}"
        ratio = statistics.median(ratios)
        print(f"{title}: {name:28} {medians[name]:9.4g}/s, {ratio:6.3f} of {peer}", flush=True)
        yield {
            "data": f"random inputs, {len(values)} rounds, {spread}",
            "metric": f"CPU, {title}: {name}",
            "value": f"{medians[name]:.4g}",
            "peer": peer,
            "peer_value": f"{medians[peer]:.4g}",
            "ratio": f"{ratio:.3f}",
        }


def main(argv: list[str] | None = None) -> list[dict]:
    parser = parser_of(__doc__, WAYS)
    parser.add_argument("--model", choices=("icons", "base"), default="icons")
    parser.add_argument("--seconds", type=float, default=480, help="then what is left is named and left out")
    options, sections, common = begin(parser, "cpu", argv)
    logging.disable_progress_bar()
    begun, rows = time.perf_counter(), []
    models = models_of(options.model, options.quick)
    batches = [(section, batch) for section in sections for batch in BATCHES[section]]
    with tempfile.TemporaryDirectory() as folder:
        models.sessions = sessions_of(models.captioner().eval(), Path(folder))
        for number, (section, batch) in enumerate(batches):
            # Each may last until its part of the time that is left is over.
            now = time.perf_counter()
            deadline = now + (begun + options.seconds - now) / (len(batches) - number) if options.rounds else inf
            side = models.shape["image_size"]
            torch._dynamo.reset()
            gc.collect()
            with torch.inference_mode(), torch._inductor.config.patch(freezing=True):
                rates = rates_of(built(section, models), torch.randn(batch, 3, side, side), options.rounds, deadline)
            if not options.rounds:
                print(f"{options.model}, {section}, batch {batch}: compiled after {time.perf_counter() - begun:.0f} s")
                continue
            found = [common | row for row in rows_of(f"{options.model}, {section}/s, batch {batch}", rates)]
            if options.results:  # at once: a run may be stopped
                append_rows(options.results, found)
            rows += found
    return rows


if __name__ == "__main__":
    main()
    sys.exit(0)
