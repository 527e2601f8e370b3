"""Captions side by side: MoME, open_clip's CoCa and transformers' BLIP, and what guidance costs.

    python -m mome.benchmarks.captioning --threads 2 --rounds 5 --results evaluation/results.csv

- `greedy`: 20 tokens, one image and eight at a time, against BLIP and CoCa;
- `beams`: the same with 4 beams against CoCa;
- `guided`: re-ranking of 4 candidates against the 4 beams that they come from; classifier-free and contrastive
  guidance against greedy captions without it.

Random weights, one dtype, exactly 20 new tokens for everyone; the image encoder is a ViT-B (12 × 768, patch 32 unless
`--patch-size` says otherwise) at 224 px in all three. MoME and BLIP decode with 12 × 768, CoCa with the narrower text
layers that it was published with (12 + 12 × 512). Its vocabulary of 49,408 is everyone's. Turns, medians and ratios
are those of `mome.benchmarks.inference`.
"""

import functools
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest import mock

import torch
import transformers
from torch import nn

from ..evaluation.results import append_rows
from .command import begin, parser_of
from .inference import (
    BASE,
    CAPTION_BATCHES,
    CAPTION_TOKENS,
    QUICK,
    Competitor,
    Race,
    available,
    blip,
    mome_captioner,
)

BEAMS = 4
VOCABULARY = 49408
# CoCa's published text layers (open_clip `coca_ViT-B-32`), and some for a try.
COCA_TEXT = {"context_length": 76, "vocab_size": VOCABULARY, "width": 512, "heads": 8, "layers": 12}
QUICK_TEXT = {"context_length": 76, "vocab_size": QUICK["vocab_size"], "width": 32, "heads": 2, "layers": 2}


class BeamBookkeeping:
    """What CoCa's beam search wants of transformers' `BeamSearchScorer`, which transformers 5 has no more.

    For captions of a set length, none of which ends before: the best continuations go on, the best one is the result.
    It does less than the original, so CoCa is not slower for it.
    """

    is_done = False

    def __init__(self, batch_size: int, num_beams: int, device: torch.device, num_beam_groups: int = 1, **kwargs):
        self.num_beams, self.num_beam_groups = num_beams, num_beam_groups
        self._beam_hyps = [None] * batch_size * num_beam_groups

    def process(
        self, input_ids: torch.Tensor, scores: torch.Tensor, tokens: torch.Tensor, indices: torch.Tensor, **kwargs
    ) -> dict[str, torch.Tensor]:
        """(batch, 2 · beams) candidates, best first → (batch · beams,) scores, tokens and rows that go on."""
        beams = scores.shape[1] // 2
        first = torch.arange(scores.shape[0], device=scores.device)[:, None] * beams
        chosen = scores[:, :beams], tokens[:, :beams], first + indices[:, :beams]
        names = "next_beam_scores", "next_beam_tokens", "next_beam_indices"
        return {name: each.reshape(-1) for name, each in zip(names, chosen)}

    def finalize(self, input_ids: torch.Tensor, *args, **kwargs) -> dict[str, torch.Tensor]:
        return {"sequences": input_ids[:: self.num_beams]}


class StandIn(type):
    """A class whose attributes are their names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("_"):
            raise AttributeError(name)
        return name


def import_coca() -> tuple[type[nn.Module], type[nn.Module]]:
    """open_clip's CoCa and its loss. At import it wants torchvision, for image transforms that no caption needs."""
    names = "torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.ops"
    stand_ins = {name: ModuleType(name) for name in (*names, "torchvision.ops.misc")}
    for name, module in stand_ins.items():
        module.__spec__ = ModuleSpec(name, None)
        module.__getattr__ = lambda missing: StandIn(missing, (nn.Module,), {})
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(stand_ins[parent], child, module)
    transformers.BeamSearchScorer = BeamBookkeeping
    with mock.patch.dict(sys.modules, stand_ins):
        from open_clip.coca_model import CoCa
        from open_clip.loss import CoCaLoss

        ours = {name: module for name, module in sys.modules.items() if name.startswith("open_clip")}
    sys.modules.update(ours)  # compilation looks its modules up
    return CoCa, CoCaLoss


