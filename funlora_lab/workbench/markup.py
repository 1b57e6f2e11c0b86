"""HTML and SVG that notebooks, widgets and reports show alike: no network, no script, legible on light and dark.

Colours come from JupyterLab's CSS variables, with fallbacks for a page that has none. N images of C channels.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor

from funlora_lab.studies.plots import Drawing, tile

BLUE, ORANGE, GREY = "#2f83c4", "#d55e00", "#8a8a8a"
STYLE = f"<style>{(Path(__file__).parent / 'panel.css').read_text()}</style>"


class Markup:
    """A piece of HTML, or an SVG that ``words`` describe: an image that a notebook shows before anybody trusts it."""

    def __init__(self, html: str, words: str = ""):
        self.html, self.words = html, words

    def image(self) -> str:
        """An SVG as an ``img`` on a white card."""
        address = data_address(self.html.encode(), "image/svg+xml")
        return f'<img alt="{escape(self.words)}" style="background-color:#fff" src="{address}">'

    def __str__(self) -> str:
        shown = self.image() if self.words else self.html
        return f'{STYLE}<div class="funlora tex2jax_ignore mathjax_ignore">{shown}</div>'

    _repr_html_ = __str__

    def __repr__(self) -> str:
        return f"Markup of {len(self.html):,} characters"


def data_address(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png_address(pixels: np.ndarray) -> str:
    """The address of bytes (H, W, 1) or (H, W, 3) as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return data_address(file.getvalue())


def row_of_images(images: Tensor) -> np.ndarray:
    """uint8 images (N, C, H, W) side by side, grey columns between them -> (H, width, C)."""
    pixels, W = tile(images.cpu(), len(images)), images.shape[-1]
    pixels[:, W :: W + 1] = 128
    return pixels


def picture(images: Tensor, words: str) -> str:
    """uint8 images (N, C, H, W) side by side, large enough to be seen well, as an ``img``; ``words`` describe it."""
    pixels, scale = row_of_images(images), max(1.0, 40 / images.shape[-1])
    height, width = (round(side * scale) for side in pixels.shape[:2])
    return f'<img class="pixels" alt="{escape(words)}" width="{width}" height="{height}" src="{png_address(pixels)}">'


def stored(path: Path) -> str:
    """A row of images that lies in a file, with sharp pixels; the file's name describes it."""
    look = 'class="pixels" style="height:40px"'
    return f'<img {look} alt="{escape(path.stem)}" src="{data_address(path.read_bytes())}">'


def figure(drawn: Drawing, words: str) -> str:
    """A matplotlib figure as a PNG on a white card; ``words`` describe it."""
    return f'<img class="figure" alt="{escape(words)}" src="{data_address(drawn.png())}">'


def grid(images: Tensor, words: Sequence[str], wrong: Sequence[bool]) -> str:
    """uint8 images (N, C, H, W), each named and enlarged under the pointer or the focus; ``wrong`` ones outlined."""
    side = max(34, images.shape[-1])
    cells = (
        f'<img tabindex="0" class="pixels{" wrong" if bad else ""}" alt="{escape(name)}" title="{escape(name)}" '
        f'width="{side}" height="{side}" src="{png_address(one.permute(1, 2, 0).numpy())}">'
        for one, name, bad in zip(images.cpu(), words, wrong, strict=True)
    )
    return f'<div class="grid">{"".join(cells)}</div>'


def film(states: Tensor, words: str, wrong: Sequence[bool], side: int = 36) -> str:
    """States (frames, N, C, H, W) of images side by side; the panel's time says which frame shows."""
    (frames, N, _, H, W), pixels = states.shape, np.concatenate([row_of_images(state) for state in states])
    width, clear = pixels.shape[1], np.full((*pixels.shape[:2], 1), 255, np.uint8)
    clear[:, W :: W + 1] = 0  # nothing between two images
    left = (f"left:{100 * i * (W + 1) / width:.2f}%;width:{100 * W / width:.2f}%" for i in range(N) if wrong[i])
    marks = "".join(f'<i class="wrong" style="{where}"></i>' for where in left)
    address = png_address(np.concatenate([np.broadcast_to(pixels, (*pixels.shape[:2], 3)), clear], -1))
    shown = f'<img alt="{escape(words)}" style="width:100%;height:{100 * frames}%" src="{address}">'
    size = f"--frames:{frames};aspect-ratio:{width}/{H};--wide:{width * max(1.0, side / H):.0f}px"
    return f'<div class="film" style="{size}">{shown}{marks}</div>'


