"""MoME side by side with its peers on one GPU, everything that is worth a row in less than five minutes.

    python -m mome.benchmarks.gpu --seconds 280 --results evaluation/results.csv

- `image`, `text`: embeddings of a ViT-B/16 and of 32-token texts by a 12 × 768 tower at batch 1, 32 and 256 against
  CLIP and SigLIP: attention written out, `sdpa` (flash attention on a GPU), and with compiled layers;
- `caption`: greedy captions of 20 tokens at batch 1, 32 and 256 against BLIP and, with open_clip, CoCa;
- `training`: pairs a second of a contrastive step (autocast, AdamW) against CLIP and SigLIP;
- `routed`: 2 of 4 half-width experts a token, computed in each way, against a dense model: image pass, training step.

Sections whose name ends in `-compiled` come last: compilation takes most of their time. Captions have none: a cache
that grows would have to be compiled for at every length. All models have random weights
of the same dimensions in bfloat16. After a warm-up the competitors take turns in an order that rotates every round;
reported are the median rate of each, the ratio to each peer's fastest variant within a round (median, min to max), and
the model FLOPs per second as a share of the rate of a large matrix product, measured in the same run.

A row is written as soon as it is measured. What fails is named and left out. When the time is up, what is left is
skipped. `--quick` runs the same code with tiny models, on a CPU too.
"""

import functools
import gc
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer

from ..evaluation.results import COLUMNS, append_rows
from .captioning import COCA_TEXT, QUICK_TEXT, coca, coca_call, generate_call
from .command import begin, parser_of
from .inference import BASE, BF16, CAPTION_TOKENS, QUICK, TEXT_TOKENS, available, blip, clip, mome, mome_captioner
from .inference import siglip as siglip_of

ENCODERS = {"MoME": mome, "CLIP": clip, "SigLIP": siglip_of}
ROUTING = {"experts_per_group": 4, "experts_per_token": 2}
IMPLEMENTATIONS = ("all_experts", "grouped_mm", "eager")
COUNTED = 2  # pairs that FLOPs are counted with


class TimeUp(BaseException):
    """Raised by the alarm, from wherever the run is; nothing that handles errors may swallow it."""


@dataclass(frozen=True)
class Sizes:
    """What is raced: dimensions, batch sizes, the side of the matrix product, how layers are compiled.

    A measurement is of as many calls as it takes to fill `shortest` seconds.
    """

    shape: dict
    coca_text: dict
    batches: tuple[int, ...]
    training_batch: int
    product: int
    backend: str
    shortest: float


FULL = Sizes(BASE, COCA_TEXT | {"vocab_size": BASE["vocab_size"]}, (1, 32, 256), 256, 8192, "inductor", 0.05)
TINY = Sizes(QUICK, QUICK_TEXT, (1, 3), 3, 64, "aot_eager", 0)


@dataclass(frozen=True)
class Competitor:
    """One timed call that handles `items` images, texts, captions or pairs, each with `flops` FLOPs."""

    model: str
    variant: str
    run: Callable[[], object]
    items: int
    flops: float

    @property
    def name(self) -> str:
        return f"{self.model} {self.variant}".strip()


