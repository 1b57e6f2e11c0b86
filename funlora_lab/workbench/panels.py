"""The workbench's pictures and tables as plain functions: numbers in, ``Markup``, figure or bytes out; no widget.

Letters: N images, C channels, H x W pixels, O = Cout, I = Cin.
"""

import io
from collections.abc import Sequence

import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor

from funlora_lab import metrics
from funlora_lab.config import FUNCTIONAL_METHODS
from funlora_lab.flow import Solver
from funlora_lab.opened import OpenRun
from funlora_lab.studies import plots
from funlora_lab.workbench import explore, markup
from funlora_lab.workbench.explore import FunctionView, Layer
from funlora_lab.workbench.markup import Markup, svg_box, svg_image, svg_text

BLUE, ORANGE, GREY = "#2f83c4", "#d55e00", "#8a8a8a"


def around_one(values: Tensor) -> np.ndarray:
    """Colours of numbers (H, W) on a scale that is white at 1 and as wide as the furthest of them."""
    array = values.numpy()
    reach = max(float(np.abs(array - 1).max()), 1e-6)
    return markup.coloured(array, 1 - reach, 1 + reach)


def function_picture(view: FunctionView) -> Markup:
    """A beside B above F = f(A, B), each white where it is 1, and F's singular values on a logarithmic scale."""
    O, I = view.F.shape
    side = 230
    height, width = side * O / max(O, I), side * I / max(O, I)
    left, top, bar = 34, 44, 14
    parts = [
        svg_text(left - 10, top + height / 2 + 4, "A", "end", 14, "bold"),
        svg_image(left, top, bar, height, around_one(view.A[:, None])),
        svg_text(left + bar + 6 + width / 2, top - bar - 12, "B", "middle", 14, "bold"),
        svg_image(left + bar + 6, top - bar - 6, width, bar, around_one(view.B[None])),
        svg_image(left + bar + 6, top, width, height, around_one(view.F)),
        svg_text(
            left + bar + 6 + width / 2,
            top + height + 18,
            f"F, {O} × {I}: {view.F.min():.2f} to {view.F.max():.2f}, mean {view.F.mean():.2f}",
            "middle",
        ),
    ]
    x0, chart, floor = left + bar + side + 80, 330, 9.0  # the chart spans 1 down to 1e-9 of the largest
    singular = view.singular.numpy() / max(float(view.singular[0]), 1e-300)
    step = chart / len(singular)
    for i, value in enumerate(singular):
        share = 1 + np.log10(max(value, 10**-floor)) / floor
        counted = i < view.rank
        parts.append(
            svg_box(
                x0 + i * step,
                top + side * (1 - share),
                max(step - 1, 1),
                max(side * share, 1),
                BLUE if counted else GREY,
                f"singular value {i + 1}: {view.singular[i]:.3g}",
            )
        )
    line = top + side * -np.log10(metrics.TOLERANCE) / floor
    parts += [
        f'<line x1="{x0}" x2="{x0 + chart}" y1="{line:.1f}" y2="{line:.1f}" stroke="{ORANGE}" stroke-dasharray="5 4"/>',
        svg_text(x0 + chart, line - 5, f"counted above this line: {metrics.TOLERANCE:.0e} of the largest", "end", 11),
        svg_text(x0 - 6, top + 10, "1", "end", 11),
        svg_text(x0 - 6, top + side, "1e-9", "end", 11),
        svg_text(x0, top + side + 18, f"the {len(singular)} singular values of F, relative to the largest"),
        svg_text(x0, 22, f"rank {view.rank}", size=20, weight="bold"),
        svg_text(x0 + 90, 22, f"of at most {view.bound} by its formula ({view.method})"),
    ]
    return Markup(markup.svg(x0 + chart + 10, top + side + 28, parts, f"{view.method}: rank {view.rank}"))


def same_noise(title: str, columns: dict[str, Tensor]) -> str:
    """One line of images a column name, and a badge saying whether all are equal bit for bit; HTML."""
    images = list(columns.values())
    same = explore.identical(images)
    changed = max((explore.drift(images[0], other) for other in images[1:]), default=0.0)
    words = "bit-identical" if same else f"not identical: up to {changed:.1f} of 255 apart on average"
    rows = [
        [name, markup.picture(markup.row_of_images(drawn), markup.scale_for(drawn), f"{title}, {name}")]
        for name, drawn in columns.items()
    ]
    mark = markup.badge(same, words) if len(images) > 1 else ""
    return f"<b>{title}</b> {mark}{markup.sheet(rows)}"


