"""Publishes a checkpoint: one folder that works with `trust_remote_code=True` alone, pushed as one commit.

    python -m mome.publish CHECKPOINT --repo-id ORG/NAME [--onnx DIR] [--private] [--dry-run]

The folder holds weights, config, generation config, tokenizer and processor, the flat code files, the files by which
sentence-transformers loads it, a model card with its images and, if there is an export, its ONNX files.
It is made anew by loading the checkpoint, so that what does not load is not published. Files of an earlier push that
would get in the way (other shards, code that is gone) are deleted in the same commit; all other files of the
repository stay. A push that is interrupted leaves the repository as it was, and a push of the same thing again changes
nothing.
"""

import argparse
import csv
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig, PreTrainedModel

from .cards import CAPTIONS, EMBEDDINGS, SUMMARIES, Card, Figure, Task, facts_of, snippet, task_of, text_of, updated
from .configuration_mome import quoted, shortened
from .embedder import model_fingerprint
from .families import FAMILIES, FAMILY_NAMES
from .onnx_embedder import fingerprint_of, open_session
from .processing_mome import MomeProcessor

MODEL_CLASSES = {each.__name__: each for family in FAMILIES.values() for each in (family.captioner, family.model)}
# What a push owns: such files of the repository that the new folder lacks are deleted.
OWNED = [
    "*_mome.py",
    "*_coca.py",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*",
    "preprocessor_config.json",
    "onnx/*",
]
IGNORED = [".*", "__pycache__/*"]
# A commit can't name itself: the card loads this branch, the command prints the commit to pin.
REVISION = "main"


def build_folder(
    checkpoint: Path,
    folder: Path,
    repo_id: str,
    license: str = "apache-2.0",
    results: Path | None = None,
    onnx: Path | None = None,
) -> Path:
    """Makes the folder to publish.

    Args:
        checkpoint: folder with weights, config, tokenizer and processor, as `save_pretrained` writes them.
        folder: where to; empty or new.
        repo_id: name on the Hub, for the model card.
        license: of the weights, by its identifier on the Hub.
        results: CSV with the columns of `evaluation/results.csv`: rows whose command names the checkpoint become the
            evaluation results of the card.
        onnx: export of this checkpoint, as `mome.export` writes it.

    Raises:
        ValueError, OSError: the checkpoint lacks something, does not load, or its parts do not fit; the export is
            damaged or of other weights.
    """
    config = _check_files(checkpoint)
    model = MODEL_CLASSES[config.architectures[0]].from_pretrained(checkpoint, dtype="auto")
    processor = MomeProcessor.from_pretrained(checkpoint)
    _check_fit(config, processor)
    if onnx is not None:
        _copy_export(onnx, model, folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    card = _model_card(checkpoint, model, repo_id, license, results)
    (folder / "README.md").write_text(card, encoding="utf-8")
    for name in set(re.findall(r"!\[[^\]]*\]\(([\w.-]+)\)", card)):  # images beside the card
        if (checkpoint / name).is_file():
            shutil.copy(checkpoint / name, folder)
    return folder


def publish(
    checkpoint: Path,
    repo_id: str,
    private: bool = False,
    license: str = "apache-2.0",
    results: Path | None = None,
    token: str | None = None,
    onnx: Path | None = None,
) -> CommitInfo:
    """Builds the folder and pushes it as one commit.

    Args:
        checkpoint, repo_id, license, results, onnx: see `build_folder`.
        private: create the repository as a private one; an existing one must be private already.
        token: default: the one that is logged in.

    Returns:
        The commit; `oid` is the revision to pin.

    Raises:
        HfHubHTTPError: no such user, no right to write; ConnectionError, httpx.TransportError: no network.
        ValueError, OSError: see `build_folder`; a public repository where a private one was asked for.
    """
    validate_repo_id(repo_id)
    api = HfApi(token=token)
    api.whoami()  # before the heavy work
    with tempfile.TemporaryDirectory() as temporary:
        folder = build_folder(checkpoint, Path(temporary), repo_id, license, results, onnx)
        api.create_repo(repo_id, private=private, exist_ok=True)
        info = api.model_info(repo_id)
        if private and not info.private:
            raise ValueError(
                f"{shortened(repo_id)} exists and is public: make it private first, or publish without --private"
            )
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Publish the checkpoint with its code",
            parent_commit=info.sha,  # a push from elsewhere in the meantime is refused, not mixed with this one
            delete_patterns=OWNED,
            ignore_patterns=IGNORED,
        )


# ------------------------------------------------------------------------------------------------- the checkpoint


def _check_files(checkpoint: Path) -> PreTrainedConfig:
    if not os.path.isdir(checkpoint):
        raise FileNotFoundError(f"{shortened(checkpoint)}: no such folder")
    if (checkpoint / "adapter_config.json").exists():
        raise ValueError(
            f"{shortened(checkpoint)} is an adapter: merge it into its model first (PEFT: merge_and_unload)"
        )
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        if not (checkpoint / name).exists():
            raise FileNotFoundError(
                f"{shortened(checkpoint)} has no {name}: save the model and its processor there first"
            )
    model_type = json.loads((checkpoint / "config.json").read_text()).get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"{shortened(checkpoint)} holds a model of type {quoted(model_type)}: only {FAMILY_NAMES} fits"
        )
    family = FAMILIES[model_type]
    config, names = family.config.from_pretrained(checkpoint), [family.captioner.__name__, family.model.__name__]
    if (config.architectures or [None])[0] not in names:
        raise ValueError(
            f"architectures={quoted(config.architectures)} of {shortened(checkpoint)}: expected {', '.join(names)}"
        )
    return config


