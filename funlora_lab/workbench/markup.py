"""HTML and SVG that notebooks, widgets and reports show alike: no network, no script, legible on light and dark.

Colours come from JupyterLab's CSS variables, with fallbacks for a page that has none. N images of C channels.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.font_manager import FontProperties, findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from funlora_lab.studies.plots import Drawing, tile

BLUE, ORANGE, GREY = "#2f83c4", "#d55e00", "#8a8a8a"
STYLE = f"<style>{(Path(__file__).parent / 'panel.css').read_text()}</style>"


class Markup:
    """A piece of HTML or SVG; a notebook shows it as it is."""

    def __init__(self, html: str):
        self.html = html

    def __str__(self) -> str:
        return f'{STYLE}<div class="funlora tex2jax_ignore mathjax_ignore">{self.html}</div>'

    _repr_html_ = __str__

    def _repr_png_(self) -> tuple[bytes, dict] | None:
        """SVG alone: the same picture as PNG, which a notebook shows before anybody trusts it, with its words."""
        if self.html.startswith("<svg"):
            return raster(self.html), {"alt": ElementTree.fromstring(self.html).get("aria-label")}

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


def scale_of(images: Tensor) -> float:
    """Screen pixels a pixel, so that small images are still seen well."""
    return max(1.0, 40 / images.shape[-1])


def picture(images: Tensor, words: str) -> str:
    """uint8 images (N, C, H, W) side by side with sharp pixels as an ``img``; ``words`` describe it."""
    pixels = row_of_images(images)
    height, width = (round(side * scale_of(images)) for side in pixels.shape[:2])
    return f'<img class="pixels" alt="{escape(words)}" width="{width}" height="{height}" src="{png_address(pixels)}">'


def figure(drawn: Drawing, words: str) -> str:
    """A matplotlib figure as a PNG on a white card; ``words`` describe it."""
    return f'<img class="figure" alt="{escape(words)}" src="{data_address(drawn.png())}">'


def grid(images: Tensor, words: Sequence[str], wrong: Sequence[bool]) -> str:
    """uint8 images (N, C, H, W), each named and enlarged under the pointer or the focus; ``wrong`` ones outlined."""
    side = max(28, images.shape[-1])
    cells = (
        f'<img tabindex="0" class="pixels{" wrong" if bad else ""}" alt="{escape(name)}" title="{escape(name)}" '
        f'width="{side}" height="{side}" src="{png_address(one.permute(1, 2, 0).numpy())}">'
        for one, name, bad in zip(images.cpu(), words, wrong, strict=True)
    )
    return f'<div class="grid">{"".join(cells)}</div>'


def film(states: Tensor, words: str, wrong: Sequence[bool], side: int = 36) -> str:
    """States (frames, N, C, H, W) of images side by side; the panel's time says which frame shows."""
    (frames, N, _, H, W), pixels = states.shape, np.concatenate([row_of_images(state) for state in states])
    clear = np.full((*pixels.shape[:2], 1), 255, np.uint8)
    clear[:, W :: W + 1] = 0  # nothing between two images
    scale = max(1.0, side / H)
    size = f"width:{pixels.shape[1] * scale:.0f}px;height:{H * scale:.0f}px"
    left = (f"left:{i * (W + 1) * scale:.1f}px;width:{W * scale:.1f}px" for i in range(N) if wrong[i])
    marks = "".join(f'<i class="wrong" style="{where}"></i>' for where in left)
    address = png_address(np.concatenate([np.broadcast_to(pixels, (*pixels.shape[:2], 3)), clear], -1))
    shown = f'<img alt="{escape(words)}" style="width:100%;height:{100 * frames}%" src="{address}">'
    return f'<div class="film" style="--frames:{frames};{size}">{shown}{marks}</div>'


