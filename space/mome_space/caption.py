"""The caption tab: pictures → captions by beam search alone beside guided ones, with their scores."""

from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from . import markup
from .engine import Engine
from .limits import (
    CANDIDATES,
    CAPTION_REQUESTS,
    PICTURES,
    TEXT_CHARACTERS,
    checked_number,
    checked_text,
    refuse,
)
from .uploads import read_pictures
from .zero_gpu import on_gpu

GUIDED = "Captions by beam search alone beside guided ones. Guidance steers towards captions that fit their picture."
GREEDY = "A caption of each picture: the likeliest word each time."
EMPTY = "Drop one picture or several: each gets captions to use as alt text."


class Range(NamedTuple):
    """What a slider offers."""

    lowest: float
    highest: float
    default: float
    step: float
    label: str
    info: str


SLIDERS = {
    "candidates": Range(1, CANDIDATES, 3, 1, "Captions", "For each picture."),
    "rerank_weight": Range(
        0, 1, 0.5, 0.05, "Re-ranking λ", "Weighs fit against fluency in the order of captions; 0 is off."
    ),
    "guidance_scale": Range(
        1, 4, 1.0, 0.1, "Classifier-free γ", "Amplifies what the picture adds to each word; 1 is off."
    ),
    "contrastive_weight": Range(
        0, 4, 0.0, 0.1, "Contrastive β", "Prefers words that bring caption and picture closer; 0 is off."
    ),
}

Captions = list[tuple[str, float]]


