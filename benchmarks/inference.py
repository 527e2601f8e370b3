"""MoME side by side with its peers: same process, threads, dtype and dimensions, random weights.

    python -m mome.benchmarks.inference --threads 2 --rounds 5 --only image,text --results evaluation/results.csv

- `image`: image embeddings of a ViT-B/16, eager, against CLIP and SigLIP (transformers) and BEiT-3 (torchscale);
- `text`: embeddings of 32-token texts by a 12 × 768 tower, against the same three;
- `compiled`: image embeddings under `torch.compile` with inductor's freezing; peers eager and compiled the same way;
- `caption`: greedy captions of 20 tokens against BLIP (transformers), one image and eight at a time;
- `routed`: 2 of 4 half-width experts per token against a dense model: image pass, training step; eager, compiled.

After a warm-up the competitors take turns in an order that rotates every round, so that a disturbance hits them all.
Reported are the median rate of each, the ratio within a round (median, min–max), and the model FLOPs per second as a
share of what a matrix product reaches in between. Every model uses exact GELU, the fastest activation here, the
transformers models use SDPA where they have it, and BEiT-3 goes without its sub-layer norms, as the others do.
"""

import functools
import os
import statistics
import sys
import timeit
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..configuration_mome import MomeConfig
from ..evaluation.results import COLUMNS, append_rows
from ..modeling_mome import MomeForConditionalGeneration, MomeModel
from .command import begin, parser_of

FP32, BF16 = torch.float32, torch.bfloat16
IMAGES, TEXTS, TEXT_TOKENS, CAPTION_TOKENS, CAPTION_BATCHES = 16, 64, 32, 20, (1, 8)

BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BASE |= {"image_size": 224, "patch_size": 16, "vocab_size": 30522, "hidden_act": "gelu"}
QUICK = BASE | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
QUICK |= {"image_size": 32, "patch_size": 8, "vocab_size": 96}
TEXT = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}


def mome(shape: dict, model_class: type = MomeModel, **overrides) -> nn.Module:
    return model_class(MomeConfig(**shape | TEXT | overrides))


def clip(shape: dict, config_class: type = transformers.CLIPConfig) -> nn.Module:
    config = config_class(text_config=shape | TEXT, vision_config=shape)
    return transformers.AutoModel.from_config(config, attn_implementation="sdpa")


def encoder(build: Callable, shape: dict, **overrides) -> tuple[nn.Module, Callable, Callable]:
    """A model, how it embeds images, and how it embeds texts."""
    model = build(shape, **overrides)
    return (
        model,
        lambda pixels: model.get_image_features(pixel_values=pixels).pooler_output,
        lambda input_ids: model.get_text_features(input_ids=input_ids).pooler_output,
    )


def beit3(shape: dict) -> tuple[nn.Module, Callable, Callable]:
    # torchscale takes stochastic depth from timm, which drags in torchvision; at drop rate 0 it is never called.
    sys.modules.setdefault("timm.models.layers", ModuleType("timm.models.layers")).drop_path = None
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3

    config = EncoderConfig(multiway=True, subln=False, no_output_layer=True, vocab_size=shape["vocab_size"])
    config.encoder_embed_dim, config.encoder_ffn_embed_dim = shape["hidden_size"], shape["intermediate_size"]
    config.encoder_layers, config.encoder_attention_heads = shape["num_hidden_layers"], shape["num_attention_heads"]
    config.img_size, config.patch_size = shape["image_size"], shape["patch_size"]
    trunk, head = BEiT3(config), nn.Linear(shape["hidden_size"], 512, bias=False)
    return (
        nn.ModuleList([trunk, head]),
        lambda pixels: head(trunk(visual_tokens=pixels)["encoder_out"][:, 0]),
        lambda input_ids: head(trunk(textual_tokens=input_ids)["encoder_out"][:, 0]),
    )


def blip(shape: dict) -> nn.Module:
    text = shape | TEXT | {"encoder_hidden_size": shape["hidden_size"], "sep_token_id": 2}
    return transformers.BlipForConditionalGeneration(transformers.BlipConfig(text_config=text, vision_config=shape))


mome_captioner = functools.partial(mome, model_class=MomeForConditionalGeneration)
siglip = functools.partial(clip, config_class=transformers.SiglipConfig)
ENCODERS = {"MoME": mome, "CLIP": clip, "SigLIP": siglip}
ENCODERS = {name: functools.partial(encoder, build) for name, build in ENCODERS.items()} | {"BEiT-3": beit3}
CAPTIONERS = {"MoME": mome_captioner, "BLIP": blip}


