"""Model cards: one writer for what training, conversion and publishing put into `README.md`.

    Card ─ text_of ─ README.md ─ updated ─ the same card with other code, more tags, more figures

- the code block loads the folder or the Hub repository that the card lies in, and runs as it stands;
- the pipeline tag is a task that `transformers.pipeline` knows and that the checkpoint can do;
- figures stand in the metadata (`model-index`) and in the table, from one list.

Code, facts and figures are enclosed by comments (`<!-- use -->` and so on), by which `updated` finds them; whatever
somebody wrote outside of these stays.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

CAPTIONS, EMBEDDINGS, IMAGES = "image-text-to-text", "zero-shot-image-classification", "image-feature-extraction"
Task = Literal["image-text-to-text", "zero-shot-image-classification", "image-feature-extraction"]
TASKS: tuple[Task, ...] = (CAPTIONS, EMBEDDINGS, IMAGES)
SUMMARY = (
    "A MoME model: one transformer for images and text whose feed-forward layers are experts of a modality, as in "
    "[VLMo](https://arxiv.org/abs/2111.02358) and [BEiT-3](https://arxiv.org/abs/2208.10442)."
)
COCA_SUMMARY = (
    "A contrastive captioner, CoCa ([2205.01917](https://arxiv.org/abs/2205.01917)) as open_clip builds it: it embeds "
    "images and texts in one space, and captions images."
)
SUMMARIES = {"mome": SUMMARY, "coca": COCA_SUMMARY}  # by `model_type`
NOT_ASSESSED = "Not assessed beyond the figures above. The model knows what its training data shows."

# Metric of `mome.evaluation` → heading of the figures' table, whose values are shares; others are listed below it.
HEADINGS = {
    "text_to_image_r1": "R@1 text → image",
    "text_to_image_r10": "R@10",
    "image_to_text_r1": "R@1 image → text",
    "image_to_text_r10": "R@10",
    "zero_shot_top1": "zero-shot",
    "caption_f1": "caption F1",
}
GENERATION_FACTS = (
    "num_beams do_sample max_new_tokens guidance_scale contrastive_weight contrastive_top_k rerank_weight "
    "rerank_candidates rerank_scale"
).split()


@dataclass(frozen=True)
class Figure:
    """One measured value.

    Attributes:
        data: what it was measured on, such as `unseen concepts`.
        metric: such as `text_to_image_r1`.
        value: a number; text where a results file has text.
    """

    data: str
    metric: str
    value: float | str


@dataclass(frozen=True)
class Card:
    """What a card tells.

    Attributes:
        name: of the model.
        path: the folder or Hub id that the code block loads.
        task: what the checkpoint can do at most, one of `TASKS`: captions, embeddings of images and texts, or
            embeddings of images alone (no tokenizer).
        revision: of a Hub id.
        summary: the first paragraph.
        facts: rows of the table about the model, see `facts_of`.
        sections: heading → Markdown, between the facts and the figures.
        figures: what was measured.
        figures_note: which data that was.
        limitations: what the model can't do; empty: no such section.
        ending: Markdown at the end, such as licence and citation.
        metadata: of the front matter: `license`, `language`, `tags`, `base_model`, `datasets`, ...
    """

    name: str
    path: str
    task: Task
    revision: str | None = None
    summary: str = SUMMARY
    facts: Mapping[str, str] = field(default_factory=dict)
    sections: Mapping[str, str] = field(default_factory=dict)
    figures: Sequence[Figure] = ()
    figures_note: str = ""
    limitations: str = ""
    ending: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


def text_of(card: Card) -> str:
    """The card as Markdown with its front matter."""
    parts = [f"# {card.name}", card.summary, "## Use", _enclosed("use", usage(card.path, card.task, card.revision))]
    if card.facts:
        parts += ["## The model", _enclosed("facts", _table(("", ""), card.facts.items()))]
    for heading, text in card.sections.items():
        parts += [f"## {heading}", text]
    if card.figures:
        parts += ["## Figures", *([card.figures_note] if card.figures_note else [])]
        parts += [_enclosed("figures", figures_table(card.figures))]
    if card.limitations:
        parts += ["## Limitations", card.limitations]
    parts += [card.ending] if card.ending else []
    data = _metadata(card.name, card.task, card.metadata, card.figures)
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part.strip() for part in parts) + "\n"


def updated(
    text: str,
    path: str | None = None,
    task: Task | None = None,
    revision: str | None = None,
    facts: Mapping[str, str] | None = None,
    figures: Iterable[Figure] = (),
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """A card with other code, facts and figures; everything else that it says stays.

    Args:
        text: the card. One that was not written here keeps its text; its metadata is completed.
        path, revision: what the code loads from now on; `None`: the code stays as it is.
        task: what the checkpoint can do, unless the card's own tag says so.
        facts: replace those of the same name.
        figures: replace those of the same data and metric.
        metadata: what the front matter gets if it has no such entry; tags are added.
    """
    card = ModelCard(text, ignore_metadata_errors=True)
    given = card.data.to_dict()
    measured = {(each.data, each.metric): each for each in (*_figures_of(card.data), *figures)}
    given.pop("pipeline_tag", None)
    task = task_of(text, task or EMBEDDINGS)
    merged = {**(metadata or {}), **given}
    merged["tags"] = [*(given.get("tags") or []), *((metadata or {}).get("tags") or [])]
    body, heading = card.text, re.search(r"^# (.+)$", card.text, flags=re.MULTILINE)
    name = card.data.model_name or (heading[1] if heading else (path or "model").rsplit("/", 1)[-1])
    merged.pop("model_name", None)
    if path is not None:
        body = replaced(body, "use", usage(path, task, revision))
    if facts:
        rows = re.findall(r"^\| (.+?) \| (.+) \|$", _between(body, "facts"), flags=re.MULTILINE)
        body = replaced(body, "facts", _table(("", ""), (dict(rows) | dict(facts)).items()))
    if measured:
        body = replaced(body, "figures", figures_table(list(measured.values())))
    data = _metadata(name, task, merged, list(measured.values()))
    return f"---\n{data.to_yaml()}\n---\n{body}"


def task_of(text: str, default: Task) -> Task:
    """What a card's pipeline tag says that the checkpoint can do; the default if transformers has no such pipeline."""
    tag = ModelCard(text, ignore_metadata_errors=True).data.pipeline_tag
    return tag if tag in TASKS else default