def compare_tasks(opened: OpenRun, classes: Sequence[int], count: int, solver: Solver, seed: int) -> Markup:
    """Each class's images from the same noise after every task that knows it, with the bit-identical badge."""
    parts = (
        same_noise(f"class {opened.known[cls]}", explore.across_tasks(opened, cls, count, solver, seed))
        for cls in classes
    )
    return Markup("".join(parts))


def compare_runs(runs: Sequence[OpenRun], classes: Sequence[int], count: int, solver: Solver, seed: int) -> Markup:
    """Each class's images from the same noise in several runs or methods."""
    parts = (
        same_noise(f"class {runs[0].known[cls]}", explore.across_runs(runs, cls, count, solver, seed))
        for cls in classes
    )
    return Markup("".join(parts))


def sample_sheet(opened: OpenRun, classes: Sequence[int], count: int, solver: Solver, seed: int) -> Markup:
    """One row of images a class, beside what the classifier trained on real images takes them for."""
    rows = []
    for cls in classes:
        (drawn,) = explore.across_runs([opened], cls, count, solver, seed).values()
        name = opened.known[cls]
        known = explore.judged(opened, drawn).count(name)
        image = markup.picture(markup.row_of_images(drawn), markup.scale_for(drawn), f"samples of class {name}")
        rows.append([f"<b>{name}</b>", image, f"{known} of {count} recognised"])
    return Markup(markup.sheet(rows))


def path_strip(states: Tensor) -> Markup:
    """States (frames, N, C, H, W) from noise to image: one row an image, time from left to right."""
    frames, N = states.shape[:2]
    rows = []
    for n in range(N):
        strip = markup.row_of_images(states[:, n])
        rows.append([markup.picture(strip, markup.scale_for(states[0]), f"image {n + 1} from noise to image")])
    scale = markup.scale_for(states[0])
    times = "".join(
        f'<span style="display:inline-block;width:{(states.shape[-1] + 1) * scale:.1f}px">{k / (frames - 1):.2g}</span>'
        for k in range(frames)
    )
    return Markup(markup.sheet([["time from 0 (noise) to 1 (image)"], [f'<span class="soft">{times}</span>'], *rows]))


def animation(states: Tensor, milliseconds: int = 90) -> bytes:
    """A GIF of states (frames, N, C, H, W), the images side by side, resting on the last one."""
    scale = round(markup.scale_for(states[0]))
    sheets = [markup.row_of_images(state).squeeze() for state in states]
    frames = [Image.fromarray(sheet).resize((sheet.shape[1] * scale, sheet.shape[0] * scale), 0) for sheet in sheets]
    durations = [milliseconds] * (len(frames) - 1) + [1500]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return file.getvalue()


def labelled_strip(opened: OpenRun, names: Sequence[str], images: Sequence[Tensor], first: Tensor) -> Markup:
    """One row of images a name, with its drift from ``first`` and the real-image classifier's answers."""
    rows = []
    for name, drawn in zip(names, images, strict=True):
        answers = pd.Series(explore.judged(opened, drawn)).value_counts()
        taken = ", ".join(f"{share} × {answer}" for answer, share in answers.items())
        image = markup.picture(markup.row_of_images(drawn), markup.scale_for(drawn), name)
        rows.append([name, image, f"{explore.drift(first, drawn):.1f}", taken])
    return Markup(markup.sheet(rows, ("", "same noise", "drift, of 255", "taken for")))


def scale_strip(
    opened: OpenRun,
    cls: int,
    layer: int,
    number: str,
    which: int | None,
    factors: Sequence[float],
    count: int,
    solver: Solver,
    seed: int,
) -> Markup:
    """A class's images as one of a layer's numbers is multiplied by each factor; drift from what was learned."""
    name = explore.adapted_layers(opened).get(layer, "")
    row = explore.row_of(opened, cls)
    rows = [explore.scaled(row, name, number, which, factor) for factor in [1.0, *factors]]
    x0 = explore.starting_noise(opened.experiment, cls, count, seed)
    first, *images = explore.images_of_rows(opened, rows, x0, solver)
    return labelled_strip(opened, [f"× {factor:g}" for factor in factors], images, first)


def mix_strip(
    opened: OpenRun, first: int, second: int, shares: Sequence[float], count: int, solver: Solver, seed: int
) -> Markup:
    """Images from mixtures of two classes' numbers, all from the first class's noise."""
    one, other = explore.row_of(opened, first), explore.row_of(opened, second)
    rows = [one] + [explore.mixed(one, other, share) for share in shares]
    x0 = explore.starting_noise(opened.experiment, first, count, seed)
    start, *images = explore.images_of_rows(opened, rows, x0, solver)
    names = [f"{1 - s:.0%} {opened.known[first]} + {s:.0%} {opened.known[second]}" for s in shares]
    return labelled_strip(opened, names, images, start)


