"""The road from an open_clip CoCa to a folder: its files, its config, then the steps of `driver.py`."""

import os
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from ..cards import CAPTIONS, COCA_SUMMARY, IMAGES, Card, facts_of, text_of
from ..configuration_coca import CocaConfig
from ..configuration_mome import shortened
from ..errors import ConversionError, first_line
from ..modeling_coca import CocaForConditionalGeneration
from . import coca
from .clip_tokenizer import HINT, TOKENIZER_FILES, load_clip_tokenizer
from .driver import assemble, check_kind, plan_of
from .hub import CheckpointFiles, checkpoint_files
from .operations import Conversion, Source
from .reading import open_checkpoint
from .saving import check_output, meta_model, save_model, whole_folder

WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
WEIGHT_FILES += ("model.safetensors", "pytorch_model.bin")
NOT_UPSTREAM = (
    "captions of several beams are not those of open_clip's own `generate()`, which searches in 3 groups and adds up "
    "logits that are not normalised; here, as is usual, log-probabilities are added up"
)


def convert_coca(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    config: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    with_tokenizer: bool = True,
    revision: str | None = None,
) -> Conversion:
    """Makes a folder that transformers loads of an open_clip CoCa.

    Args:
        checkpoint: file with the weights, safetensors or a pickle; a folder that open_clip pushes to the Hub, or the
            id of such a repository.
        output: folder to make; must not exist, and does only once all of it is written.
        config: `open_clip_config.json`; `None`: the one beside the weights. Without one, the numbers of heads are
            those of the published model of the same width.
        tokenizer: file, folder or id on the Hub; `None`: the one beside the weights.
        with_tokenizer: `False`: do without one. Texts are then the caller's to turn into ids.
        revision: of a repository on the Hub.

    Raises:
        ConversionError: anything that stops the conversion, in one line; nothing is left behind.
    """
    output = Path(output)
    check_output(output)
    files = _files(checkpoint, revision)
    said = config if config is not None else files.find(coca.CONFIG_FILE)
    upstream = None if said is None else coca.read_config(Path(said))
    found = None
    if with_tokenizer:  # before gigabytes of weights are fetched
        found = _tokenizer_of(files) if tokenizer is None else _tokenizer_of(_tokenizer_files(tokenizer))
    path = _weights(files, checkpoint)
    opened = open_checkpoint(path)
    check_kind("coca", opened)
    sizes = coca.measure(opened, upstream)
    loaded = None
    if found is not None:
        length, vocabulary = (sizes.config[name] for name in ("max_position_embeddings", "vocab_size"))
        loaded = load_clip_tokenizer(found, length, vocabulary)
    try:
        made = CocaConfig(**sizes.config, **_special_tokens(loaded, sizes.config["vocab_size"]))
    except ValueError as error:
        raise ConversionError(f"checkpoint {path} describes an impossible model: {first_line(error)}") from error
    expected = {key: each.shape for key, each in meta_model(CocaForConditionalGeneration, made).state_dict().items()}
    key_map, operations = coca.layout_of(opened)
    source = replace(SOURCE, key_map=key_map, operations=operations)
    plan, dropped = plan_of(source, sizes, opened, expected)
    state = assemble(plan, opened, sizes, expected)
    notes = [NOT_UPSTREAM, *_guesses(made, upstream, loaded)]
    done = Conversion(output, made, dropped, notes)
    with whole_folder(output) as folder:
        save_model(CocaForConditionalGeneration, made, state, folder)
        coca.build_processor(made, loaded, upstream).save_pretrained(folder)
        card = _card(done, str(files.name if path.parent != Path(files.name) else path.name), state, loaded)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return done


# ------------------------------------------------------------------------------------------------------- the files


def _files(checkpoint: str | os.PathLike, revision: str | None) -> CheckpointFiles:
    path = Path(checkpoint)
    if os.path.isfile(path):
        if revision is not None:
            raise ConversionError(
                f"--revision {shortened(revision)}: checkpoint {shortened(path)} is a file, which has no revisions"
            )
        return CheckpointFiles(path.parent)
    if not os.path.exists(path) and path.suffix in (".bin", ".pt", ".pth", ".safetensors"):
        raise ConversionError(
            f"checkpoint {shortened(path)} does not exist: pass the file with the weights, or OWNER/NAME"
        )
    return checkpoint_files(checkpoint, revision)


