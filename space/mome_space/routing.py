"""The routing tab: which expert took which patch and which token, layer by layer, and how busy the experts are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from . import markup
from .engine import Engine, RoutedTokens
from .explained import explain, patch_kinds
from .gallery import Index
from .limits import QUICK_REQUESTS, SESSION_SECONDS, TEXT_CHARACTERS, checked_number, checked_text
from .style import expert_colour, picture_input
from .uploads import read_picture
from .zero_gpu import on_gpu

EMPTY = "Choose a picture to see which expert takes which of its patches."
LEARNED = (
    "Every layer holds several feed-forward experts for picture patches and several others for words, and a learned "
    "router sends each patch and each word to the {k} it fits best. Move the slider to see who takes what in each "
    "layer, and how evenly the work is shared. Nobody told the experts what to look for."
)
HARD = (
    "This checkpoint has one feed-forward expert for picture patches and one for words in every layer, so that the "
    "modality alone decides. With several experts per modality a learned router chooses, and the colours differ."
)
PICTURE_SIDE = 320


@dataclass
class Routed:
    """A picture, its caption and where their tokens went: what the slider moves through.

    Attributes:
        picture: as a data URI.
        caption: the visitor's, or the model's.
        kinds: of the patches, see `patch_kinds`.
        image: experts of `[CLS]` and the patches.
        text: experts of the caption's tokens.
    """

    picture: str
    caption: str
    kinds: np.ndarray
    image: RoutedTokens
    text: RoutedTokens


class Routing:
    """What the tab and its API endpoint do.

    Args:
        engine: who routes.
        index: whose embeddings know how the whole gallery was routed.
    """

    def __init__(self, engine: Engine, index: Index):
        self.engine, self.index = engine, index
        self.route, self.generate = on_gpu(engine.route), on_gpu(engine.caption)
        self.grid = engine.config.grid_size

    def routed(self, upload: Any, caption: Any) -> Routed:
        caption = checked_text(caption, "The caption", required=not self.engine.captions)
        if caption:
            self.engine.check_words(caption, "The caption")
            self.engine.check_length(caption, "The caption")
        picture = self.engine.rgb(read_picture(upload, self.engine.rgb))
        caption = caption or self.generate([picture], candidates=1)[0][0][0]
        shown = markup.thumbnail(picture, (PICTURE_SIDE, PICTURE_SIDE))  # squeezed to a square, as the model sees it
        return Routed(shown, caption, patch_kinds(picture, self.grid), *self.route(picture, caption))

    # What the page calls.

    def show(self, upload, caption, layer) -> tuple[Routed, str]:
        routed = self.routed(upload, caption)
        return routed, self.render(routed, layer)

    def open(self, routed: Routed | None, upload, caption, layer) -> tuple:
        """When the tab is opened: what stands there by default, unless something has been shown already."""
        return (gr.skip(), gr.skip()) if routed is not None or upload is None else self.show(upload, caption, layer)

    def show_layer(self, routed: Routed | None, layer) -> str:
        return markup.nothing(EMPTY) if routed is None else self.render(routed, layer)

    # What programs call.

    def routing(self, image: dict | None, caption: str) -> dict:
        """Experts and weights of every patch and token, [layer][token][choice], and each expert's share per layer."""
        routed = self.routed(image, caption)
        groups = {
            each.group: {
                "tokens": each.tokens,
                "experts": each.experts.tolist(),
                "weights": each.weights.round(4).tolist(),
                "shares": each.shares(self.engine.experts).round(4).tolist(),
            }
            for each in (routed.image, routed.text)
        }
        return {"caption": routed.caption, "experts_per_group": self.engine.experts, **groups}

    # What the page shows.

    def render(self, routed: Routed, layer: Any) -> str:
        last = len(routed.image.experts)
        layer = int(checked_number(layer, "The layer", 1, last)) - 1
        embeddings = self.index.embeddings
        averages = (None, None) if embeddings is None else (embeddings.image_shares, embeddings.text_shares)
        balance = "".join(
            self._balance(group, layer, average) for group, average in zip((routed.image, routed.text), averages)
        )
        return (
            f'<div class="mome"><p class="mome-status" role="status">Layer {layer + 1} of {last}</p>'
            f"{self._explained(routed, layer)}"
            f'<div class="mome-routing">{self._patches(routed, layer)}'
            f'<div class="mome-experts"><h3>Caption</h3>{self._tokens(routed.text, layer)}'
            f"<h3>Balance in this layer</h3>{balance}"
            f"<h3>All layers</h3>{self._layers(routed, layer)}</div></div></div>"
        )

    def _explained(self, routed: Routed, layer: int) -> str:
        if self.engine.experts == 1:
            return ""
        sentences = explain(routed.image, routed.text, routed.kinds, layer, self._name)
        return f'<p class="mome-explained">{"<br>".join(map(markup.escape, sentences))}</p>'

    def _colour(self, group: str, expert: int) -> str:
        return expert_colour(expert + (self.engine.experts if group == "text" else 0))

    def _name(self, group: str, expert: int) -> str:
        return group if self.engine.experts == 1 else f"{group} {expert + 1}"

    def _choice(self, tokens: RoutedTokens, layer: int, token: int) -> str:
        """ "image 2 (0.71), image 4 (0.29)" """
        pairs = zip(tokens.experts[layer, token].tolist(), tokens.weights[layer, token].tolist())
        return ", ".join(f"{self._name(tokens.group, expert)} ({weight:.2f})" for expert, weight in pairs)

    def _patches(self, routed: Routed, layer: int) -> str:
        """The picture under a grid of patches; a patch has the colour and the number of its likeliest expert."""
        tokens, cells = routed.image, []
        for patch in range(self.grid**2):
            token = patch - self.grid**2  # the last ones, behind [CLS] if there is one
            expert = int(tokens.experts[layer, token, 0])
            row, column = divmod(patch, self.grid)
            number = "" if self.engine.experts == 1 else expert + 1
            cells.append(
                f"<g><title>{markup.escape(f'{tokens.tokens[token]}: {self._choice(tokens, layer, token)}')}</title>"
                f'<rect x="{column}" y="{row}" width="1" height="1" fill="{self._colour("image", expert)}" '
                f'fill-opacity="0.5" stroke="#fff" stroke-width="0.02"/>'
                f'<text x="{column + 0.06}" y="{row + 0.2}" font-size="0.18" fill="#111">{number}</text></g>'
            )
        counts = np.bincount(tokens.experts[layer, -(self.grid**2) :, 0], minlength=self.engine.experts)
        told = ", ".join(f"{count} to {self._name('image', expert)}" for expert, count in enumerate(counts) if count)
        return (
            f'<div class="mome-patches" role="img" aria-label="Layer {layer + 1}: of {self.grid**2} patches {told}">'
            f'<img src="{routed.picture}" alt=""><svg viewBox="0 0 {self.grid} {self.grid}" aria-hidden="true">'
            f"{''.join(cells)}</svg></div>"
        )

    def _tokens(self, tokens: RoutedTokens, layer: int) -> str:
        chips = []
        for token, word in enumerate(tokens.tokens):
            expert, choice = int(tokens.experts[layer, token, 0]), self._choice(tokens, layer, token)
            number = "" if self.engine.experts == 1 else f"<small>{expert + 1}</small>"
            chips.append(
                f'<li class="mome-token" title="{markup.escape(choice)}"><span class="mome-swatch" '
                f'style="background: {self._colour("text", expert)}"></span>{markup.escape(word)}{number}'
                f'<span class="mome-hidden">: {markup.escape(choice)}</span></li>'
            )
        return f'<ol class="mome-tokens" aria-label="Tokens of the caption">{"".join(chips)}</ol>'

    def _balance(self, tokens: RoutedTokens, layer: int, average: np.ndarray | None) -> str:
        rows = []
        for expert, share in enumerate(tokens.shares(self.engine.experts)[layer].tolist()):
            usual = None if average is None else float(average[layer, expert])
            mark = "" if usual is None else f'<i style="left: {usual:.1%}" title="gallery: {usual:.0%}"></i>'
            number = f"{share:.0%}" + ("" if usual is None else f" (gallery {usual:.0%})")
            colour = self._colour(tokens.group, expert)
            rows.append(
                f'<tr><th scope="row"><span class="mome-swatch" style="background: {colour}"></span>'
                f'{self._name(tokens.group, expert)}</th><td class="mome-bar"><div class="mome-track">'
                f'<span style="width: {share:.1%}; background: {colour}"></span>{mark}</div></td>'
                f'<td class="mome-number">{number}</td></tr>'
            )
        caption = f"Share of the {tokens.group} tokens that each expert took"
        return f'<table class="mome-balance"><caption class="mome-hidden">{caption}</caption>{"".join(rows)}</table>'

    def _layers(self, routed: Routed, now: int) -> str:
        cells = [
            '<span class="mome-head">layer</span>',
            *(f'<span class="mome-head">{g}</span>' for g in ("image", "text")),
        ]
        shares = [(each, each.shares(self.engine.experts)) for each in (routed.image, routed.text)]
        for layer in range(len(routed.image.experts)):
            current = ' class="mome-now" aria-current="true"' if layer == now else ""
            cells.append(f"<span{current}>{layer + 1}</span>")
            for tokens, of_layer in shares:
                told = ", ".join(
                    f"{self._name(tokens.group, expert)} {share:.0%}" for expert, share in enumerate(of_layer[layer])
                )
                parts = "".join(
                    f'<span style="width: {share:.1%}; background: {self._colour(tokens.group, expert)}"></span>'
                    for expert, share in enumerate(of_layer[layer].tolist())
                )
                cells.append(f'<div class="mome-stack" role="img" aria-label="{told}" title="{told}">{parts}</div>')
        return f'<div class="mome-layers">{"".join(cells)}</div>'


