"""HTML and SVG that notebooks, widgets and reports show alike: no network, no script, legible on light and dark.

Colours come from JupyterLab's CSS variables, with fallbacks for a page that has none.
"""

import base64
import io
from collections.abc import Sequence
from html import escape

import matplotlib
import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor

from funlora_lab.studies.plots import Drawing

STYLE = """<style>
.funlora{color:var(--jp-content-font-color1,#222);font-family:var(--jp-content-font-family,system-ui,sans-serif);
 font-size:13px;line-height:1.45}
.funlora table{border-collapse:collapse;margin:4px 0;color:inherit;font-size:inherit}
.funlora th,.funlora td{padding:2px 9px;text-align:right;border-bottom:1px solid var(--jp-border-color2,#ccc)}
.funlora .wide{overflow-x:auto}.funlora .wide td,.funlora .wide th{white-space:nowrap}
.funlora th:first-child,.funlora td:first-child{text-align:left}
.funlora table.sheet td,.funlora table.sheet th{border:0;padding:2px 6px;text-align:left;vertical-align:middle}
.funlora img{border-radius:4px;vertical-align:middle}
.funlora img.pixels{image-rendering:pixelated}
.funlora img.figure{background:#fff;border-radius:8px;padding:4px;max-width:100%}
.funlora-card{border-radius:8px}
.funlora svg{max-width:100%;height:auto}
.funlora svg text{fill:currentColor}
.funlora .soft{color:var(--jp-content-font-color2,#555)}
.funlora .badge{display:inline-block;border-radius:9px;padding:0 9px;color:#fff;font-weight:600}
.funlora .good{background:#00704f}.funlora .bad{background:#b34700}
.funlora .problem{border-left:4px solid #d55e00;padding:2px 9px}
</style>"""


class Markup:
    """A piece of HTML or SVG; a notebook shows it as it is."""

    def __init__(self, html: str):
        self.html = html

    def __str__(self) -> str:
        return f'{STYLE}<div class="funlora">{self.html}</div>'

    def __repr__(self) -> str:
        return f"Markup of {len(self.html):,} characters"

    def _repr_html_(self) -> str:
        return str(self)


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of bytes (H, W), (H, W, 1) or (H, W, 3)."""
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 and pixels.ndim == 3 else pixels).save(file, "PNG")
    return file.getvalue()


def data_address(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def pixels_of(html: str) -> list[np.ndarray]:
    """The bytes of every PNG inside a piece of HTML, in order: the inverse of ``picture``."""
    parts = html.split("data:image/png;base64,")[1:]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(part.split('"')[0])))) for part in parts]


def row_of_images(images: Tensor, gap: int = 1) -> np.ndarray:
    """uint8 images (N, C, H, W) side by side with transparent-looking grey gaps -> (H, width, C)."""
    N, C, H, W = images.shape
    sheet = np.full((H, N * (W + gap) - gap, C), 128, np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        sheet[:, i * (W + gap) : i * (W + gap) + W] = image
    return sheet


def picture(pixels: np.ndarray, scale: float, words: str) -> str:
    """An ``img`` of bytes shown ``scale`` times as large with sharp pixels; ``words`` describe it."""
    H, W = pixels.shape[:2]
    return (
        f'<img class="pixels" alt="{escape(words)}" width="{round(W * scale)}" height="{round(H * scale)}" '
        f'src="{data_address(png(pixels))}">'
    )


def scale_for(images: Tensor) -> float:
    """Screen pixels a pixel, so that small images are still seen well."""
    return max(1.0, 40 / images.shape[-1])


def sheet(rows: Sequence[Sequence[str]], heads: Sequence[str] = ()) -> str:
    """A table without lines; the cells are HTML already."""
    head = f"<tr>{''.join(f'<th>{cell}</th>' for cell in heads)}</tr>" if heads else ""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="sheet">{head}{body}</table>'


def table(frame: pd.DataFrame, digits: int = 4) -> str:
    """A data frame as an HTML table that scrolls sideways; numbers with ``digits`` decimals, missing ones as a dash."""
    html = frame.to_html(border=0, float_format=f"{{:.{digits}f}}".format, na_rep="–", index_names=False)
    return f'<div class="wide">{html}</div>'


def badge(good: bool, words: str) -> str:
    return f'<span class="badge {"good" if good else "bad"}">{escape(words)}</span>'


def problem(sentence: object) -> Markup:
    """A sentence that says what went wrong."""
    return Markup(f'<div class="problem">{escape(str(sentence))}</div>')


def figure(drawn: Drawing, words: str = "") -> str:
    """A drawing as an ``img`` on a white card."""
    return f'<img class="figure" alt="{escape(words)}" src="{data_address(drawn.png())}">'


def coloured(values: np.ndarray, low: float, high: float, name: str = "RdBu_r") -> np.ndarray:
    """Numbers (H, W) -> colours (H, W, 3) as bytes on a colour map from ``low`` to ``high``."""
    share = (values - low) / (high - low) if high > low else np.full(values.shape, 0.5)
    return matplotlib.colormaps[name](share.clip(0, 1), bytes=True)[..., :3]


def svg(width: float, height: float, parts: Sequence[str], words: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(words)}" font-size="12">'
        f"{''.join(parts)}</svg>"
    )


def svg_text(x: float, y: float, words: str, anchor: str = "start", size: float = 12, weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size:g}" font-weight="{weight}">'
        f"{escape(words)}</text>"
    )


def svg_image(x: float, y: float, width: float, height: float, pixels: np.ndarray) -> str:
    """Bytes stretched over a rectangle with sharp pixels."""
    return (
        f'<image x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="{data_address(png(pixels))}"/>'
    )


def svg_box(x: float, y: float, width: float, height: float, colour: str, words: str = "", edge: str = "none") -> str:
    """A rectangle with a tooltip; ``edge`` is the colour of its outline."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" fill="{colour}" '
        f'stroke="{edge}" stroke-width="{0 if edge == "none" else 2.5}"><title>{escape(words)}</title></rect>'
    )