def _weights(files: CheckpointFiles, checkpoint: str | os.PathLike) -> Path:
    path = Path(checkpoint)
    if os.path.isfile(path):
        return path
    weights = files.weights(*WEIGHT_FILES)
    return weights[0]


def _tokenizer_files(tokenizer: str | os.PathLike) -> CheckpointFiles | Path:
    path = Path(tokenizer)
    if os.path.isfile(path) or path.suffix in (".json", ".gz", ".txt"):
        return path
    return checkpoint_files(tokenizer)


def _tokenizer_of(files: CheckpointFiles | Path) -> Path:
    """The tokenizer's file, with the merges beside it if it has none."""
    if isinstance(files, Path):
        return files
    path = files.find(*TOKENIZER_FILES)
    if path is None:
        raise ConversionError(
            f"no tokenizer in {shortened(files.name)}: pass --tokenizer FILE ({HINT}), --tokenizer "
            "openai/clip-vit-base-patch32, or --no-tokenizer"
        )
    if path.name == "vocab.json":
        files.need("merges.txt", hint="vocab.json needs it")
    return path


def _special_tokens(tokenizer: PreTrainedTokenizerFast | None, vocab_size: int) -> dict[str, int]:
    """The two ends of a text: CLIP's vocabulary has them at its end."""
    start, end = vocab_size - 2, vocab_size - 1
    if tokenizer is not None:
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}


def _guesses(config: CocaConfig, upstream: coca.UpstreamConfig | None, tokenizer) -> list[str]:
    notes = []
    if upstream is None:
        heads = "vision_num_attention_heads", "pooler_num_attention_heads", "text_num_attention_heads"
        named = ", ".join(f"{name} {getattr(config, name)}" for name in (*heads, "decoder_num_attention_heads"))
        notes += [f"without {coca.CONFIG_FILE}, numbers of heads are those of the published model: {named}"]
    if tokenizer is None and config.vocab_size != CocaConfig.vocab_size:
        notes += [
            f"without a tokenizer bos_token_id {config.bos_token_id} and eos_token_id {config.eos_token_id} are "
            "guesses: correct them in config.json"
        ]
    return notes


# -------------------------------------------------------------------------------------------------------- the card

SOURCE = Source(
    name="CoCa",
    key_map=coca.KEY_MAP,
    measure=coca.measure,
    operations=coca.OPERATIONS,
    paper="2205.01917",
    citation="""@article{coca,
  title   = {{CoCa}: Contrastive Captioners are Image-Text Foundation Models},
  author  = {Yu, Jiahui and Wang, Zirui and Vasudevan, Vijay and Yeung, Legg and Seyedhosseini, Mojtaba and
             Wu, Yonghui},
  journal = {Transactions on Machine Learning Research},
  year    = {2022}
}""",
    license="mit",
)
ENDING = """## Licence and citation

The weights are those of an [open_clip](https://github.com/mlfoundations/open_clip) CoCa, published under the MIT
License; the code beside them is MoME's, Apache-2.0.

```bibtex
{citation}
```"""


def _card(done: Conversion, origin: str, state: dict[str, torch.Tensor], tokenizer) -> str:
    parameters = sum(tensor.numel() for tensor in state.values())
    lines = [f"- {note[:1].upper()}{note[1:]}." for note in done.notes]
    summary = f"{COCA_SUMMARY} Converted from `{origin}`."
    card = Card(
        name="CoCa",
        path=str(done.output),
        task=IMAGES if tokenizer is None else CAPTIONS,
        summary=summary,
        facts=facts_of(done.config, parameters),
        sections={"Notes on the conversion": "\n".join(lines)},
        ending=ENDING.format(citation=SOURCE.citation),
        metadata={"license": SOURCE.license, "tags": ["coca"]},
    )
    return text_of(card)
