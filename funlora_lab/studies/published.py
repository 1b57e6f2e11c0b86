"""Numbers printed by others, for the columns beside ours: never results of this program.

From the FunLoRA paper unless marked; LA in per cent. The paper's text calls the metric of Table VI AIA, but the values
that survive in it equal the LA column of the cost table: here they are read as LA. None: printed nowhere we know of.
"""

import pandas as pd

# Table IV: accuracy by operation, learned cosine
OPERATIONS = pd.DataFrame(
    {
        "CIFAR10": {"mul": 84.02, "mul-add": 83.98, "add": 18.76},
        "CIFAR100": {"mul": 60.07, "mul-add": 59.12, "add": 14.56},
    }
)

# Table VI; values with * are from a secondary page about the JDCL paper
SECONDARY = "*"
PRIOR_SYSTEMS = pd.DataFrame.from_dict(
    {
        "FunLoRA": ["84.02", "60.07", None, None, "35.84M / 36.61M / 90.69M"],
        "FunLoRA, 10x samples": [None, "67.89", None, None, "36.61M"],
        "JDCL": ["83.69", "47.95*", "29.04*", "54.53*", "52.4M / 52.4M / 295M"],
        "JDCL (fast)": ["78.10", None, None, None, "52.4M"],
        "GUIDE": ["64.47", "41.66*", "26.13*", "39.07*", "52.4M / 52.4M / 295M"],
        "DGR diffusion": ["59.00", "28.25*", "15.90*", "23.92*", "52.4M / 52.4M / 295M"],
        "DDGR": ["43.69", None, None, None, "52.4M / 52.4M / 295M"],
        "DiffClass (Stable Diffusion)": [None, "62.21", None, None, "983M"],
    },
    orient="index",
    columns=["CIFAR10 2-2", "CIFAR100 20-20", "CIFAR100 10-10", "ImageNet100 20-20", "parameters"],
)

# hours on one A100 or H100: training, sampling, classifier, total
COST = pd.DataFrame.from_dict(
    {
        "FunLoRA, CIFAR10": [3.5, 1.4, 0.2, 5.1],
        "FunLoRA, ImageNet100": [31.0, 16.8, 1.6, 49.4],
        "JDCL, CIFAR10": [None, None, None, 26.9],
        "JDCL (fast), CIFAR10": [None, None, None, 13.6],
        "GUIDE, CIFAR10": [None, None, None, 15.3],
        "DGR diffusion, CIFAR10": [None, None, None, 14.0],
        "DDGR, CIFAR10": [None, None, None, 20.6],
    },
    orient="index",
    columns=["training h", "sampling h", "classifier h", "total h"],
)

# images of 3 x 32 x 32 bytes that take as much room as a class in float32, by ratio
RATIO_IMAGES = {1: 13, 2: 7, 4: 4, 8: 2, 16: 1}

# largest rank of F after training, Fig. 4
RANKS = {"cosine": 15, "shift": 10, "power": 4}
