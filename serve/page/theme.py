"""The look of the page: fonts of the reader's own machine, and the colours of the project's reports."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
LIGHT = {
    "body_background_fill": "#f4f6f8",
    "body_text_color": "#1b2430",
    "body_text_color_subdued": "#5b6675",
    "background_fill_primary": "#ffffff",
    "background_fill_secondary": "#f4f6f8",
    "block_background_fill": "#ffffff",
    "block_border_color": "#dfe4ea",
    "border_color_primary": "#dfe4ea",
    "input_background_fill": "#ffffff",
    "block_label_background_fill": "#ffffff",
    "block_label_text_color": "#5b6675",
    "block_title_text_color": "#5b6675",
    "color_accent": "#1f6fb4",
    "color_accent_soft": "#e6f0f9",
    "loader_color": "#1f6fb4",
    "table_even_background_fill": "#ffffff",
    "table_odd_background_fill": "#f4f6f8",
    "link_text_color": "#1f6fb4",
    "button_primary_background_fill": "#1f6fb4",
    "button_primary_background_fill_hover": "#185a93",
    "button_primary_text_color": "#ffffff",
    "checkbox_label_background_fill": "#ffffff",
    "checkbox_label_background_fill_selected": "#e6f0f9",
    "checkbox_label_text_color_selected": "#1b2430",
    "checkbox_background_color_selected": "#1f6fb4",
    "checkbox_border_color_selected": "#1f6fb4",
}
DARK = {
    "body_background_fill": "#0f141a",
    "body_text_color": "#e7ecf2",
    "body_text_color_subdued": "#9aa7b6",
    "background_fill_primary": "#171e26",
    "background_fill_secondary": "#0f141a",
    "block_background_fill": "#171e26",
    "block_border_color": "#2a343f",
    "border_color_primary": "#2a343f",
    "input_background_fill": "#171e26",
    "block_label_background_fill": "#171e26",
    "block_label_text_color": "#9aa7b6",
    "block_title_text_color": "#9aa7b6",
    "color_accent_soft": "#1d3f5c",
    "loader_color": "#7db8e8",
    "table_even_background_fill": "#171e26",
    "table_odd_background_fill": "#1c2530",
    "link_text_color": "#7db8e8",
    "button_primary_background_fill": "#7db8e8",
    "button_primary_background_fill_hover": "#a3cdf0",
    "button_primary_text_color": "#0f141a",
    "checkbox_label_background_fill": "#171e26",
    "checkbox_label_background_fill_selected": "#1d3f5c",
    "checkbox_label_text_color_selected": "#e7ecf2",
    "checkbox_background_color_selected": "#7db8e8",
    "checkbox_border_color_selected": "#7db8e8",
}
CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
HEAD = f"<style>{(Path(__file__).parent / 'frame.css').read_text(encoding='utf-8')}</style>"


def build_theme() -> gr.themes.Base:
    # Names of fonts, not Gradio's objects: those would be fetched.
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_lg,
        font=SANS,
        font_mono=MONO,
    )
    return theme.set(**LIGHT, **{f"{name}_dark": value for name, value in DARK.items()})