def available(builders: dict[str, Callable], shape: dict) -> Iterator[tuple[str, object]]:
    """Builds each model; a peer whose package is missing is named and left out."""
    for name, build in builders.items():
        try:
            yield name, build(shape)
        except ModuleNotFoundError as error:
            print(f"{name} is left out: {error}")


@dataclass(frozen=True)
class Competitor:
    """One timed call, `run(inputs)`, that handles `items` images, texts or captions with `flops` FLOPs."""

    name: str
    run: Callable
    inputs: object
    items: int
    flops: float = 0.0

    def __call__(self):
        return self.run(self.inputs)

    def counted(self) -> "Competitor":
        # Plain matrix products in attention, for this one call: the counter cannot see into the CPU's fused kernel.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self()
        return replace(self, flops=counter.get_total_flops())


class Race:
    """Lets competitors take turns, prints the comparison and keeps its rows."""

    def __init__(self, shape: dict, rounds: int, compile_models: bool, dtypes: tuple[torch.dtype, ...] = (BF16, FP32)):
        self.shape, self.rounds, self.compile_models, self.dtypes = shape, rounds, compile_models, dtypes
        self.rows: list[dict] = []

    def compiled(self, competitors: list[Competitor]) -> list[Competitor]:
        chosen = competitors * self.compile_models
        return [replace(c, name=f"{c.name} compiled", run=torch.compile(c.run)) for c in chosen]

    def pixels(self, batch: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(batch, 3, self.shape["image_size"], self.shape["image_size"], dtype=dtype)

    def token_ids(self, batch: int) -> torch.Tensor:
        """(batch, TEXT_TOKENS), full length and free of special tokens, so that nobody needs a mask."""
        return torch.randint(8, self.shape["vocab_size"], (batch, TEXT_TOKENS))

    def gemm_rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of the trunk's widest matrix product, the best of some calls: what the machine gives right now."""
        tokens = IMAGES * ((self.shape["image_size"] // self.shape["patch_size"]) ** 2 + 1)
        inputs = torch.randn(tokens, self.shape["hidden_size"], dtype=dtype)
        weight = torch.randn(self.shape["intermediate_size"], self.shape["hidden_size"], dtype=dtype)
        with torch.no_grad():
            return 2 * tokens * weight.numel() / min(timeit.repeat(lambda: F.linear(inputs, weight), number=1))

    def run(self, title: str, competitors: list[Competitor], dtype: torch.dtype, pairs: list, training: bool = False):
        """Times the competitors and holds each (ours, peer) of `pairs`; a list of peers stands for its fastest."""
        rates, load = {c.name: [] for c in competitors}, os.getloadavg()[0]
        # Freezing folds and packs the weights of what is compiled in here; training needs them as they are.
        with torch._inductor.config.patch(freezing=not training), torch.set_grad_enabled(training):
            for c in competitors * 2:  # the first calls compile and warm up
                c()
            gemm = self.gemm_rate(dtype)
            for turn in range(self.rounds):
                start = turn % len(competitors)
                for c in competitors[start:] + competitors[:start]:
                    rates[c.name].append(c.items / timeit.timeit(c, number=1))
                gemm = max(gemm, self.gemm_rate(dtype))
        torch._dynamo.reset()
        title = f"{title}, {str(dtype).removeprefix('torch.')}"
        print(f"\n{title}; matrix product {gemm / 1e9:,.1f} GFLOP/s; load before {load:.1f}")
        median = {name: statistics.median(values) for name, values in rates.items()}
        for c in competitors:
            achieved = median[c.name] / c.items * c.flops
            print(f"  {c.name:24} {_spread(rates[c.name])} per second, {achieved / gemm:.0%} of the matrix product")
            self.keep(f"{title}, GFLOP/s: {c.name}", achieved / 1e9, "matrix product", gemm / 1e9, [achieved / gemm])
        for ours, peers in pairs:
            peers = [name for name in ([peers] if isinstance(peers, str) else peers) if name in rates]
            if ours in rates and peers:
                peer = max(peers, key=lambda name: max(rates[name]))
                ratios = [a / b for a, b in zip(rates[ours], rates[peer], strict=True)]
                print(f"  {ours} / {peer}: {_spread(ratios)}")
                self.keep(f"{title}, per second: {ours}", median[ours], peer, median[peer], ratios)

    def keep(self, metric: str, value: float, peer: str, peer_value: float, ratios: list[float]):
        data = f"random weights and inputs, {self.rounds} rounds, ratio {min(ratios):.3f} to {max(ratios):.3f}"
        values = data, metric, f"{value:.4g}", peer, f"{peer_value:.4g}", f"{statistics.median(ratios):.3f}"
        self.rows.append(dict(zip(COLUMNS[-len(values) :], values, strict=True)))


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g}–{max(values):.4g})"


@torch.no_grad()
def embed(race: Race, modality: str = "image", compiled: bool = False):
    for dtype in race.dtypes:
        competitors = []
        for name, (model, embed_images, embed_texts) in available(ENCODERS, race.shape):
            model.to(dtype).eval()
            images = Competitor(name, embed_images, race.pixels(IMAGES, dtype), IMAGES)
            texts = Competitor(name, embed_texts, race.token_ids(TEXTS), TEXTS)
            competitors.append((images if modality == "image" else texts).counted())
        peers = [c.name for c in competitors if c.name != "MoME"]
        pairs = [("MoME", peer) for peer in peers]
        if compiled:
            pairs = [("MoME compiled", peers), ("MoME compiled", [f"{peer} compiled" for peer in peers])]
            competitors += race.compiled(competitors)
        race.run(f"{modality} embeddings{' with compiled models' * compiled}", competitors, dtype, pairs)


@torch.no_grad()
def caption(race: Race):
    length = {"min_new_tokens": CAPTION_TOKENS, "max_new_tokens": CAPTION_TOKENS, "do_sample": False}
    models = {name: model.to(BF16).eval() for name, model in available(CAPTIONERS, race.shape)}
    for batch in CAPTION_BATCHES:
        inputs = {"pixel_values": race.pixels(batch, BF16), **length}
        calls = {name: lambda inputs, model=model: model.generate(**inputs) for name, model in models.items()}
        competitors = [Competitor(name, call, inputs, batch).counted() for name, call in calls.items()]
        race.run(f"captions of {CAPTION_TOKENS} tokens, batch {batch}", competitors, BF16, [("MoME", "BLIP")])


def routed(race: Race):
    routing = {"experts_per_group": 4, "experts_per_token": 2}
    routing["expert_intermediate_size"] = race.shape["intermediate_size"] // 2
    pixels, token_ids = race.pixels(IMAGES, BF16), race.token_ids(IMAGES)
    batch = {"pixel_values": pixels, "input_ids": token_ids, "labels": token_ids}
    passes, steps = [], []
    for name, overrides in {"dense": {}, "routed": routing}.items():
        model, embed_images, _ = encoder(mome, race.shape, **overrides)
        model.to(BF16).eval()
        passes.append(Competitor(name, embed_images, pixels, IMAGES))
        captioner = mome_captioner(race.shape, **overrides).to(BF16).train()
        optimizer = torch.optim.AdamW(captioner.parameters(), lr=1e-5, fused=True)
        loss = Competitor(name, lambda batch, captioner=captioner: captioner(**batch).loss, batch, IMAGES)
        for one in [loss, *race.compiled([loss])]:
            steps.append(replace(one, run=functools.partial(_training_step, one.run, optimizer)))
    passes += race.compiled(passes)
    pairs = [("routed", "dense"), ("routed compiled", "dense compiled")]
    for title, competitors, training in ("routed, image pass", passes, False), ("routed, training step", steps, True):
        with torch.set_grad_enabled(training):
            flops = competitors[0].counted().flops  # the dense model's: the active parameters are the same
        race.run(title, [replace(c, flops=flops) for c in competitors], BF16, pairs, training)


def _training_step(loss: Callable, optimizer: torch.optim.Optimizer, batch: dict):
    loss(batch).backward()
    optimizer.step()
    optimizer.zero_grad()


SECTIONS = {"image": embed, "text": functools.partial(embed, modality="text")}
SECTIONS |= {"compiled": functools.partial(embed, compiled=True), "caption": caption, "routed": routed}


def main(argv: list[str] | None = None) -> list[dict]:
    parser = parser_of(__doc__, SECTIONS)
    parser.add_argument("--dtypes", default="bfloat16,float32", help="of the sections image, text and compiled")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled competitors")
    options, sections, common = begin(parser, "inference", argv)
    dtypes = tuple(getattr(torch, name) for name in options.dtypes.split(","))
    race = Race(QUICK if options.quick else BASE, options.rounds, not options.no_compile, dtypes)
    for section in sections:
        SECTIONS[section](race)
    if options.results:
        append_rows(options.results, [common | row for row in race.rows])
    return race.rows


if __name__ == "__main__":
    main()