def coca(shape: dict, text: dict) -> nn.Module:
    vision = {"image_size": shape["image_size"], "patch_size": shape["patch_size"], "width": shape["hidden_size"]}
    vision |= {
        "layers": shape["num_hidden_layers"],
        "head_width": shape["hidden_size"] // shape["num_attention_heads"],
    }
    vision |= {"attentional_pool": True, "attn_pooler_heads": text["heads"], "output_tokens": True}
    decoder = {**text, "attn_pooler_heads": text["heads"]}
    encoder = {**text, "embed_cls": True, "output_tokens": True}
    return import_coca()[0](text["width"], decoder, encoder, vision)


def coca_call(model: nn.Module, beams: int):
    """Exactly 20 tokens behind the start token: the end token is forbidden until then."""
    tokens = {"sot_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_beams": beams, "num_beam_groups": 1}
    lengths = {"seq_len": CAPTION_TOKENS + 1, "min_seq_len": CAPTION_TOKENS}
    return lambda inputs: model.generate(inputs["pixel_values"], **tokens, **lengths)


def generate_call(model: nn.Module, **options):
    lengths = {"min_new_tokens": CAPTION_TOKENS, "max_new_tokens": CAPTION_TOKENS, "do_sample": False}
    return lambda inputs: model.generate(**inputs, **lengths, **options)


def race_each_batch(race: Race, title: str, calls: dict, pairs: list[tuple[str, str]]):
    for batch in CAPTION_BATCHES:
        (dtype,) = race.dtypes
        inputs = {"pixel_values": race.pixels(batch, dtype)}
        competitors = [Competitor(name, call, inputs, batch).counted() for name, call in calls.items()]
        race.run(f"{title} of {CAPTION_TOKENS} tokens, batch {batch}", competitors, dtype, pairs)


@torch.no_grad()
def greedy(race: Race, models: dict):
    calls = {name: generate_call(model) for name, model in models.items() if name != "CoCa"}
    if "CoCa" in models:
        calls["CoCa"] = coca_call(models["CoCa"], beams=1)
    race_each_batch(race, "greedy captions", calls, [("MoME", "BLIP"), ("MoME", "CoCa")])


@torch.no_grad()
def beams(race: Race, models: dict):
    calls = {"MoME": generate_call(models["MoME"], num_beams=BEAMS)}
    if "CoCa" in models:
        calls["CoCa"] = coca_call(models["CoCa"], beams=BEAMS)
    race_each_batch(race, f"captions with {BEAMS} beams", calls, [("MoME", "CoCa")])


@torch.no_grad()
def guided(race: Race, models: dict):
    call = functools.partial(generate_call, models["MoME"])
    calls = {
        "unguided": call(),
        "classifier-free": call(guidance_scale=2.0),
        "contrastive": call(contrastive_weight=2.0),
        f"beam {BEAMS}": call(num_beams=BEAMS),
        "re-ranked": call(num_beams=BEAMS, rerank_weight=0.5, rerank_candidates=BEAMS),
    }
    pairs = [("re-ranked", f"beam {BEAMS}"), ("classifier-free", "unguided"), ("contrastive", "unguided")]
    race_each_batch(race, "guided captions", calls, pairs)


SECTIONS = {"greedy": greedy, "beams": beams, "guided": guided}


def main(argv: list[str] | None = None) -> list[dict]:
    parser = parser_of(__doc__, SECTIONS)
    parser.add_argument("--patch-size", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", help="float32 where the processor has no bfloat16 products")
    options, sections, common = begin(parser, "captioning", argv)
    shape, text = (QUICK, QUICK_TEXT) if options.quick else (BASE | {"vocab_size": VOCABULARY}, COCA_TEXT)
    shape = shape if options.quick else shape | {"patch_size": options.patch_size}
    builders = {"MoME": mome_captioner, "BLIP": blip, "CoCa": functools.partial(coca, text=text)}
    dtype = getattr(torch, options.dtype)
    models = {name: model.to(dtype).eval() for name, model in available(builders, shape)}
    race = Race(shape, options.rounds, compile_models=False, dtypes=(dtype,))
    for section in sections:
        written = len(race.rows)
        SECTIONS[section](race, models)
        if options.results:  # section by section: CoCa's captions take minutes, and a run may be stopped
            append_rows(options.results, [common | row for row in race.rows[written:]])
    return race.rows


if __name__ == "__main__":
    main()
