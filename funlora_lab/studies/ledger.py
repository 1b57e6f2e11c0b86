"""The parameter ledger: what a class costs, counted from the modules and set beside what the paper prints.

PPC: the numbers learned for one class, its label embedding not among them (the paper counts those with the base).
Nothing is trained or loaded: the networks are built on PyTorch's meta device, which has shapes and no memory.

``PRINTED`` holds the paper's numbers and nothing else; every other number is computed here.
"""

from dataclasses import dataclass, field
from functools import cache

import pandas as pd
import torch

from funlora_lab import classfiles
from funlora_lab.adapters import METHODS, Adapters
from funlora_lab.config import Experiment
from funlora_lab.network import build_unet
from funlora_lab.presets import PRESETS, preset
from funlora_lab.unet import UNet

FULL_WINDOW = {"window": "0-64"}
RANK_TWO = {"extra_rank": (48, 50)}  # two layers of 768 numbers: the paper does not say which have rank 2
CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "folder": 100}  # of each data set; a folder: ImageNet100
COLOUR_IMAGE = 3 * 32 * 32  # bytes of one CIFAR image


@dataclass(frozen=True)
class Printed:
    """One number of the paper, as printed: where it stands, and the settings that lead to it (none: unknown)."""

    table: str
    row: str
    preset: str
    number: str
    settings: dict | None = field(default_factory=dict)
    measure: str = "PPC"  # PPC | images (of float32 storage) | total


def _table_1() -> list[Printed]:
    numbers = {
        "0-64": "34.054K",
        "5-54": "29.440K",
        "15-44": "18.432K",
        "15-54": "24.832K",
        "25-44": "13.312K",
        "25-54": "19.712K",
        "35-54": "13.056K",
        "40-54": "9.728K",
        "45-54": "6.400K",
        "40-49": "6.656K",
        "45-49": "3.328K",
    }
    return [
        Printed("I", f"layers {window}", "cifar100", number, {"method": "vanilla-mul", "window": window})
        for window, number in numbers.items()
    ]


def _table_2() -> list[Printed]:
    rows = []
    for window, vanilla, frozen, learned in (
        (FULL_WINDOW, "35.59K", "34.70K", "35.35K"),
        ({}, "11.26K", "9.88K", "10.03K"),
    ):
        where = "layers 0-64" if window else "layers 40-54"
        for name, number, settings in (
            ("vanilla add, rank 1 and 2", vanilla, {"method": "vanilla-add"} | RANK_TWO),
            ("vanilla mul, rank 1 and 2", vanilla, {"method": "vanilla-mul"} | RANK_TWO),
            ("right shift", frozen, {"method": "shift"}),
            ("cosine, frozen", frozen, {"method": "cosine-frozen"}),
            ("cosine, learned", learned, {"method": "funlora"}),
            ("power, frozen", frozen, {"method": "power-frozen"}),
            ("power, learned", learned, {"method": "power"}),
        ):
            rows.append(Printed("II", f"{name}, {where}", "cifar100", number, settings | window))
    return rows


def _table_4() -> list[Printed]:
    numbers = {1: ("10.03K", "13"), 2: ("5.284K", "7"), 4: ("2.732K", "4"), 8: ("1.516K", "2"), 16: ("0.908K", "1")}
    rows = []
    for ratio, (parameters, images) in numbers.items():
        rows.append(Printed("IV", f"ratio {ratio}", "cifar100", parameters, {"ratio": ratio}))
        rows.append(Printed("IV", f"ratio {ratio}, storage", "cifar100", images, {"ratio": ratio}, "images"))
    return rows


def _table_5() -> list[Printed]:
    columns = {
        "label-embedding": ("vanilla conditioning only", "0.0K", "0.0K", "0.0K"),
        "scale-shift": ("scale and shift", "11.78K", "11.78K", "16.13K"),
        "lora-attention": ("LoRA attention layers", "18.43K", "18.43K", "75.26K"),
        "lora-conv-v1": ("LoRA Conv2d v1", "12.29K", "12.29K", "14.98K"),
        "lora-conv-v2": ("LoRA Conv2d v2", "10.75K", "10.75K", "14.21K"),
        "funlora": ("FunLoRA", "10.03K", "10.03K", "13.65K"),
    }
    return [
        Printed("V", row, name, numbers[place], {"method": method})
        for place, name in enumerate(("cifar10", "cifar100", "imagenet100"))
        for method, (row, *numbers) in columns.items()
    ]


