"""The parameter ledger: what a class costs, counted from the modules and set beside what the paper prints.

PPC: the numbers learned for one class, in the ledger as in a run's results. A label embedding counts where it is
learned (vanilla conditioning, for which the paper prints 0.0K), and is counted with the base where it is not.
Nothing is trained or loaded: networks on PyTorch's meta device have shapes and no memory.
"""

from collections.abc import Iterator
from functools import cache

import pandas as pd
import torch

from funlora_lab.adapters import LABEL, METHODS, Adapters, Method, Row
from funlora_lab.continual import class_files
from funlora_lab.experiment import Experiment
from funlora_lab.presets import preset
from funlora_lab.studies import published
from funlora_lab.systems import meta_unet
from funlora_lab.unet import UNet

RANK_TWO = (48, 50)  # of Table II: two layers of 768 numbers; the paper does not say which have rank 2
FITTED = ("lora-conv-v1", "lora-conv-v2")  # whose windows were chosen so that the printed numbers come out
CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "folder": 100}  # of each data set; a folder: ImageNet100


def printed() -> Iterator[tuple[str, str, str, str, str, dict | None]]:
    """(table, row, preset, measure, number as printed, settings that lead to it; None: unknown) of the paper."""
    for window, number in published.WINDOWS.items():
        yield "I", f"layers {window}", "cifar100", "PPC", number, {"method": "vanilla-mul", "window": window}
    for i, window in enumerate(("0-64", "40-54"), 1):
        for name, row in published.FUNCTIONS.items():
            settings = {"method": row[0], "window": window} | ({"extra_rank": RANK_TWO} if "rank" in name else {})
            yield "II", f"{name}, layers {window}", "cifar100", "PPC", row[i], settings
    for ratio, number in published.RATIOS.items():
        yield "IV", f"ratio {ratio}", "cifar100", "PPC", number, {"ratio": ratio}
        yield "IV", f"ratio {ratio}, storage", "cifar100", "images", published.RATIO_IMAGES[ratio], {"ratio": ratio}
    for i, name in enumerate(published.TOTALS, 1):
        for method, row in published.METHODS.items():
            yield "V", row[0], name, "PPC", row[i], {"method": method}
    for name, number in published.TOTALS.items():
        yield "VI", "base, embeddings and adapters together", name, "total", number, {}
    yield "text", "80 new classes and task 1's row, of the base", "cifar100", "share", published.SHARE, {}
    for name, number in published.RIVALS.items():
        yield "text", "1,000 classes more: fewer than the rivals'", name, "more", number, {}
    for row, numbers in published.COCO.items():
        for name, number in zip(published.TOTALS, numbers, strict=True):
            yield "supplement", f"COCO, {row}", name, "PPC", number, {} if row == "FunLoRA" else None


def adapted(experiment: Experiment) -> tuple[Adapters, Row]:
    """The adapters of an experiment and the row that leaves its network as it is, made once."""
    return _adapted(experiment, METHODS[experiment.method])


@cache
def _adapted(experiment: Experiment, method: Method) -> tuple[Adapters, Row]:
    adapters = Adapters(meta_unet(experiment), experiment)
    return adapters, adapters.neutral()


def parameters_per_class(experiment: Experiment) -> int:
    return adapted(experiment)[0].parameters_per_class


def total_parameters(experiment: Experiment, more: int = 0) -> int:
    """After the last task and ``more`` classes: base, an embedding a class, a row a new class, task 1's shared row."""
    net, classes, first = meta_unet(experiment), CLASSES[experiment.data] + more, int(experiment.split.split("-")[0])
    row = sum(value.numel() for value in adapted(experiment)[1].values())
    return _base(net) + net.embedding * classes + (classes - first + 1) * row


def _base(net: UNet) -> int:
    return sum(value.numel() for name, value in net.named_parameters() if name != "label_emb.weight")


def _count(measure: str, e: Experiment) -> float:
    """What a measure of ``printed`` is for an experiment."""
    row = parameters_per_class(e)
    return {
        "PPC": lambda: row,
        "images": lambda: round(4 * row / (3 * 32 * 32)),  # bytes of float32, and of an image
        "total": lambda: total_parameters(e),
        "more": lambda: total_parameters(e, 1000),
        "share": lambda: round(100 * 81 * row / _base(meta_unet(e)), 2),
    }[measure]()


def class_file_bytes(experiment: Experiment) -> int:
    """Bytes of one class as `funlora export` writes it."""
    adapters, row = adapted(experiment)
    label = {LABEL: torch.zeros(adapters.net.embedding)} if adapters.learns_label else {}
    return len(class_files.content(adapters, row | label, "0" * 64, 0, "class"))


def verdict(number: str, ours: float | None, measure: str = "PPC", fitted: bool = False) -> str:
    """equal: ours, rounded to as many digits as are printed, is what is printed; fitted: equal by layers chosen to
    that end, which the paper does not name; below: less, as the text claims; differs; open: ours is unknown.
    """
    if ours is None:
        return "open"
    unit, digits = {"K": 1e3, "M": 1e6}.get(number[-1], 1), number.rstrip("KM%")
    if measure == "more":
        return "below" if ours < unit * float(digits) else "differs"
    same = f"{ours / unit:.{len(digits.partition('.')[2])}f}" == digits
    return ("fitted" if fitted else "equal") if same else "differs"


def of_paper() -> pd.DataFrame:
    """Every printed number of Tables I, II, IV, V and VI beside ours, with the verdict and a class file's bytes."""
    lines, columns = [], ["table", "row", "preset", "measure", "ours", "paper", "verdict", "class_file_bytes"]
    for table, row, name, measure, number, settings in printed():
        ours = size = None
        if settings is not None:
            e = preset(name).but(**settings)
            ours, size = _count(measure, e), class_file_bytes(e) if measure == "PPC" else None
        chosen = settings is not None and ("extra_rank" in settings or settings.get("method") in FITTED)
        lines.append((table, row, name, measure, ours, number, verdict(number, ours, measure, chosen), size))
    return pd.DataFrame(lines, columns=columns, dtype=object)


def of_preset(name: str) -> pd.DataFrame:
    """Every method that learns a class as a row of numbers, at a preset's settings; LabError for no preset."""
    lines = []
    for method, made in METHODS.items():
        e = preset(name).but(method=method)
        sizes = parameters_per_class(e), total_parameters(e), class_file_bytes(e)
        lines.append((method, len(adapted(e)[0].layers), *sizes, made.about))
    return pd.DataFrame(lines, columns=["method", "layers", "PPC", "total", "class_file_bytes", "adapts"])


def text(table: pd.DataFrame) -> str:
    """The table for a terminal: numbers with thousands separators, unknown ones as a dash."""
    columns = []
    for name, values in table.items():
        words = [name, *(v if isinstance(v, str) else "-" if pd.isna(v) else f"{v:,}" for v in values)]
        side = "<" if any(isinstance(v, str) for v in values) else ">"
        columns.append([f"{word:{side}{max(map(len, words))}}" for word in words])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