# ------------------------------------------------------------------------------------------------------------- code


def snippet(path: str, task: Task, revision: str | None = None) -> str:
    """Python that loads a checkpoint and uses it on `image.png`.

    Args:
        path: folder or Hub id.
        task: what the checkpoint can do.
        revision: of a Hub id.
    """
    pinned = f'revision="{revision}", ' if revision else ""
    loading = "AutoModel, AutoProcessor" + ("" if task == IMAGES else ", pipeline")
    lines = [
        f"from transformers import {loading}",
        "",
        f'path = "{path}"',
        f"options = dict({pinned}trust_remote_code=True)",
        "processor = AutoProcessor.from_pretrained(path, **options)",
        "model = AutoModel.from_pretrained(path, **options)",
    ]
    if task == IMAGES:
        lines += ['print(model(**processor(images=["image.png"], return_tensors="pt")).image_embeds)']
        return "\n".join(lines) + "\n"
    lines += [
        'outputs = model(**processor(text=["a cat", "a dog"], images=["image.png"], return_tensors="pt"))',
        "print(outputs.logits_per_image.softmax(dim=1), outputs.image_embeds.shape)",
        "",
        # Not transformers' own task, which drops the transparency of images.
        'classify = pipeline("open-vocabulary-image-classification", model=path, **options)',
        'print(classify("image.png", candidate_labels=["a cat", "a dog"]))',
    ]
    if task == CAPTIONS:
        lines += [
            'caption = pipeline("image-captioning", model=path, **options)',
            'print(caption("image.png"))  # [{"generated_text": ..., "score": cosine of image and caption}]',
        ]
    return "\n".join(lines) + "\n"


def usage(path: str, task: Task, revision: str | None = None) -> str:
    """The code block with what one should know before running it."""
    where = "this repository" if revision else "the folder"
    trust = f"`trust_remote_code=True` runs the code in {where}"
    trust += (
        "; read it, then pin the commit that you have read." if revision else "; with MoME installed, leave it out."
    )
    parts = [trust, f"```python\n{snippet(path, task, revision)}```"]
    if task != IMAGES:
        others = ["image-feature-extraction", "feature-extraction", *([CAPTIONS] if task == CAPTIONS else [])]
        names = ", ".join(f"`{name}`" for name in others[:-1]) + f" and `{others[-1]}`"
        parts += [
            f"The pipelines {names} work as well, and so does sentence-transformers, for lists of images and of "
            f'texts: `SentenceTransformer("{path}", trust_remote_code=True).encode(["a cat", "a dog"])`.'
        ]
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------------------------ figures and facts