PRINTED: list[Printed] = [
    *_table_1(),
    *_table_2(),
    *_table_4(),
    *_table_5(),
    *(
        Printed("VI", "base, embeddings and adapters together", name, number, {}, "total")
        for name, number in (("cifar10", "35.84M"), ("cifar100", "36.61M"), ("imagenet100", "90.69M"))
    ),
    *(Printed("supplement", "base pre-trained on COCO", "cifar100", number, None) for number in ("2.474K", "3.6K")),
]


@cache
def _network(name: str) -> UNet:
    with torch.device("meta"):
        return build_unet(PRESETS[name], int(PRESETS[name].split.split("-")[0]))


def parameters_per_class(experiment: Experiment) -> int:
    """Numbers learned for one class beside its label embedding, by the modules of the experiment's preset."""
    adapters = Adapters(_network(experiment.preset), experiment)
    return sum(value.numel() for value in adapters.neutral().values())


def total_parameters(experiment: Experiment) -> int:
    """After the last task: base, one label embedding a class, a row a class after task 1, and task 1's shared row."""
    net, classes = _network(experiment.preset), CLASSES[experiment.data]
    base = sum(value.numel() for name, value in net.named_parameters() if name != "label_emb.weight")
    new = classes - int(experiment.split.split("-")[0])
    return base + net.embedding * classes + (new + 1) * parameters_per_class(experiment)


def class_file_bytes(experiment: Experiment) -> int:
    """Bytes of one class as `funlora export` writes it."""
    adapters = Adapters(_network(experiment.preset), experiment)
    row = adapters.neutral()
    if adapters.learns_label:
        row[classfiles.LABEL] = torch.zeros(adapters.net.embedding)
    return len(classfiles.content(adapters, row, "0" * 64, 0, "class"))


def _verdict(printed: str, ours: int | None) -> str:
    """equal: ours, rounded to as many digits as are printed, is what is printed; differs; open: ours is unknown."""
    if ours is None:
        return "open"
    unit = {"K": 1e3, "M": 1e6}.get(printed[-1], 1)
    digits = printed.rstrip("KM")
    return "equal" if f"{ours / unit:.{len(digits.partition('.')[2])}f}" == digits else "differs"


def of_paper() -> pd.DataFrame:
    """Every printed number of Tables I, II, IV, V and VI beside ours, with the verdict and a class file's bytes."""
    lines = []
    for printed in PRINTED:
        ours = size = None
        if printed.settings is not None:
            experiment = preset(printed.preset).but(**printed.settings)
            numbers = parameters_per_class(experiment)
            size = class_file_bytes(experiment) if printed.measure == "PPC" else None
            images = round(4 * numbers / COLOUR_IMAGE)
            ours = {"PPC": numbers, "images": images, "total": total_parameters(experiment)}[printed.measure]
        lines.append(
            {
                "table": printed.table,
                "row": printed.row,
                "preset": printed.preset,
                "measure": printed.measure,
                "ours": ours,
                "paper": printed.number,
                "verdict": _verdict(printed.number, ours),
                "class_file_bytes": size,
            }
        )
    return pd.DataFrame(lines).astype({"ours": "Int64", "class_file_bytes": "Int64"})


def of_preset(name: str) -> pd.DataFrame:
    """Every method that learns a class as a row of numbers, at a preset's settings; LabError for no preset."""
    chosen, lines = preset(name), []
    for method, made in METHODS.items():
        experiment = chosen.but(method=method)
        lines.append(
            {
                "method": method,
                "layers": len(made.layers(_network(name), experiment)),
                "PPC": parameters_per_class(experiment),
                "total": total_parameters(experiment),
                "class_file_bytes": class_file_bytes(experiment),
                "adapts": made.about,
            }
        )
    return pd.DataFrame(lines)


def text(table: pd.DataFrame) -> str:
    """The table for a terminal: numbers with thousands separators, unknown ones as a dash."""

    def word(value) -> str:
        return value if isinstance(value, str) else "-" if pd.isna(value) else f"{value:,}"

    shown = table.map(word).astype(str)
    words = [name for name in table if table[name].map(lambda v: isinstance(v, str)).all()]
    widths = {name: max(len(name), *shown[name].map(len)) for name in shown}
    lines = [dict.fromkeys(shown, "") | {name: name for name in shown}, *shown.to_dict("records")]
    return "\n".join(
        "  ".join(f"{line[n]:<{widths[n]}}" if n in words else f"{line[n]:>{widths[n]}}" for n in shown).rstrip()
        for line in lines
    )
