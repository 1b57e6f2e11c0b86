"""Native controls as HTML; each bears the name of the panel's trait that it holds (see ``panel.js``)."""

import json
from collections.abc import Iterable
from html import escape


def select(name: str, label: str, options: Iterable[tuple[str, object]]) -> str:
    """A choice among (words, value)."""
    inside = "".join(f'<option value="{escape(json.dumps(v))}">{escape(words)}</option>' for words, v in options)
    return f'<label>{escape(label)} <select name="{name}">{inside}</select></label>'


def picks(name: str, label: str, options: Iterable[tuple[str, int]]) -> str:
    """Any number of choices, a list of numbers: a check box for each (words, value)."""
    boxes = (f'<label><input type="checkbox" name="{name}" value="{v}">{escape(words)}</label>' for words, v in options)
    return f"<fieldset><legend>{escape(label)}</legend>{''.join(boxes)}</fieldset>"


def slider(name: str, label: str, low: float, high: float, step: float = 1, words: str = "") -> str:
    """A slider with its value beside it; ``words`` are its name where the label alone would not say enough."""
    named = f' aria-label="{escape(words)}"' if words else ""
    bounds = f'min="{low:g}" max="{high:g}" step="{step:g}"'
    return f'<label>{escape(label)} <input type="range" name="{name}" {bounds}{named}><output></output></label>'


def check(name: str, label: str) -> str:
    return f'<label><input type="checkbox" name="{name}">{escape(label)}</label>'


def field(name: str, label: str, kind: str = "text", width: int = 160, hint: str = "") -> str:
    """A line of text, or with ``kind`` number or search; its width in pixels."""
    look = f'style="width:{width}px" placeholder="{escape(hint)}"'
    return f'<label>{escape(label)} <input type="{kind}" name="{name}" {look}></label>'


def button(
    act: str, label: str, kind: str = "", value: object = "", words: str = "", pressed: bool | None = None
) -> str:
    """Calls ``press_<act>(value)`` of the panel; ``kind``: main, halt or none; ``words`` say more than the label."""
    named = f' aria-label="{escape(words)}"' if words else ""
    state = "" if pressed is None else f' aria-pressed="{str(pressed).lower()}"'
    how = f'class="{kind}" data-press="{act}" data-value="{escape(str(value))}"{named}{state}'
    return f'<button type="button" {how}>{escape(label)}</button>'


def film_controls(frames: int) -> str:
    """Play, pause and a slider of the time from noise, 0, to image, 1, of all films of a panel; no kernel needed."""
    how = f'min="0" max="1" step="{1 / (frames - 1):g}" value="1"'
    slider = f'<label>time <input type="range" data-time {how}><output></output></label>'
    return f'<button type="button" data-play>Play</button>{slider}'


def place(name: str, kind: str = "") -> str:
    """Where the trait of this name, a piece of HTML, is shown."""
    return f'<div class="{kind}" data-place="{name}"></div>'


def row(*parts: str) -> str:
    """Controls side by side, wrapping where the window is narrow."""
    return f'<div class="row">{"".join(parts)}</div>'
