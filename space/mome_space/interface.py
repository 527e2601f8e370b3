"""The page: its tabs, its limits, and how it is launched."""

import ctypes
import os
from typing import Any

import gradio as gr
import torch

from . import TEMP_FOLDER, limits
from .caption import caption_tab
from .classify import classify_tab
from .engine import Engine
from .gallery import EMBEDDINGS_FILE, FOLDER, GALLERY_FILE, Gallery, Index
from .loading import checkpoint_source, load_engine
from .routing import routing_tab
from .search import search_tab
from .style import STYLE_SHEET, theme
from .zero_gpu import spaces

EXAMPLES = sorted((FOLDER / "examples").glob("*.png"))
EXPERTS = "One transformer for pictures and text, with feed-forward experts for each"
WHAT = {"coca": "A contrastive captioner: one encoder for pictures, one for text, and a decoder for captions"}
OWN_MODEL = """**The model** is a mixture-of-modality-experts transformer, trained on openly licensed icons, emoji,
pictograms and cliparts. It is not made for photographs, sentences or counting, and its captions are often wrong: trust
the search more.

**The gallery** holds the two icon sets that training left out whole. The model has learnt many of their names from
other sets, but has seen none of their drawings."""
OTHER_MODELS = {
    "coca": "**The model** is a CoCa, trained with open_clip for photographs; the gallery holds icons.",
    "mome_siglip": "**The model** is a SigLIP as a mixture-of-modality-experts transformer, trained for photographs; "
    "the gallery holds icons.",
}
CALLS = {
    "search": """client.predict(query="a circus tent", count=5, api_name="/search")
client.predict(image=handle_file("icon.png"), api_name="/search")""",
    "caption": 'client.predict(images=[handle_file("icon.png")], api_name="/caption")',
    "classify": 'client.predict(image=handle_file("icon.png"), labels="circus tent\\ncar", templates="{}", '
    'api_name="/classify")',
    "routing": 'client.predict(image=handle_file("icon.png"), caption="a circus tent", api_name="/routing")',
}
ABOUT = """
{model}

**The API** has an endpoint for each of the other tabs:

```python
from gradio_client import Client, handle_file

client = Client("{url}")
{calls}
```

**Limits**: PNG, JPEG, WebP, GIF or BMP up to {megabytes} MB and {megapixels} million pixels, {pictures} pictures for
captions at once, {characters} characters of text. Uploads are deleted within two hours; nothing is logged or sent
elsewhere.
"""


def build_demo(
    model: Any, processor: Any, index: Index | None = None, url: str = "http://127.0.0.1:7860/"
) -> gr.Blocks:
    """The page, not launched: `launch(demo)` does that with the limits and the looks that belong to it.

    Args:
        model: `MomeForConditionalGeneration`.
        processor: its `MomeProcessor`.
        index: what is searched. Default: the gallery of this folder, embedded in the background where the embeddings
            that come with it are of other weights.
    """
    engine = Engine(model, processor) if index is None else index.engine
    if index is None:
        index = Index(engine, Gallery(GALLERY_FILE), EMBEDDINGS_FILE)
        index.build_in_background()
    cache = (limits.UPLOAD_SECONDS, limits.UPLOAD_SECONDS)  # looked through so often, deleted after so long
    with gr.Blocks(title="MoME", analytics_enabled=False, delete_cache=cache) as demo:
        gr.Markdown(_introduction(engine), elem_classes="mome-intro")
        with gr.Tabs():
            with gr.Tab("Search", id="search"):
                search_tab(index, EXAMPLES)
            if engine.captions:
                with gr.Tab("Caption", id="caption"):
                    caption_tab(engine, EXAMPLES)
            with gr.Tab("Classify", id="classify"):
                classify_tab(engine, EXAMPLES)
            if engine.routes:
                with gr.Tab("Routing", id="routing") as routing:
                    routing_tab(routing, engine, index, EXAMPLES)
            with gr.Tab("About", id="about"):
                _about(engine)
    demo.queue(max_size=limits.QUEUE, api_open=False, default_concurrency_limit=limits.QUICK_REQUESTS)
    return demo


def _address() -> str:
    """Where the page will be found: on a Space by its public name, elsewhere at the usual port."""
    if os.environ.get("SPACE_HOST"):
        return f"https://{os.environ['SPACE_HOST']}"
    return f"http://127.0.0.1:{os.environ.get('GRADIO_SERVER_PORT', 7860)}"


def _does(engine: Engine) -> dict[str, str]:
    """The tabs that this model can fill, and what they do."""
    does = {"search": "finds icons by meaning", "caption": "captions them"}
    does |= {"classify": "classifies them by any labels", "routing": "shows which expert took what"}
    has = {"caption": engine.captions, "routing": engine.routes}
    return {name: words for name, words in does.items() if has.get(name, True)}


def _introduction(engine: Engine) -> str:
    *first, last = _does(engine).values()
    return f"# MoME\n{WHAT.get(engine.config.model_type, EXPERTS)}: it {', '.join(first)}, and {last}."


def _about(engine: Engine):
    gr.Markdown(
        ABOUT.format(
            model=OTHER_MODELS.get(engine.config.model_type, OWN_MODEL),
            calls="\n".join(CALLS[name] for name in _does(engine)),
            url=_address(),
            megabytes=limits.FILE_BYTES // 2**20,
            megapixels=limits.PIXELS // 10**6,
            pictures=limits.PICTURES,
            characters=limits.TEXT_CHARACTERS,
        )
    )
    attribution = FOLDER / "ATTRIBUTION.md"
    gr.DownloadButton("Download ATTRIBUTION.md", value=str(attribution), size="sm", elem_id="about-attribution")
    with gr.Accordion("Who drew the pictures, and their licences", open=False):
        text = attribution.read_text(encoding="utf-8")
        gr.Markdown(text.replace("\n## ", "\n### ").replace("# Attribution", "", 1), elem_id="about-sets")


def launch(demo: gr.Blocks, **options: Any) -> tuple:
    """Launches the page with its looks and limits; `options` are those of `gr.Blocks.launch`, and win."""
    settings = {
        "theme": theme(),
        "css_paths": STYLE_SHEET,
        "max_file_size": limits.FILE_BYTES,
        "state_session_capacity": limits.SESSIONS,
        "footer_links": ["api"],
        "run_history": False,
        "ssr_mode": False,
        "pwa": False,
        "mcp_server": False,
        "enable_monitoring": False,
        "share": False,
        "show_error": False,
    }
    return demo.launch(**{**settings, **options})


def share_malloc_arenas(count: int = 2):
    """Keeps glibc from giving each of the server's threads a heap of its own; elsewhere it does nothing.

    Tensors come and go in all of the heaps, and each keeps the pages between those that stay: under load the process
    grew by 20 to 40 MB a minute while what it used did not.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(-8, count)  # M_ARENA_MAX, malloc.h


def main():
    """Loads the checkpoint, and serves the page until interrupted."""
    share_malloc_arenas()
    print(f"Checkpoint: {'@'.join(filter(None, checkpoint_source()))}; files are kept in {TEMP_FOLDER}")
    engine = load_engine()
    index = Index(engine, Gallery(GALLERY_FILE), EMBEDDINGS_FILE)
    if spaces is not None:
        index.build()  # a GPU is lent to requests only, so that the gallery is embedded here, before the move
    if torch.cuda.is_available() and engine.guides:  # an export runs on the CPU
        engine.model.to("cuda")
    index.build_in_background()
    launch(build_demo(engine.model, engine.processor, index))
