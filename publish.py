"""Publishes a checkpoint: one folder that works with `trust_remote_code=True` alone, pushed as one commit.

    python -m mome.publish CHECKPOINT --repo-id ORG/NAME [--private] [--dry-run]

The folder holds weights, config, generation config, tokenizer and processor, the flat code files, the files by which
sentence-transformers loads it, and a model card.
It is made anew by loading the checkpoint, so that what does not load is not published. Files of an earlier push that
would get in the way (other shards, code that is gone) are deleted in the same commit; all other files of the
repository stay. A push that is interrupted leaves the repository as it was, and a push of the same thing again changes
nothing.
"""

import argparse
import csv
import json
import shlex
import sys
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from .configuration_mome import MomeConfig
from .modeling_mome import MomeForConditionalGeneration, MomeModel
from .processing_mome import MomeProcessor

MODEL_CLASSES = {each.__name__: each for each in (MomeForConditionalGeneration, MomeModel)}
# What a push owns: such files of the repository that the new folder lacks are deleted.
OWNED = ["*_mome.py", "*.safetensors", "*.safetensors.index.json", "pytorch_model*", "preprocessor_config.json"]
IGNORED = [".*", "__pycache__/*"]
TAGS = ("mome", "custom_code", "image-captioning", "sentence-transformers")

CARD = """---
{metadata}
---

# {name}

A MoME model: one transformer for images and text whose feed-forward layers are experts of a modality, as in
[VLMo](https://arxiv.org/abs/2111.02358) and [BEiT-3](https://arxiv.org/abs/2208.10442). One checkpoint embeds images
and text in one space, captions images, classifies without labels and searches both ways.

## Use

The code is in this repository: `trust_remote_code=True` runs it. Read it, then pin the revision that you have read.

```python
{snippet}```

The pipelines `zero-shot-image-classification`, `image-feature-extraction`, `feature-extraction` and
`image-text-to-text` take it as well, and so does sentence-transformers, for lists of images and lists of texts:
`SentenceTransformer("{repo_id}", trust_remote_code=True).encode(["a cat", "a dog"])`.

## The model

| | |
|---|---|
{facts}

{evaluation}"""

CAPTION_SNIPPET = """from transformers import pipeline

caption = pipeline("image-captioning", model="{repo_id}", revision="{revision}", trust_remote_code=True)
print(caption("image.png"))  # [{{"generated_text": ..., "score": cosine of image and caption}}]

"""
EMBEDDING_SNIPPET = """from transformers import AutoModel, AutoProcessor

where = {{"revision": "{revision}", "trust_remote_code": True}}
processor = AutoProcessor.from_pretrained("{repo_id}", **where)
model = AutoModel.from_pretrained("{repo_id}", **where)
outputs = model(**processor(text=["a cat", "a dog"], images=["image.png"], return_tensors="pt"))
print(outputs.logits_per_image.softmax(dim=1), outputs.image_embeds.shape)
"""


def snippet_of(config: MomeConfig, repo_id: str, revision: str) -> str:
    """How to load what was published; embeddings alone have no captions."""
    captions = config.architectures == [MomeForConditionalGeneration.__name__]
    text = CAPTION_SNIPPET + EMBEDDING_SNIPPET if captions else EMBEDDING_SNIPPET
    return text.format(repo_id=repo_id, revision=revision)


