"""Ways to embed and caption faster on a CPU: compiled bfloat16, 8-bit weights in torch, and ONNX Runtime.

    python -m mome.benchmarks.cpu --model icons --threads 2 --rounds 5 --results evaluation/results.csv
    python -m mome.benchmarks.cpu --model base --threads 2 --rounds 5 --results evaluation/results.csv

- `images`: image embeddings per second, batches of 1 and 32: float32 as loaded, bfloat16 compiled with the weights as
  constants, dynamic int8 of torchao compiled, ONNX Runtime in float32 and in int8 (`mome.export`);
- `captions`: greedy captions per second, batches of 1 and 8: float32, bfloat16, and ONNX Runtime.

`icons` is `checkpoints/mome-icons` with icons' shapes, `base` a ViT-B/16 at 224 px of random weights, beside SigLIP of
the same size in the same ways of torch. All take turns; a row is a median and its ratio to float32 MoME. A way whose
package is missing is named and left out.
"""

import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch._inductor.config
from torch import nn

from ..embedder import Embedder
from ..evaluation.results import append_rows
from ..export.folder import parts_of
from ..export.graphs import graph_of, quantised, save
from ..modeling_mome import MomeForConditionalGeneration
from ..onnx_embedder import DECODER, VISION, greedy_ids, open_session
from .command import begin, parser_of
from .inference import BASE, QUICK, mome_captioner, siglip

ICONS = Path(__file__).resolve().parents[1] / "checkpoints" / "mome-icons"
IMAGE_BATCHES, CAPTION_BATCHES, CAPTION_TOKENS, ORT_TYPES = (1, 32), (1, 8), 16, ("float32", "int8")
Way = tuple[str, Callable[[torch.Tensor], object]]


def rates_of(ways: list[Way], inputs: torch.Tensor, rounds: int) -> dict[str, float]:
    """Items per second of each way, which take turns; medians of the rounds, one more of which is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name, _ in ways}
    with torch.inference_mode():
        for round_number in range(rounds + 1):
            for name, run in ways:
                start = time.perf_counter()
                run(inputs)
                if round_number:
                    seconds[name].append(time.perf_counter() - start)
    return {name: len(inputs) / statistics.median(times) for name, times in seconds.items()}


def ways_of_torch(name: str, build: Callable[[], nn.Module]) -> Iterator[Way]:
    """A model's image embeddings as loaded, compiled in bfloat16, and compiled in int8."""

    def embed(model: nn.Module) -> Callable:
        return lambda pixels: model.get_image_features(pixel_values=pixels.to(model.dtype)).pooler_output

    yield f"{name} float32", embed(build())
    yield f"{name} bfloat16 compiled", torch.compile(embed(build().bfloat16()))
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ModuleNotFoundError as error:
        print(f"{name} int8 torchao is left out: {error}")
        return
    model = build()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    yield f"{name} int8 torchao compiled", torch.compile(embed(model))


def sessions_of(captioner: MomeForConditionalGeneration, folder: Path) -> dict[str, dict]:
    """`float32`, `int8` → ONNX Runtime's sessions of the image tower and the caption step."""
    parts = parts_of(Embedder(captioner, None))
    sessions: dict[str, dict] = {kind: {} for kind in ORT_TYPES}
    for part in (VISION, DECODER):
        graph = graph_of(parts[part])
        for kind in ORT_TYPES:
            path = folder / f"{part}-{kind}.onnx"
            if kind == "int8":
                quantised(graph, path)
            else:
                save(graph, path)
            sessions[kind][part] = open_session(path)
    return sessions


def image_ways(build: Callable[[], nn.Module], sessions: dict[str, dict], peer: Callable | None) -> list[Way]:
    def embed(session) -> Callable:
        return lambda pixels: session.run(["image_embeds"], {"pixel_values": pixels.numpy()})

    ways = list(ways_of_torch("MoME", lambda: build().model))
    ways += [(f"MoME {kind} ONNX Runtime", embed(sessions[kind][VISION])) for kind in ORT_TYPES]
    return ways + ([] if peer is None else list(ways_of_torch("SigLIP", peer)))


def caption_ways(build: Callable[[], nn.Module], sessions: dict[str, dict]) -> list[Way]:
    model = build()
    config = model.config
    length = min(CAPTION_TOKENS, config.max_position_embeddings - 1)  # [BOS] has a place, too

    def write(model: nn.Module) -> Callable:
        options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
        return lambda pixels: model.generate(pixel_values=pixels.to(model.dtype), **options, num_beams=1)

    def write_by(kind: str) -> Callable:
        vision, decoder = sessions[kind][VISION], sessions[kind][DECODER]
        return lambda pixels: greedy_ids(vision, decoder, config, [], pixels, length)

    ways = [("MoME float32", write(model)), ("MoME bfloat16", write(build().bfloat16()))]
    return ways + [(f"MoME {kind} ONNX Runtime", write_by(kind)) for kind in ORT_TYPES]


def main(argv: list[str] | None = None) -> list[dict]:
    parser = parser_of(__doc__, ("images", "captions"))
    parser.add_argument("--model", choices=("icons", "base"), default="icons")
    options, sections, common = begin(parser, "cpu", argv)
    shape = QUICK if options.quick else BASE
    if options.model == "icons":
        build = functools.partial(MomeForConditionalGeneration.from_pretrained, ICONS, dtype=torch.float32)
        side, peer = build().config.image_size, None
    else:
        build, side = lambda: mome_captioner(shape).eval(), shape["image_size"]
        peer = lambda: siglip(shape).eval()  # noqa: E731
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch._inductor.config.patch(freezing=True):
        sessions = sessions_of(build().eval(), Path(folder))
        for section in sections:
            ways = image_ways(build, sessions, peer) if section == "images" else caption_ways(build, sessions)
            for batch in IMAGE_BATCHES if section == "images" else CAPTION_BATCHES:
                found = rates_of(ways, torch.randn(batch, 3, side, side), options.rounds)
                for name, rate in found.items():
                    ratio = rate / found["MoME float32"]
                    print(f"{section}, batch {batch:2d}: {name:32s} {rate:9.1f}/s {ratio:6.2f}", flush=True)
                    metric = f"CPU, {options.model}, {section}/s, batch {batch}: {name}"
                    values = {"metric": metric, "value": round(rate, 1), "peer": "MoME float32"}
                    values |= {"peer_value": round(found["MoME float32"], 1), "ratio": round(ratio, 2)}
                    rows.append(common | {"data": f"random inputs, {options.rounds} rounds"} | values)
    if options.results:
        append_rows(options.results, rows)
    return rows


if __name__ == "__main__":
    main()
    sys.exit(0)