def unet_picture(layers: Sequence[Layer], values: dict[int, float], title: str, chosen: int | None = None) -> Markup:
    """The U-Net's convolutions, left to right as they run and lower the coarser they work, coloured by a value.

    Dashed lines are the skip connections between equal resolutions; grey convolutions are not adapted.
    """
    sizes = sorted({layer.size for layer in layers}, reverse=True)
    wide = max(16.0, min(30.0, 900 / len(layers)))
    drop, top, left = 62, 46, 40
    low, high = (min(values.values()), max(values.values())) if values else (0, 1)
    parts = [svg_text(left, 18, title, size=13, weight="bold")]
    for level, size in enumerate(sizes):
        y = top + level * drop
        xs = [left + layer.index * wide for layer in layers if layer.size == size]
        parts.append(svg_text(left - 8, y + 20, f"{size}²", "end", 11))
        parts.append(
            f'<line x1="{xs[0] + wide / 2:.1f}" x2="{xs[-1] + wide / 2:.1f}" y1="{y + 16}" y2="{y + 16}" '
            f'stroke="{GREY}" stroke-dasharray="2 4"/>'
        )
    for layer in layers:
        y, x = top + sizes.index(layer.size) * drop, left + layer.index * wide
        value = values.get(layer.index)
        colour = "#9a9a9a"
        if value is not None:
            r, g, b = markup.coloured(np.array([[value]]), low, high, "viridis")[0, 0]
            colour = f"#{r:02x}{g:02x}{b:02x}"
        small = 6 if layer.kernel == 1 else 0
        words = (
            f"{layer.index}: {layer.name}, {layer.inputs} → {layer.outputs} channels, {layer.kernel} × {layer.kernel}"
        )
        words += f", {value:.3g}" if value is not None else ", not adapted"
        edge = ORANGE if layer.index == chosen else "none"
        parts.append(svg_box(x + 1, y + small, wide - 3, 32 - 2 * small, colour, words, edge))
        if wide >= 20 or layer.index % 5 == 0 or layer.index == chosen:
            parts.append(svg_text(x + wide / 2 - 0.5, y + 46, str(layer.index), "middle", 10))
    bottom = top + len(sizes) * drop + 8
    if values:
        ramp = markup.coloured(np.linspace(low, high, 64)[None], low, high, "viridis")
        parts.append(svg_image(left, bottom, 160, 10, ramp))
        parts.append(svg_text(left + 168, bottom + 10, f"{low:.3g} to {high:.3g}; grey: not adapted", size=11))
    for part in ("encoder", "middle", "decoder"):
        inside = [layer.index for layer in layers if layer.part == part]
        x = left + (inside[0] + inside[-1] + 1) / 2 * wide
        parts.append(svg_text(x, 36, part, "middle", 11))
    return Markup(markup.svg(left + len(layers) * wide + 10, bottom + 18, parts, title))


def layer_heatmap(opened: OpenRun, measure: str, cls: str = "", chosen: int | None = None) -> Markup:
    """``unet_picture`` of a run: the mean over classes of a measure, or one class (by name)."""
    frame = explore.layer_values(opened, measure)
    values = (frame.loc[cls] if cls else frame.mean()).to_dict()
    title = f"{measure}, {f'class {cls}' if cls else 'mean over the classes after task 1'}"
    return unet_picture(explore.unet_layers(opened.experiment), values, title, chosen)


def layer_spectra(opened: OpenRun, layer: int, classes: Sequence[int]) -> plots.Drawing:
    """What classes learned for a layer: ponderations, frequencies or exponents, and the singular values of F."""
    figure, axes = plots.drawing(9.6, 2.9, 1, 3)
    ponderation, frequency, spectrum = axes[0]
    for i, cls in enumerate(classes):
        numbers = explore.layer_numbers(opened, cls, layer)
        style = {"color": plots.COLOURS[i % len(plots.COLOURS)], "label": opened.known[cls], "markersize": 3}
        if opened.experiment.method in FUNCTIONAL_METHODS:
            view = explore.function_view(opened.experiment.method, numbers, opened.experiment.ratio)
            spectrum.semilogy(range(1, len(view.singular) + 1), view.singular.clamp_min(1e-12), "-", **style)
        for axis, names in ((ponderation, ("ponderation",)), (frequency, ("frequency", "exponent"))):
            for name in names:
                if name in numbers:
                    axis.plot(range(1, len(numbers[name]) + 1), numbers[name], "o-", **style)
    ponderation.set(title="ponderations", xlabel="function")
    frequency.set(title="frequencies or exponents", xlabel="function")
    spectrum.set(title="singular values of F", xlabel="number")
    if spectrum.lines:
        spectrum.legend(frameon=False, fontsize=7, ncols=2, title="class", title_fontsize=7)
    return figure
