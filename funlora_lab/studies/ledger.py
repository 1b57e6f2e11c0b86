"""The parameter ledger: what a class costs, counted from the modules and set beside what the paper prints.

PPC: the numbers learned for one class, its label embedding not among them (the paper counts those with the base).
Nothing is trained or loaded: networks on PyTorch's meta device have shapes and no memory.
"""

from collections.abc import Iterator

import pandas as pd
import torch

from funlora_lab.adapters import LABEL, METHODS, Adapters
from funlora_lab.continual import class_files
from funlora_lab.experiment import Experiment
from funlora_lab.presets import preset
from funlora_lab.studies import published
from funlora_lab.systems import meta_unet

RANK_TWO = {"extra_rank": (48, 50)}  # of Table II: two layers of 768 numbers; the paper does not say which have rank 2
CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "folder": 100}  # of each data set; a folder: ImageNet100


def printed() -> Iterator[tuple[str, str, str, str, str, dict | None]]:
    """(table, row, preset, measure, number as printed, settings that lead to it; None: unknown) of the paper."""
    for window, number in published.WINDOWS.items():
        yield "I", f"layers {window}", "cifar100", "PPC", number, {"method": "vanilla-mul", "window": window}
    for i, window in enumerate(("0-64", "40-54"), 1):
        for method, row in published.FUNCTIONS.items():
            settings = {"method": method, "window": window} | (RANK_TWO if "vanilla" in method else {})
            yield "II", f"{row[0]}, layers {window}", "cifar100", "PPC", row[i], settings
    for ratio, number in published.RATIOS.items():
        yield "IV", f"ratio {ratio}", "cifar100", "PPC", number, {"ratio": ratio}
        yield "IV", f"ratio {ratio}, storage", "cifar100", "images", published.RATIO_IMAGES[ratio], {"ratio": ratio}
    for i, name in enumerate(published.TOTALS, 1):
        for method, row in published.METHODS.items():
            yield "V", row[0], name, "PPC", row[i], {"method": method}
    for name, number in published.TOTALS.items():
        yield "VI", "base, embeddings and adapters together", name, "total", number, {}
    for number in published.SUPPLEMENT:
        yield "supplement", "base pre-trained on COCO", "cifar100", "PPC", number, None


def parameters_per_class(experiment: Experiment) -> int:
    return sum(value.numel() for value in Adapters(meta_unet(experiment), experiment).neutral().values())


def total_parameters(experiment: Experiment) -> int:
    """After the last task: base, one label embedding a class, a row a class after task 1, and task 1's shared row."""
    net, classes, first = meta_unet(experiment), CLASSES[experiment.data], int(experiment.split.split("-")[0])
    base = sum(value.numel() for name, value in net.named_parameters() if name != "label_emb.weight")
    return base + net.embedding * classes + (classes - first + 1) * parameters_per_class(experiment)


def class_file_bytes(experiment: Experiment) -> int:
    """Bytes of one class as `funlora export` writes it."""
    adapters = Adapters(meta_unet(experiment), experiment)
    label = {LABEL: torch.zeros(adapters.net.embedding)} if adapters.learns_label else {}
    return len(class_files.content(adapters, adapters.neutral() | label, "0" * 64, 0, "class"))


def verdict(number: str, ours: int | None) -> str:
    """equal: ours, rounded to as many digits as are printed, is what is printed; differs; open: ours is unknown."""
    if ours is None:
        return "open"
    unit, digits = {"K": 1e3, "M": 1e6}.get(number[-1], 1), number.rstrip("KM")
    return "equal" if f"{ours / unit:.{len(digits.partition('.')[2])}f}" == digits else "differs"


def of_paper() -> pd.DataFrame:
    """Every printed number of Tables I, II, IV, V and VI beside ours, with the verdict and a class file's bytes."""
    lines, columns = [], ["table", "row", "preset", "measure", "ours", "paper", "verdict", "class_file_bytes"]
    for table, row, name, measure, number, settings in printed():
        ours = size = None
        if settings is not None:
            e = preset(name).but(**settings)
            ours = total_parameters(e) if measure == "total" else parameters_per_class(e)
            ours = round(4 * ours / (3 * 32 * 32)) if measure == "images" else ours  # bytes of float32, and of an image
            size = class_file_bytes(e) if measure == "PPC" else None
        lines.append((table, row, name, measure, ours, number, verdict(number, ours), size))
    return pd.DataFrame(lines, columns=columns).astype({"ours": "Int64", "class_file_bytes": "Int64"})


def of_preset(name: str) -> pd.DataFrame:
    """Every method that learns a class as a row of numbers, at a preset's settings; LabError for no preset."""
    lines = []
    for method, made in METHODS.items():
        e = preset(name).but(method=method)
        sizes = parameters_per_class(e), total_parameters(e), class_file_bytes(e)
        lines.append((method, len(Adapters(meta_unet(e), e).layers), *sizes, made.about))
    return pd.DataFrame(lines, columns=["method", "layers", "PPC", "total", "class_file_bytes", "adapts"])


def text(table: pd.DataFrame) -> str:
    """The table for a terminal: numbers with thousands separators, unknown ones as a dash."""
    columns = []
    for name, values in table.items():
        words = [name, *(v if isinstance(v, str) else "-" if pd.isna(v) else f"{v:,}" for v in values)]
        side = ">" if pd.api.types.is_numeric_dtype(values) else "<"
        columns.append([f"{word:{side}{max(map(len, words))}}" for word in words])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