@dataclass
class Race:
    """Lets competitors take turns on a device, prints the comparison and writes its rows.

    Attributes:
        device: where everything is.
        sizes: of models and batches.
        rounds: how often everyone is timed.
        write: takes the row of a measurement.
        peak: FLOP/s of a large matrix product in bfloat16.
    """

    device: torch.device
    sizes: Sizes
    rounds: int
    write: Callable[[dict], None]
    peak: float = field(default=math.nan)

    def pixels(self, batch: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        side = self.sizes.shape["image_size"]
        return torch.randn(batch, 3, side, side, dtype=dtype, device=self.device)

    def token_ids(self, batch: int) -> torch.Tensor:
        """(batch, TEXT_TOKENS), full length and free of special tokens, so that nobody needs a mask."""
        return torch.randint(8, self.sizes.shape["vocab_size"], (batch, TEXT_TOKENS), device=self.device)

    def build(self, builder: Callable, **overrides) -> nn.Module:
        with self.device:
            return builder(self.sizes.shape, **overrides)

    def seconds(self, run: Callable[[], object], calls: int) -> float:
        """Seconds a call, from the device's own clock if it has one."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - start) / calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / calls

    def flops(self, run: Callable[[], object], items: int) -> float:
        """FLOPs for each of the items of a call; attention is counted as two matrix products."""
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() / items

    def measure_peak(self):
        """Sets `peak` to the best of some matrix products of a size that keeps the device busy."""
        side = self.sizes.product
        left, right = (torch.randn(side, side, dtype=BF16, device=self.device) for _ in range(2))
        fastest = min(self.seconds(lambda: left @ right, 10) for _ in range(5))
        self.peak = 2 * side**3 / fastest
        print(f"matrix product {side} × {side} in bfloat16: {self.peak / 1e12:,.1f} TFLOP/s", flush=True)

    def run(self, title: str, competitors: list[Competitor], ours: str = "MoME"):
        """Times the competitors; every variant of `ours` is held against each peer's fastest variant."""
        title = f"GPU, {title}"
        calls = {c.name: count for c in competitors if (count := self._warmed_up(title, c))}
        competitors = [c for c in competitors if c.name in calls]
        rates: dict[str, list[float]] = {c.name: [] for c in competitors}
        for turn in range(self.rounds):
            start = turn % max(len(competitors), 1)
            for c in competitors[start:] + competitors[:start]:
                rates[c.name].append(c.items / self.seconds(c.run, calls[c.name]))
        print(f"\n{title}", flush=True)
        median = {name: statistics.median(values) for name, values in rates.items()}
        for c in competitors:
            achieved = median[c.name] * c.flops
            shares = [rate * c.flops / self.peak for rate in rates[c.name]]
            print(
                f"  {c.name:32} {_spread(rates[c.name])} per second, {achieved / self.peak:.1%} of the product's rate"
            )
            self._keep(f"{title}, TFLOP/s: {c.name}", achieved / 1e12, ("matrix product", self.peak / 1e12), shares)
        for c in competitors:
            for peer in dict.fromkeys(each.model for each in competitors if c.model == ours != each.model):
                fastest = max((each.name for each in competitors if each.model == peer), key=median.get)
                ratios = [a / b for a, b in zip(rates[c.name], rates[fastest], strict=True)]
                print(f"  {c.name} / {fastest}: {_spread(ratios)}", flush=True)
                self._keep(f"{title}, per second: {c.name}", median[c.name], (fastest, median[fastest]), ratios)

    def _warmed_up(self, title: str, competitor: Competitor) -> int:
        """Calls of a measurement; 0 for a competitor that fails, whose error is printed."""
        try:
            for _ in range(2):  # compiles, and fills caches
                competitor.run()
            return min(50, max(1, math.ceil(self.sizes.shortest / self.seconds(competitor.run, 1))))
        except Exception as error:
            print(f"{title}: {competitor.name} is left out: {_first_line(error)}", flush=True)
        free(self.device)  # after the error, which holds on to what was computed
        return 0

    def _keep(self, metric: str, value: float, peer: tuple[str, float], ratios: list[float]):
        data = f"random weights and inputs, {self.rounds} rounds, ratio {min(ratios):.3f} to {max(ratios):.3f}"
        values = data, metric, f"{value:.4g}", peer[0], f"{peer[1]:.4g}", f"{statistics.median(ratios):.3f}"
        self.write(dict(zip(COLUMNS[-len(values) :], values, strict=True)))


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g}–{max(values):.4g})"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'without a message'}"