def _check_fit(config: PreTrainedConfig, processor: MomeProcessor):
    tokenizer, size = processor.tokenizer, processor.image_processor.size
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, vocab_size is {config.vocab_size}")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        own, given = getattr(tokenizer, name), getattr(config, name)
        if own not in given if isinstance(given, (list, tuple)) else own != given:  # several may end a caption
            raise ValueError(f"{name} is {own} in the tokenizer, {quoted(given)} in the config")
    crop = getattr(processor.image_processor, "crop_size", None)
    size = crop if getattr(processor.image_processor, "do_center_crop", False) and crop else size
    sides = (size.get("height"), size.get("width")) if hasattr(size, "get") else (size.height, size.width)
    if sides != (config.image_size, config.image_size):
        raise ValueError(f"the processor makes images of {sides[0]}×{sides[1]}, image_size is {config.image_size}")


def _copy_export(onnx: Path, model: PreTrainedModel, folder: Path):
    """Copies the ONNX files and the image processor's second config; each file must be whole and of this model."""
    files = sorted((onnx / "onnx").glob("*.onnx"))
    if not files or not os.path.isfile(onnx / "preprocessor_config.json"):
        raise FileNotFoundError(f"{shortened(onnx)} holds no export: make one with python -m mome.export")
    fingerprint = model_fingerprint(model)
    for path in files:
        if fingerprint_of(open_session(path)) != fingerprint:
            raise ValueError(f"{shortened(path)} was made of other weights: export this checkpoint again")
    shutil.copytree(onnx / "onnx", folder / "onnx")
    shutil.copyfile(onnx / "preprocessor_config.json", folder / "preprocessor_config.json")


def _results_of(checkpoint: Path, results: Path | None) -> list[Figure]:
    """Figures of the results file whose command was run with this checkpoint; the last of each metric and data set."""
    if results is None:
        return []
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    resolved = checkpoint.resolve()
    own = [row for row in rows if any(Path(word).resolve() == resolved for word in shlex.split(row["command"])[1:])]
    latest = {(row["metric"], row["data"]): row["value"] for row in own}
    return [Figure(data, metric, _as_number(value)) for (metric, data), value in latest.items()]


def _as_number(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


# ----------------------------------------------------------------------------------------------------------- card


def _task(checkpoint: Path) -> Task:
    """What its card says that a checkpoint can do; without a card, a model of embeddings alone has no captions."""
    architectures = json.loads((checkpoint / "config.json").read_text())["architectures"]
    captioners = [family.captioner.__name__ for family in FAMILIES.values()]
    default = CAPTIONS if architectures[0] in captioners else EMBEDDINGS
    written = checkpoint / "README.md"
    return task_of(written.read_text(encoding="utf-8"), default) if written.exists() else default


def _model_card(checkpoint: Path, model: PreTrainedModel, repo_id: str, license: str, results: Path | None) -> str:
    """The checkpoint's own card, loading from the Hub and with our metadata added, or a new one."""
    figures, written = _results_of(checkpoint, results), checkpoint / "README.md"
    metadata, task = {"license": license, "language": "en"}, _task(checkpoint)
    if written.exists():
        text = written.read_text(encoding="utf-8")
        return updated(text, repo_id, task, REVISION, figures=figures, metadata=metadata)
    name = repo_id.split("/")[-1]
    facts = facts_of(model.config, model.num_parameters(), getattr(model, "generation_config", None))
    summary = SUMMARIES[type(model.config).model_type]
    return text_of(Card(name, repo_id, task, REVISION, summary, facts=facts, figures=figures, metadata=metadata))


# -------------------------------------------------------------------------------------------------------- command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder with weights, config, tokenizer and processor")
    parser.add_argument("--repo-id", required=True, metavar="ORG/NAME")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--license", default="apache-2.0", help="of the weights (default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="CSV", help="evaluation results for the card")
    parser.add_argument("--onnx", type=Path, metavar="DIR", help="its export (python -m mome.export), pushed with it")
    parser.add_argument("--dry-run", action="store_true", help="show what would be pushed, send nothing")
    options = parser.parse_args(argv)
    settings = {"license": options.license, "results": options.results, "onnx": options.onnx}
    try:
        if options.dry_run:
            validate_repo_id(options.repo_id)
            with tempfile.TemporaryDirectory() as temporary:
                _show(build_folder(options.checkpoint, Path(temporary), options.repo_id, **settings))
            print(f"nothing was sent; without --dry-run this would be one commit to {options.repo_id}")
            return 0
        commit = publish(options.checkpoint, options.repo_id, options.private, **settings)
    except Exception as error:
        # Anything else is a mistake of ours, and shows its traceback.
        if not isinstance(error, (OSError, ValueError)) and not type(error).__module__.startswith("httpx"):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(f"{type(error).__name__}: {shortened(' '.join(lines), 500)}", file=sys.stderr)
        return 1
    print(f"published {commit.repo_url} at {commit.oid}\n")
    print(snippet(options.repo_id, _task(options.checkpoint), commit.oid))
    return 0


def _show(folder: Path):
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:>14,}  {path.relative_to(folder).as_posix()}")
    print("\n" + (folder / "README.md").read_text())


if __name__ == "__main__":
    sys.exit(main())