def figures_table(figures: Sequence[Figure]) -> str:
    """Markdown: a row for each data set under `HEADINGS`, and below it a row for each figure that has no heading.

    The number of images stands beside the name of the data.
    """
    values = {(each.data, each.metric): each.value for each in figures}
    wide = list(dict.fromkeys(each.data for each in figures if each.metric in HEADINGS))
    columns = [metric for metric in HEADINGS if any((data, metric) in values for data in wide)]
    rows = []
    for data in wide:
        images = values.get((data, "images"))
        label = data if images is None else f"{data}, {float(images):,.0f} images"
        rows.append([label, *(_share(values.get((data, metric))) for metric in columns)])
    others = [
        (each.data, each.metric, _number(each.value))
        for each in figures
        if each.metric not in HEADINGS and not (each.metric == "images" and each.data in wide)
    ]
    tables = [_table(("", *(HEADINGS[metric] for metric in columns)), rows)] if rows else []
    tables += [_table(("data", "metric", "value"), others)] if others else []
    return "\n\n".join(tables)


def facts_of(config: PreTrainedConfig, parameters: int, generation_config: Any = None) -> dict[str, str]:
    """What the table about the model says: fact → value."""
    facts = {"parameters": f"{parameters:,}"}
    facts |= _facts_of_coca(config) if config.model_type == "coca" else _facts_of_mome(config)
    facts["embeddings"] = f"{config.projection_dim} dimensions"
    changed = {} if generation_config is None else generation_config.to_diff_dict()
    if own := {key: value for key, value in changed.items() if key in GENERATION_FACTS}:
        facts["captions by default"] = ", ".join(f"{key}={value}" for key, value in own.items())
    return facts


def _facts_of_mome(config: PreTrainedConfig) -> dict[str, str]:
    experts = "one each, hard routing"
    if config.experts_per_group > 1:
        experts = f"{config.experts_per_token} of {config.experts_per_group}, learned routing"
    return {
        "layers × width × heads": f"{config.num_hidden_layers} × {config.hidden_size} × {config.num_attention_heads}",
        "images": f"{config.image_size} × {config.image_size} pixels, {config.num_image_tokens} tokens",
        "text": f"up to {config.max_position_embeddings} tokens, vocabulary of {config.vocab_size:,}",
        "experts of a modality": experts,
    }


def _facts_of_coca(config: PreTrainedConfig) -> dict[str, str]:
    stacks = {"image encoder": "vision", "text encoder": "text", "caption decoder": "decoder"}
    widths = {"vision": config.vision_hidden_size, "text": config.hidden_size, "decoder": config.hidden_size}
    facts = {}
    for name, stack in stacks.items():
        layers, heads = (getattr(config, f"{stack}_num_{part}") for part in ("hidden_layers", "attention_heads"))
        facts[f"{name}, layers × width × heads"] = f"{layers} × {widths[stack]} × {heads}"
    image = f"{config.image_size} × {config.image_size} pixels, patches of {config.patch_size} × {config.patch_size}"
    text = f"up to {config.max_position_embeddings} tokens, vocabulary of {config.vocab_size:,}"
    return facts | {"images": f"{image}, {config.pooler_num_queries} tokens once pooled", "text": text}


def _share(value: float | str | None) -> str:
    return "–" if value is None else f"{100 * float(value):.1f} %"


def _number(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# --------------------------------------------------------------------------------------------------------- metadata


def _metadata(name: str, task: Task, given: Mapping[str, Any], figures: Sequence[Figure]) -> ModelCardData:
    given = {key: value for key, value in given.items() if value is not None and key != "model-index"}
    tags = {*(given.pop("tags", None) or []), "mome", "custom_code"}
    tags |= set() if task == IMAGES else {EMBEDDINGS, "sentence-transformers"}
    tags |= {"image-captioning"} if task == CAPTIONS else set()
    return ModelCardData(
        **{"library_name": "transformers", "pipeline_tag": task, "model_name": name, **given},
        tags=sorted(tags),
        eval_results=[_evaluation(figure, task) for figure in figures] or None,
    )


def _evaluation(figure: Figure, task: Task) -> EvalResult:
    value = figure.value
    return EvalResult(
        task_type=task,
        dataset_type="-".join("".join(c if c.isalnum() else " " for c in figure.data).split()).lower(),
        dataset_name=figure.data,
        metric_type=figure.metric.split(":")[0].strip(),
        metric_name=figure.metric,
        metric_value=round(value, 6) if isinstance(value, float) else value,
    )


def _figures_of(data: ModelCardData) -> list[Figure]:
    results = getattr(data, "eval_results", None) or []
    return [Figure(each.dataset_name, each.metric_name or each.metric_type, each.metric_value) for each in results]


def _enclosed(name: str, text: str) -> str:
    return f"<!-- {name} -->\n{text}\n<!-- /{name} -->"


def _between(body: str, name: str) -> str:
    return body.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]


def replaced(body: str, name: str, text: str) -> str:
    """The body with another text between the comments `<!-- name -->` and `<!-- /name -->`, if it has them."""
    pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
    return re.sub(pattern, lambda _: _enclosed(name, text), body, flags=re.DOTALL)
