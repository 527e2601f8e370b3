"""How the Space looks: theme, style sheet and a little script. Nothing comes from another machine."""

from pathlib import Path

import gradio as gr

STYLE_SHEET = Path(__file__).parent / "style.css"

# The experts' colours: eight that stay apart for colour-blind eyes (Okabe and Ito, 2008), black replaced by grey.
EXPERT_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8c8c8c")


def expert_colour(number: int) -> str:
    """A colour for each expert; beyond the table, hues by the golden angle."""
    if number < len(EXPERT_COLOURS):
        return EXPERT_COLOURS[number]
    return f"hsl({number * 137.5 % 360:.0f} 60% 50%)"


def theme() -> gr.themes.Base:
    """Names of fonts as strings are taken from the visitor's system; Gradio's own would be downloaded."""
    return gr.themes.Soft(
        primary_hue=gr.themes.colors.indigo,
        secondary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    ).set(  # visible borders, and enough contrast for small and for white text (WCAG 2.2, 1.4.3 and 1.4.11)
        background_fill_primary="*neutral_50",
        block_background_fill="white",
        block_border_width="1px",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*primary_700",
        block_title_text_color="*primary_700",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
    )


def picture_input(label: str, alt_text: str, elem_id: str, height: int = 220, value: Path | None = None) -> gr.Image:
    """Where a visitor drops one picture. Its events set `preprocess=False`, and `uploads.read_picture` opens it."""
    return gr.Image(
        None if value is None else str(value),
        label=label,
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        buttons=[],
        height=height,
        alt_text=alt_text,
        elem_id=elem_id,
    )


# Of every HTML component; Gradio runs it with `element` and `trigger`.
SCRIPT = (Path(__file__).parent / "script.js").read_text(encoding="utf-8")