def sentence_for(example: Path) -> str:
    """ "1-circus-tent.png" → "an icon of a circus tent", "2-headphones.png" → "an icon of headphones" """
    name = example.stem.split("-", 1)[-1].replace("-", " ")
    article = "" if name.endswith("s") else "an " if name[:1] in "aeiou" else "a "
    return f"an icon of {article}{name}"


def routing_tab(tab: gr.Tab, engine: Engine, index: Index, examples: list[Path]):
    """The tab's components and events; to be called within `gr.Blocks`.

    Args:
        tab: that opens with the first example.
        engine: who routes.
        index: whose embeddings know how the whole gallery was routed.
        examples: pictures to try, each with a sentence; `sentence_for` makes it of the file's name.
    """
    routing, layers = Routing(engine, index), engine.config.num_hidden_layers
    explained = HARD if engine.experts == 1 else LEARNED.format(k=engine.config.experts_per_token)
    gr.Markdown(explained, elem_classes="mome-note")
    state = gr.State(None, time_to_live=SESSION_SECONDS)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            picture = picture_input(
                "Picture", "The picture whose patches are shown", "routing-picture", value=examples[0]
            )
            caption = gr.Textbox(
                sentence_for(examples[0]),
                label="Caption",
                info="Left empty, the model writes one." if engine.captions else "Whose words are shown.",
                max_length=TEXT_CHARACTERS,
                elem_id="routing-caption",
            )
            button = gr.Button("Show the experts", variant="primary", elem_id="routing-button")
            tried = gr.Examples(
                [[str(each), sentence_for(each)] for each in examples],
                [picture, caption],
                label="Try a picture and a sentence",
                elem_id="routing-try",
            )
        with gr.Column(scale=2, min_width=320):
            layer = gr.Slider(1, layers, 1, step=1, label="Layer", elem_id="routing-layer")
            results = markup.output("routing-results", EMPTY)
    quick = {"preprocess": False, "concurrency_id": "quick", "concurrency_limit": QUICK_REQUESTS}
    shown = {"inputs": [picture, caption, layer], "outputs": [state, results], "api_visibility": "private", **quick}
    button.click(routing.show, **shown, show_progress_on=results)
    caption.submit(routing.show, **shown, show_progress_on=results)
    tab.select(routing.open, **{**shown, "inputs": [state, picture, caption, layer]}, show_progress_on=results)
    tried.load_input_event.then(routing.show, **shown, show_progress_on=results)
    layer.change(
        routing.show_layer,
        [state, layer],
        results,
        preprocess=False,
        queue=False,
        show_progress="hidden",
        trigger_mode="always_last",
        api_visibility="private",
    )
    with gr.Row(visible=False):
        asked = gr.Textbox("", label="caption")
        gr.Button().click(
            routing.routing, [gr.Image(label="image"), asked], gr.JSON(label="experts"), api_name="routing", **quick
        )