def build_folder(
    checkpoint: Path, folder: Path, repo_id: str, license: str = "apache-2.0", results: Path | None = None
) -> Path:
    """Makes the folder to publish.

    Args:
        checkpoint: folder with weights, config, tokenizer and processor, as `save_pretrained` writes them.
        folder: where to; empty or new.
        repo_id: name on the Hub, for the model card.
        license: of the weights, by its identifier on the Hub.
        results: CSV with the columns of `evaluation/results.csv`: rows whose command names the checkpoint become the
            evaluation results of the card.

    Raises:
        ValueError, OSError: the checkpoint lacks something, does not load, or its parts do not fit.
    """
    config = _check_files(checkpoint)
    model = MODEL_CLASSES[config.architectures[0]].from_pretrained(checkpoint, dtype="auto")
    processor = MomeProcessor.from_pretrained(checkpoint)
    _check_fit(config, processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    card = _model_card(checkpoint, model, repo_id, license, _results_of(checkpoint, results))
    card.save(folder / "README.md")
    return folder


def publish(
    checkpoint: Path,
    repo_id: str,
    private: bool = False,
    license: str = "apache-2.0",
    results: Path | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Builds the folder and pushes it as one commit.

    Args:
        checkpoint, repo_id, license, results: see `build_folder`.
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
        folder = build_folder(checkpoint, Path(temporary), repo_id, license, results)
        api.create_repo(repo_id, private=private, exist_ok=True)
        info = api.model_info(repo_id)
        if private and not info.private:
            raise ValueError(f"{repo_id} exists and is public: make it private first, or publish without --private")
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Publish the checkpoint with its code",
            parent_commit=info.sha,  # a push from elsewhere in the meantime is refused, not mixed with this one
            delete_patterns=OWNED,
            ignore_patterns=IGNORED,
        )


# ------------------------------------------------------------------------------------------------- the checkpoint


def _check_files(checkpoint: Path) -> MomeConfig:
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint}: no such folder")
    if (checkpoint / "adapter_config.json").exists():
        raise ValueError(f"{checkpoint} is an adapter: merge it into its model first (PEFT: merge_and_unload)")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        if not (checkpoint / name).exists():
            raise FileNotFoundError(f"{checkpoint} has no {name}: save the model and its processor there first")
    model_type = json.loads((checkpoint / "config.json").read_text()).get("model_type")
    if model_type != MomeConfig.model_type:
        raise ValueError(f"{checkpoint} holds a model of type {model_type!r}: only {MomeConfig.model_type!r} fits")
    config = MomeConfig.from_pretrained(checkpoint)
    if (config.architectures or [None])[0] not in MODEL_CLASSES:
        raise ValueError(f"architectures={config.architectures} of {checkpoint}: expected {', '.join(MODEL_CLASSES)}")
    return config


def _check_fit(config: MomeConfig, processor: MomeProcessor):
    tokenizer, size = processor.tokenizer, processor.image_processor.size
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, vocab_size is {config.vocab_size}")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(tokenizer, name) != getattr(config, name):
            raise ValueError(
                f"{name} is {getattr(tokenizer, name)} in the tokenizer, {getattr(config, name)} in the config"
            )
    crop = getattr(processor.image_processor, "crop_size", None)
    size = crop if getattr(processor.image_processor, "do_center_crop", False) and crop else size
    sides = (size.get("height"), size.get("width")) if hasattr(size, "get") else (size.height, size.width)
    if sides != (config.image_size, config.image_size):
        raise ValueError(f"the processor makes images of {sides[0]}×{sides[1]}, image_size is {config.image_size}")


def _results_of(checkpoint: Path, results: Path | None) -> list[dict]:
    """Rows of the results file whose command was run with this checkpoint; the last of each metric and data set."""
    if results is None:
        return []
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    resolved = checkpoint.resolve()
    own = [row for row in rows if any(Path(word).resolve() == resolved for word in shlex.split(row["command"])[1:])]
    return list({(row["metric"], row["data"]): row for row in own}.values())


# ----------------------------------------------------------------------------------------------------------- card


