"""FunLoRA and the functions that the paper sets beside it: W0 * F, W0 + F or W0 * F + G with F of any function.

Letters: K classes side by side, O = Cout, I = Cin, r ratio, p functions.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from funlora_lab.adapters.functions import (
    cosine,
    cosine_frozen,
    first_ponderation,
    power,
    power_frozen,
    scaled,
    scaled_by,
    shift,
)
from funlora_lab.adapters.method import (
    Method,
    Row,
    Settings,
    broadcast,
    kaiming,
    register,
    sizes,
    source_text,
    vectors,
    window,
)
from funlora_lab.errors import LabError

AS_WRITTEN = ("literal", "kaiming")  # starts of the paper's text, from which no first value is subtracted


def functional(name, about, rate, settings, numbers, matrix: Callable, bound: Callable, product=None) -> Method:
    """The method of one function (Eq. 4-19, operations of Table IV).

    numbers(layer, settings, generator, start) -> the first numbers of F beside A = B = 1; matrix(numbers, settings) ->
    F; product(W0, numbers, settings) -> W0 * F where there is a shorter way to it. The additive forms subtract F's
    first value, 1, to start at the identity; the starts of the paper's text leave it in: ``literal``, A = B = 1
    everywhere, and ``kaiming``, A Kaiming normal and B zero in what is added (Sec. 5.2). With the latter A B = 0, so
    every cosine is 1 and A, B and its frequencies never have a gradient.
    """

    def start(layer, settings, generator=None, first=None):
        row, (outputs, inputs), first = {}, sizes(layer, settings), first or settings.start
        for prefix in ("", "G.") if settings.operation == "mul-add" else ("",):
            part = {"A": torch.ones(outputs), "B": torch.ones(inputs)}
            if first == "kaiming" and (prefix or settings.operation == "add"):
                part = {"A": kaiming(generator, outputs, 1)[:, 0], "B": torch.zeros(inputs)}
            part |= numbers(layer, settings, generator, first)
            row |= {prefix + key: value for key, value in part.items()}
        return row

    def neutral(layer, settings):
        row = start(layer, settings, first="identity")
        if settings.start in AS_WRITTEN and settings.operation != "mul":  # nothing is subtracted: F or G must vanish
            prefix = "G." if settings.operation == "mul-add" else ""
            for key in ("ponderation",) if "ponderation" in row else ("A", "B"):
                row[prefix + key] = torch.zeros_like(row[prefix + key])
        return row

    def weight(W0, row, settings):
        if settings.operation == "mul" and product:
            return product(W0, row, settings)
        F, first = broadcast(matrix(row, settings), W0), 0.0 if settings.start in AS_WRITTEN else 1.0
        if settings.operation == "mul":
            return scaled(W0, F)
        if settings.operation == "add":
            return W0 + (F - first)
        G = matrix({key[2:]: value for key, value in row.items() if key.startswith("G.")}, settings)
        return W0 * F + (broadcast(G, W0) - first)

    settings = ("operation", "start", "ratio", "window", *settings)
    return Method(name, about, rate, settings, window(), start, neutral, weight, None, matrix, bound)


def function(name: str, rate: float = 3e-2, about: str = "", bound: Callable | None = None, **first: Callable):
    """Register a function f(A, B, ...) -> F as a method.

        @function("sawtooth", rate=3e-2, frequency=lambda p: torch.arange(1.0, p + 1))
        def sawtooth(A, B, ponderation, frequency): ...

    f gets A (K, O), B (K, I) and its other numbers (K, p), and returns F (K, O, I). Each of them is learned:
    ``ponderation`` starts as the setting ``start`` says (so F has to be linear in it), any other at ``first(p)`` (p,),
    given here by its name. ``bound(p, O, I, r)`` is the largest rank that F can have, if below min(O, I). The source
    text of f is part of every key. Raises LabError when the first values do not fit f.
    """

    def registered(f: Callable) -> Callable:
        names = list(inspect.signature(f).parameters)[2:]
        others = [key for key in names if key != "ponderation"]
        if set(others) != set(first):
            wanted, given = ", ".join(others) or "none", ", ".join(first) or "none"
            raise LabError(f"{name}: first values are needed for {wanted}, and given for {given}.")

        def numbers(layer, settings, generator, start) -> Row:
            p = settings.functions
            learned = {key: first[key](p) for key in others}
            if "ponderation" in names:
                learned = {"ponderation": first_ponderation(checked, start, p, *learned.values())} | learned
            return learned

        def checked(A: Tensor, B: Tensor, *others: Tensor) -> Tensor:
            F, expected = f(A, B, *others), (*A.shape, B.shape[-1])
            if getattr(F, "shape", None) != expected:
                made = tuple(F.shape) if isinstance(F, Tensor) else f"a {type(F).__name__}"
                given = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
                raise LabError(f"The function {name} returns {made} for {given}: accepted is F (K, O, I), {expected}.")
            return F

        def matrix(row: Row, settings: Settings) -> Tensor:
            return checked(*vectors(row, settings), *(row[key] for key in names))

        def product(W0: Tensor, row: Row, settings: Settings) -> Tensor:
            return scaled_by(f, W0, *vectors(row, settings), *(row[key] for key in names))

        def largest(settings: Settings, O: int, I: int) -> int:
            return min(O, I) if bound is None else min(bound(settings.functions, O, I, settings.ratio), O, I)

        words = about or (f.__doc__ or name).strip().splitlines()[0].rstrip(".")
        method = functional(name, words, rate, ("functions",), numbers, matrix, largest, product)
        register(replace(method, text=source_text(f, *first.values())))
        return f

    return registered


def _ramp(p: int) -> Tensor:
    """The frequencies and exponents at which training starts: 1, 2, ..., p."""
    return torch.arange(1.0, p + 1)


# Adam's rates are those at which each did best on held-out digits. A and B of ratio r hold Cout/r and Cin/r values, so
# what acts entry by entry has no more distinct rows or columns; a shift by less than r tears repeated entries apart.
_F = "W * F in the window's convolutions, F of"
function("funlora", 3e-2, f"{_F} cosine, learned", lambda p, O, I, r: min(O, I) // r, frequency=_ramp)(cosine)
function("cosine-frozen", 3e-2, f"{_F} cosine", lambda p, O, I, r: min(O, I) // r)(cosine_frozen)
function("power", 1.5e-2, f"{_F} power, learned", lambda p, O, I, r: min(p, O // r, I // r), exponent=_ramp)(power)
function("power-frozen", 1.5e-2, f"{_F} power", lambda p, O, I, r: min(p, O // r, I // r))(power_frozen)
function("shift", 1e-1, f"{_F} shift", lambda p, O, I, r: p)(shift)
