"""The one road from an upstream file to a MoME folder.

    sizes from the shapes ─ config ─ model on the meta device: the keys and shapes that must come out
    keys ─ KEY_MAP ─ plan: target ← keys and operation; unmapped, unused and missing keys stop here
    plan ─ tensor by tensor, checked ─ (upcycling) ─ strict load ─ save beside the output ─ rename

Tensors stay mapped to the file where they go over as they are, so that the memory in use stays near the file's size.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ..configuration_mome import MomeConfig, listed, quoted
from ..errors import ConversionError, first_line
from ..modeling_mome import MomeForConditionalGeneration
from . import beit3, coca, siglip, vlmo
from .card import model_card
from .operations import CAVEATS, STAND_INS, Conversion, Loaded, Options, Request, Sizes, Source, pattern_of
from .processors import build_processor, find_tokenizer, load_tokenizer, special_token_ids
from .reading import Checkpoint, open_checkpoint
from .saving import check_output, meta_model, save_model, whole_folder
from .upcycling import routed_config, upcycle

SOURCES: dict[str, Source] = {"beit3": beit3.SOURCE, "vlmo": vlmo.SOURCE, "siglip": siglip.SOURCE}
# A key that every file of a project has, to name what a file of another one is.
SIGNATURES = {
    "beit3": "beit3.vision_embed.proj.weight",
    "vlmo": "transformer.patch_embed.proj.weight",
    "siglip": siglip.PROBE,
    "coca": coca.SIGNATURE,
}
NAMES = {kind: source.name for kind, source in SOURCES.items()} | {"coca": "CoCa"}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGE = 2**26  # bytes from which on a progress bar is worth its lines


def convert(
    kind: str,
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    tokenizer: str | os.PathLike | None = None,
    with_tokenizer: bool = True,
    options: Options | None = None,
    experts_per_group: int | None = None,
    experts_per_token: int = 2,
    revision: str | None = None,
) -> Conversion:
    """Makes a MoME folder of an upstream checkpoint.

    Args:
        kind: `beit3`, `vlmo` or `siglip`.
        checkpoint: file with the upstream weights, safetensors or a pickle; of SigLIP a folder or a Hub id.
        output: folder to make; must not exist, and does only once all of it is written.
        tokenizer: file or folder; `None`: what lies beside the checkpoint under its published name.
        with_tokenizer: `False`: do without one. Texts are then the caller's to turn into ids.
        options: what the shapes do not tell.
        experts_per_group: make a routed checkpoint with so many copies of every expert.
        experts_per_token: how many of them a token uses.
        revision: of a checkpoint on the Hub: branch, tag or commit.

    Raises:
        ConversionError: anything that stops the conversion, in one line; nothing is left behind.
    """
    if kind not in SOURCES:
        raise ConversionError(f"unknown kind {quoted(kind)}: choose one of {', '.join(SOURCES)}")
    source, output = SOURCES[kind], Path(output)
    check_output(output)
    tokenizer = None if tokenizer is None else Path(tokenizer)
    request = Request(checkpoint, options or Options(), tokenizer, with_tokenizer, revision)
    loaded = source.load(request) if source.load else _load_file(kind, request)
    opened, sizes, path = loaded.checkpoint, loaded.sizes, loaded.checkpoint.path
    config = _config(loaded)
    final = routed_config(config, experts_per_group, experts_per_token) if experts_per_group is not None else config
    expected = _expected(config)
    plan, dropped = plan_of(source, sizes, opened, expected)
    state = assemble(plan, opened, sizes, expected)
    if final is not config:
        state = upcycle(state, final)
    notes = [CAVEATS[head] for head in sizes.absent] + [*sizes.notes, *_on_vocabulary(source, config, with_tokenizer)]
    done = Conversion(output, final, dropped, notes)
    with whole_folder(output) as folder:
        save_model(MomeForConditionalGeneration, final, state, folder)
        loaded.processor.save_pretrained(folder)
        parameters = sum(tensor.numel() for tensor in state.values())
        card = model_card(source, sizes, done, path, parameters, with_tokenizer)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return done


def _on_vocabulary(source: Source, config: MomeConfig, with_tokenizer: bool) -> list[str]:
    """A remark on special tokens that are guessed, or are not those of the published vocabulary."""
    published = source.special_tokens
    if config.vocab_size == source.vocab_size:
        others = ", ".join(f"{name} {index}" for name, index in published.items() if getattr(config, name) != index)
        return [f"the tokenizer is not that of the published {source.name}, which has {others}"] if others else []
    if with_tokenizer or not published:  # a source whose config.json has them leaves nothing to guess
        return []
    guesses = ", ".join(f"{name} {getattr(config, name)}" for name in published)
    return [f"without a tokenizer {guesses} are guesses: correct them in config.json"]


# Before any heavy work.


def check_kind(kind: str, checkpoint: Checkpoint):
    """Raises ConversionError if the checkpoint is of another kind, with the name of that if it is known."""
    if SIGNATURES[kind] in checkpoint:
        return
    other = next((name for name, key in SIGNATURES.items() if key in checkpoint), None)
    found = f"is a {NAMES[other]} checkpoint: convert it with `{other}`" if other else "is of another kind"
    if other is None and checkpoint.shapes:
        found += f": its first key is {next(iter(checkpoint.shapes))}"
    raise ConversionError(f"checkpoint {checkpoint.path} has no {SIGNATURES[kind]}, it {found}")


def _load_file(kind: str, request: Request) -> Loaded:
    """A file with the weights, and its processor, which have to agree on lengths and special tokens."""
    source, path, tokenizer = SOURCES[kind], Path(request.checkpoint), None
    opened = open_checkpoint(path)
    check_kind(kind, opened)
    sizes = source.measure(opened, request.options)
    if request.with_tokenizer:
        length = sizes.text_length or sizes.config["max_position_embeddings"]
        tokenizer = load_tokenizer(request.tokenizer or find_tokenizer(source, path), length)
    ids = special_token_ids(tokenizer, source, sizes.config["vocab_size"])
    return Loaded(opened, sizes, ids, build_processor(tokenizer, sizes))


def _config(loaded: Loaded) -> MomeConfig:
    try:
        return MomeConfig(**loaded.sizes.config, **loaded.ids)
    except ValueError as error:
        raise ConversionError(
            f"checkpoint {loaded.checkpoint.path} describes an impossible model: {first_line(error)}"
        ) from error


def _expected(config: MomeConfig) -> dict[str, torch.Size]:
    shapes = {
        key: tensor.shape for key, tensor in meta_model(MomeForConditionalGeneration, config).state_dict().items()
    }
    if config.tie_word_embeddings:
        del shapes["lm_head.decoder.weight"]
    return shapes


# From upstream keys to ours.


@dataclass
class Step:
    """One target tensor: the keys that it is made of, and how."""

    keys: list[str]
    operation: Callable | None


def plan_of(
    source: Source, sizes: Sizes, checkpoint: Checkpoint, expected: dict[str, torch.Size]
) -> tuple[dict[str, Step | Callable], list[str]]:
    """Target → how to make it, and what is dropped.

    Raises:
        ConversionError: a key without a mapping, without a place in the model, or missing.
    """
    plan: dict[str, Step | Callable] = {}
    dropped, left = [], dict.fromkeys(checkpoint.shapes)
    for key, targets in source.key_map.items():
        targets = (targets,) if isinstance(targets, str) else targets
        pattern = pattern_of(key)
        for match in [match for match in map(pattern.fullmatch, left) if match]:
            del left[match[0]]
            if targets is None or key in sizes.dropped:
                dropped.append(match[0])
                continue
            for target in targets:
                name = target.format(*match.groups())
                if name not in expected:
                    raise ConversionError(
                        f"checkpoint {checkpoint.path}: {match[0]} has no place in a model with the other keys' sizes"
                    )
                plan.setdefault(name, Step([], source.operations.get(target))).keys.append(match[0])
    if left:
        names = listed(left, 3)
        raise ConversionError(f"checkpoint {checkpoint.path} has keys that {source.name} does not have: {names}")
    plan |= {target: fill for head in sizes.absent for target, fill in STAND_INS[head].items()} | sizes.stand_ins
    _check_complete(source, checkpoint, plan, expected)
    return plan, dropped


def _check_complete(source: Source, checkpoint: Checkpoint, plan: dict, expected: dict[str, torch.Size]):
    wanted: dict[str, list[str]] = {}
    for key, targets in source.key_map.items():
        for target in (targets,) if isinstance(targets, str) else targets or ():
            wanted.setdefault(target, []).append(key)
    for target, keys in wanted.items():
        pattern = pattern_of(target)
        for match in filter(None, map(pattern.fullmatch, expected)):
            step = plan.get(match[0])
            if isinstance(step, Step) or step is None:
                needed = Counter(key.format(*match.groups()) for key in keys)
                if missing := list(needed - Counter(step.keys if step else ())):
                    raise ConversionError(f"checkpoint {checkpoint.path} has no {missing[0]}: it is incomplete")


def assemble(
    plan: dict[str, Step | Callable], checkpoint: Checkpoint, sizes: Sizes, expected: dict[str, torch.Size]
) -> dict[str, torch.Tensor]:
    """The state dict, checked tensor by tensor."""
    steps = {target: step for target, step in plan.items() if isinstance(step, Step)}
    dtype = _common_dtype(checkpoint, steps)
    state: dict[str, torch.Tensor] = {}
    small = checkpoint.bytes < LARGE
    total = sum(checkpoint.tensor(key).nbytes for step in steps.values() for key in step.keys)
    with tqdm(total=total, desc="converting", unit="B", unit_scale=True, disable=small) as bar:
        for target, step in steps.items():
            tensors = [checkpoint.tensor(key) for key in step.keys]
            for key, tensor in zip(step.keys, tensors):
                _check_values(checkpoint, key, tensor)
            try:
                tensor = step.operation(tensors, sizes) if step.operation else tensors[0]
            except (RuntimeError, IndexError) as error:
                raise ConversionError(_misshapen(checkpoint, step, target, expected)) from error
            if tensor.shape != expected[target]:
                raise ConversionError(_misshapen(checkpoint, step, target, expected))
            state[target] = tensor.to(dtype).contiguous()
            bar.update(sum(tensor.nbytes for tensor in tensors))
    for target, fill in plan.items():
        if not isinstance(fill, Step):
            state[target] = fill(state, sizes).to(dtype)
    return state


def _common_dtype(checkpoint: Checkpoint, steps: dict[str, Step]) -> torch.dtype:
    """The dtype of the output: that of most of the checkpoint, so that it is not larger than the checkpoint."""
    bytes_of: Counter[torch.dtype] = Counter()
    for tensor in (checkpoint.tensor(key) for step in steps.values() for key in step.keys):
        if tensor.dtype not in DTYPES:
            raise ConversionError(
                f"checkpoint {checkpoint.path} has weights of type {tensor.dtype}, expected 16-bit floats or wider"
            )
        bytes_of[tensor.dtype] += tensor.nbytes
    return bytes_of.most_common(1)[0][0]


def _check_values(checkpoint: Checkpoint, key: str, tensor: torch.Tensor):
    if not tensor.numel():
        return
    low, high = tensor.aminmax()  # not isfinite(), which would write down as much again
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ConversionError(f"checkpoint {checkpoint.path}: {key} contains NaN or infinity, the file is damaged")


def _misshapen(checkpoint: Checkpoint, step: Step, target: str, expected: dict[str, torch.Size]) -> str:
    shapes = {key: tuple(checkpoint.shapes[key]) for key in step.keys}
    usual, _ = Counter(shapes.values()).most_common(1)[0]
    odd = [key for key, shape in shapes.items() if shape != usual] or list(shapes)  # one of query, key and value, say
    named = ", ".join(f"{key} of shape {shapes[key]}" for key in odd)
    return f"checkpoint {checkpoint.path}: {named} does not fit {target} of shape {tuple(expected[target])}"