def _model_card(checkpoint: Path, model, repo_id: str, license: str, results: list[dict]) -> ModelCard:
    """The checkpoint's own README with our metadata added, or a new one."""
    name = repo_id.split("/")[-1]
    written = checkpoint / "README.md"
    card = ModelCard.load(written) if written.exists() else None
    given = {} if card is None else card.data.to_dict()
    given.pop("model-index", None)  # in another form, `eval_results`
    evaluations = {} if card is None else {(e.dataset_name, e.metric_name): e for e in card.data.eval_results or []}
    evaluations |= {(e.dataset_name, e.metric_name): e for e in map(_evaluation, results)}
    data = ModelCardData(
        **{
            "language": "en",
            "license": license,
            "library_name": "transformers",
            "pipeline_tag": "image-to-text",
            "model_name": name,
            **given,
            "tags": sorted(
                {*(given.get("tags") or []), "mome", "custom_code", "image-captioning", "sentence-transformers"}
            ),
        },
        eval_results=list(evaluations.values()) or None,
    )
    if card is not None:
        card.data = data
        return card
    return ModelCard(
        CARD.format(
            metadata=data.to_yaml(),
            name=name,
            snippet=snippet_of(model.config, repo_id, "main"),
            repo_id=repo_id,
            facts="\n".join(f"| {fact} | {value} |" for fact, value in _facts(model).items()),
            evaluation=_evaluation_table(results),
        )
    )


def _evaluation(row: dict) -> EvalResult:
    slug = "-".join("".join(c if c.isalnum() else " " for c in row["data"]).split()).lower()
    try:
        value = float(row["value"])
    except ValueError:
        value = row["value"]
    return EvalResult(
        task_type="image-to-text",
        dataset_type=slug,
        dataset_name=row["data"],
        metric_type=row["metric"].split(":")[0].strip(),
        metric_name=row["metric"],
        metric_value=value,
    )


def _evaluation_table(results: list[dict]) -> str:
    if not results:
        return ""
    lines = [f"| {row['data']} | {row['metric']} | {row['value']} |" for row in results]
    return "\n".join(["## Evaluation", "", "| data | metric | value |", "|---|---|---|", *lines, ""])


def _facts(model) -> dict[str, str]:
    config = model.config
    experts = "one each, hard routing"
    if config.experts_per_group > 1:
        experts = f"{config.experts_per_token} of {config.experts_per_group}, learned routing"
    facts = {
        "parameters": f"{model.num_parameters():,}",
        "layers × width × heads": f"{config.num_hidden_layers} × {config.hidden_size} × {config.num_attention_heads}",
        "images": f"{config.image_size} × {config.image_size} pixels, {config.num_image_tokens} tokens",
        "text": f"up to {config.max_position_embeddings} tokens, vocabulary of {config.vocab_size:,}",
        "experts of a modality": experts,
        "embeddings": f"{config.projection_dim} dimensions",
    }
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        own = {key: value for key, value in generation.to_diff_dict().items() if key in GENERATION_FACTS}
        if own:
            facts["captions by default"] = ", ".join(f"{key}={value}" for key, value in own.items())
    return facts


GENERATION_FACTS = (
    "num_beams do_sample max_new_tokens guidance_scale contrastive_weight contrastive_top_k rerank_weight "
    "rerank_candidates rerank_scale"
).split()


# -------------------------------------------------------------------------------------------------------- command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder with weights, config, tokenizer and processor")
    parser.add_argument("--repo-id", required=True, metavar="ORG/NAME")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--license", default="apache-2.0", help="of the weights (default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="CSV", help="evaluation results for the card")
    parser.add_argument("--dry-run", action="store_true", help="show what would be pushed, send nothing")
    options = parser.parse_args(argv)
    settings = {"license": options.license, "results": options.results}
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
        print(f"{type(error).__name__}: {' '.join(lines)}", file=sys.stderr)
        return 1
    print(f"published {commit.repo_url} at {commit.oid}\n")
    print(snippet_of(MomeConfig.from_pretrained(options.checkpoint), options.repo_id, commit.oid))
    return 0


def _show(folder: Path):
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:>14,}  {path.name}")
    print("\n" + (folder / "README.md").read_text())


if __name__ == "__main__":
    sys.exit(main())