def sheet(rows: Sequence[Sequence[str]], heads: Sequence[str] = ()) -> str:
    """A table without lines; the cells are HTML already."""
    lines = [[f"<th>{cell}</th>" for cell in heads], *([f"<td>{cell}</td>" for cell in row] for row in rows)]
    return '<table class="sheet"><tr>' + "</tr><tr>".join("".join(line) for line in lines if line) + "</tr></table>"


def table(frame: pd.DataFrame | dict, digits: int = 4) -> str:
    """A data frame, or one column, as an HTML table; numbers with ``digits`` decimals, missing ones as a dash."""
    frame = pd.DataFrame({"": frame}) if isinstance(frame, dict) else frame
    html = frame.to_html(border=0, float_format=f"{{:.{digits}f}}".format, na_rep="–", index_names=False)
    return f'<div class="wide">{html}</div>'


def badge(good: bool, words: str) -> str:
    return f'<span class="badge {"good" if good else "bad"}">{escape(words)}</span>'


def problem(sentence: object) -> str:
    return str(Markup(f'<div class="problem">{escape(str(sentence))}</div>'))


def coloured(values: np.ndarray, low: float, high: float, name: str = "RdBu_r") -> np.ndarray:
    """Numbers (H, W) -> colours (H, W, 3) as bytes on a colour map from ``low`` to ``high``."""
    share = (values - low) / (high - low) if high > low else np.full(values.shape, 0.5)
    return matplotlib.colormaps[name](share.clip(0, 1), bytes=True)[..., :3]


def svg(width: float, height: float, parts: Sequence[str], words: str, role: str = "img") -> Markup:
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    about = f'role="{role}" aria-label="{escape(words)}" font-size="12"'
    return Markup(f'<svg xmlns="http://www.w3.org/2000/svg" {size} {about}>{"".join(parts)}</svg>')


def raster(drawn: str, scale: int = 2) -> bytes:
    """A PNG, ``scale`` screen pixels a pixel, of an SVG made of ``element``s: rectangles, lines, texts and images."""
    root = ElementTree.fromstring(drawn)
    size = [round(scale * float(root.get(side))) for side in ("width", "height")]
    sheet, file = Image.new("RGB", size, "white"), io.BytesIO()
    pen = ImageDraw.Draw(sheet)
    for part in root:
        of = {key: scale * float(part.get(key, 0)) for key in ("x", "y", "width", "height", "x1", "y1", "x2", "y2")}
        box = (of["x"], of["y"], of["x"] + of["width"], of["y"] + of["height"])
        match part.tag.rpartition("}")[2]:
            case "rect":
                edge = None if part.get("stroke") == "none" else part.get("stroke")
                pen.rectangle(box, part.get("fill"), edge, scale * round(float(part.get("stroke-width"))))
            case "line":
                ink = part.get("stroke").replace("currentColor", "#222222")
                pen.line([of[key] for key in ("x1", "y1", "x2", "y2")], ink, scale)
            case "text":
                font = findfont(FontProperties(family="DejaVu Sans", weight=part.get("font-weight")))
                font = ImageFont.truetype(font, scale * float(part.get("font-size")))
                anchor = {"start": "ls", "middle": "ms", "end": "rs"}[part.get("text-anchor")]
                pen.text((of["x"], of["y"]), part.text or "", "#222222", font, anchor)
            case "image":
                inside = Image.open(io.BytesIO(base64.b64decode(part.get("href").partition(",")[2])))
                place = [round(side) for side in box]
                sheet.paste(inside.resize((max(1, place[2] - place[0]), max(1, place[3] - place[1])), 0), place[:2])
    sheet.quantize(256).save(file, "PNG", optimize=True)
    return file.getvalue()


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


def svg_box(x: float, y: float, width: float, height: float, colour: str, words: str = "", edge: str = "none") -> str:
    """A rectangle with a tooltip; ``edge`` is the colour of its outline."""
    look = {"rx": 2, "fill": colour, "stroke": edge, "stroke_width": 0 if edge == "none" else 2.5}
    return element("rect", f"<title>{escape(words)}</title>", x=x, y=y, width=width, height=height, **look)
