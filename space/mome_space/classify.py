"""The classification tab: a picture and any labels → how well each label fits."""

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from .engine import Engine
from .limits import LABEL_TEXTS, LABELS, QUICK_REQUESTS, TEMPLATES, checked_lines, quoted, refuse
from .style import picture_input
from .uploads import read_picture
from .zero_gpu import on_gpu

SHOWN = 10  # labels in the chart, best first
EXAMPLE_LABELS = "circus tent\ntypewriter\neye\nheadphones\nhospital\ncamera tripod"
EXAMPLE_TEMPLATES = "{}\na picture of a {}"


class Classification:
    """What the tab and its API endpoint do."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.probabilities = on_gpu(engine.classify)

    def classify(self, image: dict | None, labels: str, templates: str) -> list[dict]:
        """The probability of each label, best first; labels and templates stand one a line."""
        names = checked_lines(labels, "Labels", LABELS)
        if len(names) < 2:
            raise refuse("Give at least two labels to choose from, one a line.")
        wording = checked_lines(templates, "Templates", TEMPLATES) or ["{}"]
        for template in wording:
            if "{}" not in template:
                raise refuse(f"The template {quoted(template)} has no {{}} where the label goes.")
        if len(names) * len(wording) > LABEL_TEXTS:
            raise refuse(
                f"{len(names)} labels in {len(wording)} templates are too many texts: at most {LABEL_TEXTS} are read."
            )
        for name in names:
            self.engine.check_words(name, "The label")
        for template in wording:
            longest = max(names, key=lambda name: self.engine.count_tokens(template.replace("{}", name)))
            self.engine.check_length(template.replace("{}", longest), "The text")
        self._warn_of_equal(names)
        picture = read_picture(image, self.engine.rgb)
        scored = zip(names, self.probabilities(picture, names, wording).tolist())
        return [{"label": name, "score": score} for name, score in sorted(scored, key=lambda pair: -pair[1])]

    def _warn_of_equal(self, names: list[str]):
        groups: dict[tuple[int, ...], list[str]] = {}
        for name in names:
            groups.setdefault(self.engine.token_ids(name), []).append(quoted(name))
        equal = next((group for group in groups.values() if len(group) > 1), None)
        if equal:
            gr.Warning(escape(f"{' and '.join(equal)} are one label to the model: they share their probability."))

    def show(self, image: Any, labels: Any, templates: Any) -> dict[str, float]:
        """As `gr.Label` takes it."""
        return {each["label"]: each["score"] for each in self.classify(image, labels, templates)}


def classify_tab(engine: Engine, examples: list[Path]):
    """The tab's components and events; to be called within `gr.Blocks`."""
    classification = Classification(engine)
    gr.Markdown(
        "Choose among labels of your own, without training: the label whose text lies nearest to the picture wins.",
        elem_classes="mome-note",
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            picture = picture_input("Picture", "The picture that is classified", "classify-picture")
            labels = gr.Textbox(
                EXAMPLE_LABELS,
                label="Labels",
                info=f"One a line, at most {LABELS}.",
                lines=6,
                max_lines=12,
                elem_id="classify-labels",
            )
            with gr.Accordion("Prompt templates", open=False, elem_id="classify-settings"):
                templates = gr.Textbox(
                    EXAMPLE_TEMPLATES,
                    label="Templates",
                    info="One a line; {} is where the label goes. The mean over the templates decides.",
                    lines=2,
                    max_lines=TEMPLATES,
                    elem_id="classify-templates",
                )
            button = gr.Button("Classify", variant="primary", elem_id="classify-button")
            tried = gr.Examples(
                [[str(each)] for each in examples], [picture], label="Try a picture", elem_id="classify-try"
            )
        with gr.Column(scale=2, min_width=320):
            chart = gr.Label(label="How well each label fits", num_top_classes=SHOWN, elem_id="classify-results")
    options = {
        "inputs": [picture, labels, templates],
        "preprocess": False,
        "concurrency_id": "quick",
        "concurrency_limit": QUICK_REQUESTS,
    }
    for trigger in (button.click, tried.load_input_event.then):
        trigger(classification.show, outputs=chart, api_visibility="private", **options)
    with gr.Row(visible=False):
        result = gr.JSON(label="labels")
        gr.Button().click(classification.classify, outputs=result, api_name="classify", **options)
