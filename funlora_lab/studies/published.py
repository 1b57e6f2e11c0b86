"""Every number printed by others, for the columns beside ours: never results of this program.

From the FunLoRA paper unless marked; LA in per cent, PPC and images of storage as printed. The paper's text calls the
metric of Table VI AIA; its surviving values equal the cost table's LA, so it is read as LA. None: printed nowhere.
"""

from collections.abc import Iterator

import pandas as pd

# Table I: PPC of vanilla mul by window of layers (CIFAR100)
WINDOWS = {
    "0-64": "34.054K", "5-54": "29.440K", "15-44": "18.432K", "15-54": "24.832K", "25-44": "13.312K",
    "25-54": "19.712K", "35-54": "13.056K", "40-54": "9.728K", "45-54": "6.400K", "40-49": "6.656K", "45-49": "3.328K",
}  # fmt: skip

# Table II: by the row's name, our method, and PPC in layers 0-64 and in layers 40-54 (CIFAR100)
FUNCTIONS = {
    "vanilla add, rank 1 and 2": ("vanilla-add", "35.59K", "11.26K"),
    "vanilla mul, rank 1 and 2": ("vanilla-mul", "35.59K", "11.26K"),
    "shift": ("shift", "34.70K", "9.88K"),
    "cosine, frozen": ("cosine-frozen", "34.70K", "9.88K"),
    "cosine, learned": ("funlora", "35.35K", "10.03K"),
    "power, frozen": ("power-frozen", "34.70K", "9.88K"),
    "power, learned": ("power", "35.35K", "10.03K"),
}
RANKS = {"cosine": 15, "shift": 10, "power": 4}  # Fig. 4: largest rank of F after training

# The two tables that the text calls IV: accuracy by operation, learned cosine; PPC by ratio, and how many images of
# 3 x 32 x 32 bytes that is
OPERATIONS = {
    "CIFAR10": {"mul": 84.02, "mul-add": 83.98, "add": 18.76},
    "CIFAR100": {"mul": 60.07, "mul-add": 59.12, "add": 14.56},
}
RATIOS = {1: "10.03K", 2: "5.284K", 4: "2.732K", 8: "1.516K", 16: "0.908K"}
RATIO_IMAGES = {1: "13", 2: "7", 4: "4", 8: "2", 16: "1"}

# Table V: by our method, the row's name, PPC on CIFAR10, CIFAR100 and ImageNet100
METHODS = {
    "label-embedding": ("vanilla conditioning only", "0.0K", "0.0K", "0.0K"),
    "scale-shift": ("scale and shift", "11.78K", "11.78K", "16.13K"),
    "lora-attention": ("LoRA attention layers", "18.43K", "18.43K", "75.26K"),
    "lora-conv-v1": ("LoRA Conv2d v1", "12.29K", "12.29K", "14.98K"),
    "lora-conv-v2": ("LoRA Conv2d v2", "10.75K", "10.75K", "14.21K"),
    "funlora": ("FunLoRA", "10.03K", "10.03K", "13.65K"),
}

BOUNDS = {"classifier-multitask": "classifier multitask", "generative-multitask": "generative multitask"}  # PPC "NA"

# Table VI: parameters of base, embeddings and adapters together
TOTALS = {"cifar10": "35.84M", "cifar100": "36.61M", "imagenet100": "90.69M"}
# supplement 6.4, PPC on CIFAR10, CIFAR100 and ImageNet100: the text lost the second row's name, and no whole number of
# functions fits it; the table of accuracies there keeps the totals above
COCO = {"FunLoRA": ("10.03K", "10.03K", "13.65K"), "a row whose name is lost": ("2.474K", "2.474K", "3.6K")}
# claims of the text: extra parameters of 80 classes in per cent of the base; the rivals' parameters, which 1000 classes
# more than the 100 do not reach
SHARE, RIVALS = "2.3%", {"cifar100": "52.4M", "imagenet100": "295M"}

# Table VI; values with * are from a secondary page about the JDCL paper
PRIOR_SYSTEMS = pd.DataFrame({
    "FunLoRA": ["84.02", "60.07", None, None, "35.84M / 36.61M / 90.69M"],
    "FunLoRA, 10x samples": [None, "67.89", None, None, "36.61M"],
    "JDCL": ["83.69", "47.95*", "29.04*", "54.53*", "52.4M / 52.4M / 295M"],
    "JDCL (fast)": ["78.10", None, None, None, "52.4M"],
    "GUIDE": ["64.47", "41.66*", "26.13*", "39.07*", "52.4M / 52.4M / 295M"],
    "DGR diffusion": ["59.00", "28.25*", "15.90*", "23.92*", "52.4M / 52.4M / 295M"],
    "DDGR": ["43.69", None, None, None, "52.4M / 52.4M / 295M"],
    "DiffClass (Stable Diffusion)": [None, "62.21", None, None, "983M"],
}, ["CIFAR10 2-2", "CIFAR100 20-20", "CIFAR100 10-10", "ImageNet100 20-20", "parameters"]).T  # fmt: skip