def sheet(rows: Sequence[Sequence[str]], heads: Sequence[str] = ()) -> str:
    """A table without lines; the cells are HTML already."""
    lines = [[f"<th>{cell}</th>" for cell in heads], *([f"<td>{cell}</td>" for cell in row] for row in rows)]
    return '<table class="sheet"><tr>' + "</tr><tr>".join("".join(line) for line in lines if line) + "</tr></table>"


def table(frame: pd.DataFrame | dict, digits: int = 4) -> str:
    """A data frame, or one column, as an HTML table; numbers with ``digits`` decimals, missing ones as a dash."""
    frame = pd.DataFrame({"": frame}) if isinstance(frame, dict) else frame
    html = frame.to_html(border=0, float_format=f"{{:.{digits}f}}".format, na_rep="–", index_names=False)
    return f'<div class="wide" tabindex="0">{html}</div>'


def badge(good: bool, words: str) -> str:
    return f'<span class="badge {"good" if good else "bad"}">{escape(words)}</span>'


def bar(share: float, words: str) -> str:
    """A share in [0, 1] of some work that is done, as a bar, and a sentence on it, which is HTML already."""
    return f'<progress max="1" value="{share:.4f}" aria-label="share done"></progress> {share:.0%} {words}'


def problem(sentence: object) -> str:
    return str(Markup(f'<div class="problem">{escape(str(sentence))}</div>'))


def coloured(values: np.ndarray, low: float, high: float, name: str = "RdBu_r") -> np.ndarray:
    """Numbers (H, W) -> colours (H, W, 3) as bytes on a colour map from ``low`` to ``high``."""
    share = (values - low) / (high - low) if high > low else np.full(values.shape, 0.5)
    return matplotlib.colormaps[name](share.clip(0, 1), bytes=True)[..., :3]


def svg(width: float, height: float, parts: Sequence[str], words: str, role: str = "img") -> Markup:
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    about = f'role="{role}" aria-label="{escape(words)}" font-size="12" font-family="system-ui,sans-serif"'
    return Markup(f'<svg xmlns="http://www.w3.org/2000/svg" {size} {about}>{"".join(parts)}</svg>', words)


def curves(lines: Sequence[Sequence[tuple[float, float]]], last: float, words: str) -> str:
    """Small lines through points (step, value) up to step ``last``, on a linear scale whose ends are written down."""
    values = [value for line in lines for _, value in line]
    low, high, left, top, width, height = min(values), max(values), 44, 8, 210, 110
    parts = [element("path", d=f"M{left} {top}v{height}h{width}", fill="none", stroke=GREY)]
    for line in lines:
        some = line[:: len(line) // 200 + 1]
        spots = (f"{left + width * x / last:.1f},{top + height * (high - y) / (high - low or 1):.1f}" for x, y in some)
        parts.append(element("polyline", points=" ".join(spots), fill="none", stroke=BLUE, stroke_width=2.0))
    for y, value in ((top + 9, high), (top + height, low)):
        parts.append(svg_text(left - 5, y, f"{value:.3g}", "end"))
    parts.append(svg_text(left, top + height + 15, f"step 0 to {last:,}"))
    words = f"{words}: between {low:.3g} and {high:.3g} up to step {lines[0][-1][0]:,} of {last:,}"
    return svg(left + width + 8, top + height + 20, parts, words).image()


def element(name: str, inside: str = "", **attributes: str | float) -> str:
    """An SVG element; lengths are rounded to a tenth of a pixel, and ``_`` in an attribute's name stands for ``-``."""
    shown = ((key.replace("_", "-"), a if isinstance(a, str) else f"{a:.1f}") for key, a in attributes.items())
    words = " ".join(f'{key}="{value}"' for key, value in shown)
    return f"<{name} {words}>{inside}</{name}>"


def svg_text(x: float, y: float, words: str, anchor: str = "start", size: float = 12, weight: str = "normal") -> str:
    return element("text", escape(words), x=x, y=y, text_anchor=anchor, font_size=size, font_weight=weight)


def svg_image(x: float, y: float, width: float, height: float, pixels: np.ndarray) -> str:
    """Bytes stretched over a rectangle with sharp pixels."""
    how = {"preserveAspectRatio": "none", "style": "image-rendering:pixelated", "href": png_address(pixels)}
    return element("image", x=x, y=y, width=width, height=height, **how)


def svg_box(x: float, y: float, width: float, height: float, colour: str, words: str, edge="none", thick=1.0) -> str:
    """A rectangle with a tooltip; ``edge`` is the colour of its outline."""
    look = {"rx": 2, "fill": colour, "stroke": edge, "stroke_width": thick}
    return element("rect", f"<title>{escape(words)}</title>", x=x, y=y, width=width, height=height, **look)