class Captioning:
    """What the tab and its API endpoint do."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.generate = on_gpu(engine.caption)

    def caption(
        self, uploads: Any, prompt: Any, candidates: Any, **guidance: Any
    ) -> list[tuple[str, Image.Image, Captions, Captions | None]]:
        """Per picture its name, the picture, unguided captions and guided ones, `None` if all guidance is off."""
        prompt = checked_text(prompt, "The beginning")
        candidates = int(checked_number(candidates, "The number of candidates", 1, CANDIDATES))
        for name, value in guidance.items():
            checked_number(value, name.replace("_", " "), SLIDERS[name].lowest, SLIDERS[name].highest)
        if guidance["guidance_scale"] != 1 and not self.engine.captions_without_picture:
            raise refuse("This model writes no caption without a picture, so that classifier-free γ must be 1.")
        if prompt:
            self.engine.check_words(prompt, "The beginning")
            self.engine.check_length(prompt, "The beginning")
        named = read_pictures(uploads, self.engine.rgb)
        pictures = [self.engine.rgb(picture) for _, picture in named]
        plain = self.generate(pictures, prompt, candidates)
        guided = [None] * len(pictures)
        if self.engine.guides and (
            guidance["rerank_weight"] or guidance["contrastive_weight"] or guidance["guidance_scale"] != 1
        ):
            guided = self.generate(pictures, prompt, candidates, **guidance)
        return [(name, *each) for (name, _), *each in zip(named, pictures, plain, guided)]

    def show(self, uploads, prompt, candidates, rerank_weight, guidance_scale, contrastive_weight) -> str:
        captioned = self.caption(
            uploads,
            prompt,
            candidates,
            rerank_weight=rerank_weight,
            guidance_scale=guidance_scale,
            contrastive_weight=contrastive_weight,
        )
        note = '<p class="mome-status" role="status">Scores are cosines of picture and caption, -1 to 1.</p>'
        return f'<div class="mome">{note}{"".join(self._captioned(*each) for each in captioned)}</div>'

    def captions(
        self,
        images: list[dict],
        prompt: str,
        candidates: int,
        rerank_weight: float,
        guidance_scale: float,
        contrastive_weight: float,
    ) -> list[dict]:
        """Captions of images with their cosines: unguided, and guided unless all guidance is off."""
        captioned = self.caption(
            images,
            prompt,
            candidates,
            rerank_weight=rerank_weight,
            guidance_scale=guidance_scale,
            contrastive_weight=contrastive_weight,
        )
        return [
            {"image": name, "unguided": _as_dicts(plain), "guided": None if guided is None else _as_dicts(guided)}
            for name, _, plain, guided in captioned
        ]

    @staticmethod
    def _captioned(name: str, picture: Image.Image, plain: Captions, guided: Captions | None) -> str:
        best = (guided or plain)[0][0]
        lists = _caption_list("Unguided", plain)
        lists += _caption_list("Guided", guided) if guided is not None else ""
        return (
            f'<section class="mome-captioned" aria-label="Captions of {markup.escape(name)}"><span class="mome-tile">'
            f'<img src="{markup.thumbnail(picture)}" alt="{markup.escape(best)}"></span>{lists}</section>'
        )


def _as_dicts(captions: Captions) -> list[dict[str, Any]]:
    return [{"text": text, "score": round(score, 4)} for text, score in captions]


def _caption_list(title: str, captions: Captions) -> str:
    rows = "".join(
        f'<li><span class="mome-text">{markup.escape(text) or "<em>(empty)</em>"}</span>'
        f'<span class="mome-score" title="cosine of picture and caption">{score:.2f}</span>'
        f"{markup.copy_button(text, announce=f'Copy the caption {text}')}</li>"
        for text, score in captions
    )
    return f'<div class="mome-captions"><h3>{title}</h3><ol aria-label="{title} captions">{rows}</ol></div>'


def caption_tab(engine: Engine, examples: list[Path]):
    """The tab's components and events; to be called within `gr.Blocks`."""
    captioning = Captioning(engine)
    gr.Markdown(GUIDED if engine.guides else GREEDY, elem_classes="mome-note")
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            pictures = gr.Gallery(
                label=f"Pictures (up to {PICTURES})",
                type="filepath",
                sources=["upload", "clipboard"],
                buttons=[],
                columns=4,
                height=220,
                object_fit="contain",
                allow_preview=False,
                interactive=True,
                elem_id="caption-pictures",
            )
            button = gr.Button("Caption", variant="primary", elem_id="caption-button")
            with gr.Accordion("Settings", open=False, elem_id="caption-settings"):
                settings = _settings(engine)
            tried = gr.Examples(
                [[[str(examples[0])]], [[str(each) for each in examples[1:4]]]],
                [pictures],
                label="Try one or three pictures",
                elem_id="caption-try",
            )
        with gr.Column(scale=2, min_width=320):
            results = markup.output("caption-results", EMPTY)
    options = {
        "inputs": [pictures, *settings],
        "outputs": results,
        "preprocess": False,
        "api_visibility": "private",
        "concurrency_id": "caption",
        "concurrency_limit": CAPTION_REQUESTS,
    }
    button.click(captioning.show, **options)
    tried.load_input_event.then(captioning.show, **options)
    with gr.Row(visible=False):
        files = gr.File(file_count="multiple", label="images")
        gr.Button().click(
            captioning.captions,
            [files, *_settings(engine, hidden=True)],
            gr.JSON(label="captions"),
            preprocess=False,
            api_name="caption",
            concurrency_id="caption",
            concurrency_limit=CAPTION_REQUESTS,
        )


def _settings(engine: Engine, hidden: bool = False) -> list[gr.components.Component]:
    """Prompt, candidates and the three kinds of guidance, for the page, or hidden for the API."""
    prompt = gr.Textbox(
        "",
        label="Beginning of the caption",
        info="Captions go on from here; may stay empty.",
        max_length=TEXT_CHARACTERS,
        elem_id=None if hidden else "caption-prompt",
    )
    sliders = [
        gr.Slider(
            each.lowest,
            each.highest,
            each.default,
            step=each.step,
            label=each.label,
            info=each.info,
            visible=engine.guides and (name != "guidance_scale" or engine.captions_without_picture),
            elem_id=None if hidden else f"caption-{name}",
        )
        for name, each in SLIDERS.items()
    ]
    return [prompt, *sliders]