# Table VII: CIFAR100, 20 classes a task, RK4. LA by multiple of the real images; a column a number of steps. There the
# columns are headed "NFE"; a step of RK4 takes four evaluations, so 2 or 3 of them can only be steps.
BUDGET = pd.DataFrame({
    1: [56.27, 57.96, 58.79, 59.23, 58.72, 59.99, 59.42],
    2: [60.01, 62.81, 63.11, 63.73, 63.37, 63.34, 63.15],
    3: [61.61, 63.65, 64.91, 64.72, 64.82, 64.96, 65.14],
    4: [62.49, 65.04, 65.59, 65.87, 65.58, 65.45, 65.43],
    5: [63.00, 65.85, 66.25, 66.26, 66.73, 66.77, 66.34],
    6: [63.56, 65.92, 66.09, 66.47, 66.33, 66.40, 66.60],
    10: [64.79, 67.25, 67.90, 67.57, 68.00, 67.83, 67.63],
}, [2, 3, 4, 5, 6, 10, 20]).T  # fmt: skip
# its last row: seconds of sampling, proportional to the multiples though printed below the columns of steps
BUDGET_SECONDS = dict(zip(BUDGET.index, (115, 229, 344, 459, 576, 689, 1148), strict=True))

# hours on one A100 or H100
COST = pd.DataFrame({
    "FunLoRA, CIFAR10": [3.5, 1.4, 0.2, 5.1], "FunLoRA, ImageNet100": [31.0, 16.8, 1.6, 49.4],
    "JDCL, CIFAR10": [None, None, None, 26.9], "JDCL (fast), CIFAR10": [None, None, None, 13.6],
    "GUIDE, CIFAR10": [None, None, None, 15.3], "DGR diffusion, CIFAR10": [None, None, None, 14.0],
    "DDGR, CIFAR10": [None, None, None, 20.6],
}, ["training h", "sampling h", "classifier h", "total h"]).T  # fmt: skip

# supplement 6.3; the second group of columns lost its name and is presumably CIFAR100
QUALITY = pd.DataFrame({
    "DGR": ["49.56", "0.54", "0.34", "50.36", "0.48", "0.30"],
    "JDCL": ["32.12", "0.60", "0.43", "39.93", "0.71", "0.27"],
    "FunLoRA": ["14.17", "0.67", "0.41", "8.64", "0.71", "0.45"],
}, pd.MultiIndex.from_product([["CIFAR10", "CIFAR100 (presumably)"], ["FID", "precision", "recall"]])).T  # fmt: skip

BENCHMARKS = ("CIFAR10 2-2", "CIFAR100 20-20", "ImageNet100 20-20")  # the columns of Table V


def layout() -> Iterator[tuple[str, str, str, dict[str, str | None]]]:
    """(table, row, measure, column -> number as printed) of everything that the paper tabulates; None: lost."""
    lost, scores = {"CIFAR100": None}, ("LA", "AIA")
    for window, ppc in WINDOWS.items():
        yield from [("I", window, score, lost) for score in scores] + [("I", window, "PPC", {"CIFAR100": ppc})]
    for half, window in enumerate(("0-64", "40-54"), 1):
        for row, numbers in FUNCTIONS.items():
            measures = {"LA": None, "AIA": None, "PPC": numbers[half]}
            yield from [(f"II, layers {window}", row, measure, {"CIFAR100": n}) for measure, n in measures.items()]
    for row in OPERATIONS["CIFAR10"]:
        yield "IV, operations", row, "LA", {data: f"{column[row]:.2f}" for data, column in OPERATIONS.items()}
    for ratio, ppc in RATIOS.items():
        measures = {"LA": None, "AIA": None, "PPC": ppc, "images of storage": RATIO_IMAGES[ratio]}
        yield from [("IV, ratio", str(ratio), measure, {"CIFAR100": n}) for measure, n in measures.items()]
    for row in (*BOUNDS, *METHODS):
        for score in scores:
            yield "V", row, score, dict.fromkeys(BENCHMARKS)
        yield "V", row, "PPC", dict(zip(BENCHMARKS, METHODS[row][1:] if row in METHODS else ["NA"] * 3, strict=True))
    for row, numbers in PRIOR_SYSTEMS.iterrows():
        yield "VI", row, "LA", numbers.drop("parameters").to_dict()
        yield "VI", row, "parameters", {"all": numbers["parameters"]}
    for multiple, numbers in BUDGET.iterrows():
        yield "VII", f"x{multiple}", "LA", {f"NFE={steps}": f"{number:.2f}" for steps, number in numbers.items()}
        yield "VII", f"x{multiple}", "seconds", {"CIFAR100": str(BUDGET_SECONDS[multiple])}
    for row, hours in COST.iterrows():
        yield from [("supplement, cost", row, kind, {"hours": h and f"{h:g}"}) for kind, h in hours.items()]
    for row, numbers in QUALITY.iterrows():
        for measure in ("FID", "precision", "recall"):
            yield "supplement, quality", row, measure, numbers.xs(measure, level=1).to_dict()
    for row in ("FunLoRA", "FunLoRA, 10x samples", "FunLoRA, COCO", "FunLoRA, COCO, 10x samples"):  # names guessed
        yield "supplement, COCO", row, "LA", dict.fromkeys(PRIOR_SYSTEMS.columns.drop("parameters"))
        yield "supplement, COCO", row, "parameters", dict(zip(BENCHMARKS, TOTALS.values(), strict=True))
    for row, numbers in COCO.items():
        yield "supplement, COCO", row, "PPC", dict(zip(BENCHMARKS, numbers, strict=True))