def with_compiled_layers(model: nn.Module, backend: str) -> nn.Module:
    """Compiles the transformer layers, which are one graph for all of them; a break in it is an error."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(fullgraph=True, dynamic=False, backend=backend)
    return model


def variant_of(race: Race, build: Callable, variant: str) -> nn.Module:
    """A model with attention written out (`eager`), with `sdpa`, or with SDPA in layers that are `compiled`."""
    model = race.build(build)
    model.set_attn_implementation("eager" if variant == "eager" else "sdpa")
    return with_compiled_layers(model, race.sizes.backend) if variant == "compiled" else model


# -------------------------------------------------------------------------------------------------- sections


@torch.no_grad()
def embed(race: Race, modality: str, compiled: bool = False):
    inputs_of = race.pixels if modality == "image" else race.token_ids
    entries, flops = [], {}
    for name, build in ENCODERS.items():
        for variant in ("sdpa", "compiled" if compiled else "eager"):
            model = variant_of(race, build, variant).to(BF16).eval()
            features = model.get_image_features if modality == "image" else model.get_text_features
            if variant == "sdpa":
                inputs = inputs_of(COUNTED)
                flops[name] = race.flops(functools.partial(features, inputs), COUNTED)
            entries.append((name, variant, features))
    for batch in reversed(race.sizes.batches):
        inputs = inputs_of(batch)
        competitors = [
            Competitor(name, variant, functools.partial(features, inputs), batch, flops[name])
            for name, variant, features in entries
        ]
        race.run(f"{modality} embeddings, batch {batch}, bfloat16", competitors)


@torch.no_grad()
def caption(race: Race):
    builders = {"MoME": mome_captioner, "BLIP": blip, "CoCa": functools.partial(coca, text=race.sizes.coca_text)}
    with race.device:
        models = {name: model.to(BF16).eval() for name, model in available(builders, race.sizes.shape)}
    calls = {name: coca_call(model, 1) if name == "CoCa" else generate_call(model) for name, model in models.items()}
    counted = {"pixel_values": race.pixels(COUNTED)}
    flops = {name: race.flops(functools.partial(call, counted), COUNTED) for name, call in calls.items()}
    for batch in race.sizes.batches:
        inputs = {"pixel_values": race.pixels(batch)}
        competitors = [
            Competitor(name, "", functools.partial(call, inputs), batch, flops[name]) for name, call in calls.items()
        ]
        race.run(f"captions of {CAPTION_TOKENS} tokens, batch {batch}, bfloat16", competitors)


def training_step(model: nn.Module, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer):
    """A contrastive step under autocast."""
    device = batch["pixel_values"].device.type
    with torch.autocast(device, BF16, enabled=batch["pixel_values"].dtype != BF16):
        loss = model(**batch, return_loss=True).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def stepper(race: Race, model: nn.Module, dtype: torch.dtype, count: int) -> Callable[[], None]:
    """A training step of a model with weights and pixels of `dtype`, on a batch of `count` pairs."""
    batch = {"pixel_values": race.pixels(count, dtype), "input_ids": race.token_ids(count)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    return functools.partial(training_step, model, batch, optimizer)


def training(race: Race, compiled: bool = False):
    competitors, flops, count = [], {}, race.sizes.training_batch
    for name, build in ENCODERS.items():
        for variant in ("sdpa", "compiled")[: 1 + compiled]:
            model = variant_of(race, build, variant).train()
            if variant == "sdpa":
                flops[name] = race.flops(stepper(race, model, torch.float32, COUNTED), COUNTED)
            run = stepper(race, model, torch.float32, count)
            competitors.append(Competitor(name, variant, run, count, flops[name]))
    race.run(f"training step, {count} pairs, bfloat16 autocast", competitors)


def routed(race: Race, compiled: bool = False):
    """The FLOPs are the dense model's: the matrices that a token uses are as large."""
    routing = ROUTING | {"expert_intermediate_size": race.sizes.shape["intermediate_size"] // 2}
    ways = [("dense", "", {})] + [("routed", way, routing) for way in IMPLEMENTATIONS]
    for what, count in (("image pass", race.sizes.batches[-1]), ("training step", race.sizes.training_batch)):
        competitors, flops, pixels = [], math.nan, race.pixels(count)
        for name, way, overrides in ways:
            model = race.build(mome, **overrides).to(BF16)
            if way:
                model.set_experts_implementation(way)
            if what == "image pass":
                model.eval()
                flops = flops if way else race.flops(_pass(model, race.pixels(COUNTED)), COUNTED)
                run = _pass(model, pixels)
            else:
                model.train()
                flops = flops if way else race.flops(stepper(race, model, BF16, COUNTED), COUNTED)
                run = stepper(race, model, BF16, count)
            if compiled:
                with_compiled_layers(model, race.sizes.backend)
            variant = f"{way} compiled".strip() if compiled else way
            competitors.append(Competitor(name, variant, run, count, flops))
        race.run(f"routed, {what}, batch {count}, bfloat16", competitors, ours="routed")
        del competitors, run, model
        free(race.device)


def _pass(model: nn.Module, pixels: torch.Tensor) -> Callable[[], object]:
    return torch.no_grad()(functools.partial(model.get_image_features, pixels))


SECTIONS: dict[str, Callable[[Race], None]] = {
    "image": functools.partial(embed, modality="image"),
    "text": functools.partial(embed, modality="text"),
    "training": training,
    "routed": routed,
    "caption": caption,
    "image-compiled": functools.partial(embed, modality="image", compiled=True),
    "training-compiled": functools.partial(training, compiled=True),
    "routed-compiled": functools.partial(routed, compiled=True),
    "text-compiled": functools.partial(embed, modality="text", compiled=True),
}


def free(device: torch.device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises `TimeUp` in the block when it has taken that long; 0: never."""

    def ring(*_):
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_sections(race: Race, sections: list[str], seconds: float):
    """One section after the other, until the time is up; one that fails is named, the others go on."""
    left = list(sections)
    try:
        with alarm(seconds), torch._dynamo.config.patch(recompile_limit=64):
            race.measure_peak()
            while left:
                start = time.perf_counter()
                try:
                    SECTIONS[left[0]](race)
                except Exception as error:
                    print(f"{left[0]} failed: {_first_line(error)}", flush=True)
                torch._dynamo.reset()
                free(race.device)
                print(f"{left.pop(0)}: {time.perf_counter() - start:.0f} s", flush=True)
    except TimeUp:
        print(f"{seconds:g} seconds are up; not finished: {', '.join(left)}", flush=True)


def main(argv: list[str] | None = None) -> list[dict]:
    """Runs the benchmark.

    Args:
        argv: its arguments; `None`: those of the process.

    Returns:
        The rows.
    """
    parser = parser_of(__doc__, SECTIONS)
    parser.add_argument("--seconds", type=float, default=280, help="then the rest is skipped; 0: no limit")
    parser.set_defaults(rounds=7)
    options, sections, common = begin(parser, "gpu", argv)
    if not torch.cuda.is_available() and not options.quick:
        parser.error("torch sees no CUDA device: run it where it does, or try it on the CPU with --quick")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        common["hardware"] = f"{torch.cuda.get_device_name()}, {common['hardware']}"
        print(torch.cuda.get_device_name())
    torch.set_float32_matmul_precision("high")
    rows: list[dict] = []
    write = functools.partial(_write, rows, options.results, common)
    race = Race(device, TINY if options.quick else FULL, options.rounds, write)
    run_sections(race, sections, options.seconds)
    return rows


def _write(rows: list[dict], results: Path | None, common: dict, row: dict):
    rows.append(row)
    if results:
        append_rows(results, [common | row])


if __name__ == "__main__":
    main()
