"""How good samples are: Frechet and kernel distance, precision and recall, and nearest real neighbours.

The measures take features of any extractor, in float64. What a run reports without further downloads is computed on
the last hidden layer of its own real-data classifier: "classifier features". Such numbers compare runs of one
experiment with each other; they are not FID, and are not comparable with published ones (fidelity.py makes those).

Letters: N real images, M drawn images, D features an image, k neighbours.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from funlora_lab import classifier
from funlora_lab.errors import LabError
from funlora_lab.opened import OpenRun
from funlora_lab.streams import stream

NEIGHBOURS = 3  # k of precision and recall, as in Kynkaanniemi et al. 2019 and torch-fidelity


def _factor(features: Tensor) -> tuple[Tensor, Tensor]:
    """(mean (D,), R) with R^T R = the unbiased covariance, without ever forming it."""
    features = features.double()
    mean = features.mean(0)
    centred = (features - mean) / (len(features) - 1) ** 0.5
    return mean, torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred


def frechet(real: Tensor, drawn: Tensor) -> float:
    """Frechet distance between the Gaussians fitted to features (N, D) and (M, D) (Dowson & Landau 1982).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), where the last trace is the sum of the singular values of R1 R2^T for
    S = R^T R: no square root of a nearly singular matrix, nothing negative or complex to discard.
    """
    (m1, R1), (m2, R2) = _factor(real), _factor(drawn)
    cross = torch.linalg.svdvals(R1 @ R2.T).sum()
    return max(0.0, ((m1 - m2).square().sum() + R1.square().sum() + R2.square().sum() - 2 * cross).item())


def kernel_distance(real: Tensor, drawn: Tensor) -> float:
    """Unbiased squared MMD of features (N, D) and (M, D) with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018).

    Zero on average for two sets of one distribution, so a single value may be below zero.
    """
    x, y = real.double(), drawn.double()
    N, M, D = len(x), len(y), x.shape[1]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / D + 1) ** 3

    xx, yy = kernel(x, x), kernel(y, y)
    within = (xx.sum() - xx.trace()) / (N * (N - 1)) + (yy.sum() - yy.trace()) / (M * (M - 1))
    return (within - 2 * kernel(x, y).mean()).item()


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances between rows, computed from differences -> (len(a), len(b)) in float64."""
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")


def precision_recall(real: Tensor, drawn: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall of features (N, D) and (M, D) (Kynkaanniemi et al. 2019).

    Precision: the share of drawn images inside the real manifold, the union of balls around each real image that
    reach its k-th neighbour. Recall: the share of real images inside the manifold of the drawn ones.
    """
    if min(len(real), len(drawn)) <= k:
        raise LabError(f"Precision and recall need more than {k} images on each side: here {len(real)}, {len(drawn)}.")

    def radii(x: Tensor) -> Tensor:
        return distances(x, x).kthvalue(k + 1, dim=1).values  # the nearest is the image itself

    between = distances(real, drawn)  # (N, M)
    precision = (between <= radii(real)[:, None]).any(0).double().mean().item()
    recall = (between <= radii(drawn)[None, :]).any(1).double().mean().item()
    return precision, recall


MEASURES = ("Frechet", "kernel", "precision", "recall")


def measure(real: Tensor, drawn: Tensor) -> dict[str, float]:
    """All four measures of features (N, D) and (M, D)."""
    precision, recall = precision_recall(real, drawn)
    values = (frechet(real, drawn), kernel_distance(real, drawn), precision, recall)
    return dict(zip(MEASURES, values, strict=True))


class Halving(NamedTuple):
    """Half of the real images, the other half, and as many drawn ones: three sets of one size."""

    reference: Tensor
    other: Tensor
    drawn: Tensor


def halvings(real: Tensor, drawn: Tensor, draws: int, seed: int) -> Iterator[Halving]:
    """``draws`` random halvings, without replacement, of features (N, D) and (M, D).

    Resampling with replacement would put copies beside each other, which breaks neighbourhoods and shrinks
    covariances. The spread over random halves instead estimates the standard error of the value for the whole set:
    the variance of a mean over half of N, given the N, is that of the mean over all N.
    """
    size = min(len(real) // 2, len(drawn))
    for number in range(draws):
        generator = stream(seed, "halving", number)
        order = torch.randperm(len(real), generator=generator)
        picked = torch.randperm(len(drawn), generator=generator)[:size]
        yield Halving(real[order[:size]], real[order[size : 2 * size]], drawn[picked])


def spread(values: list[float]) -> dict[str, float]:
    """Mean, and the interval that holds the middle 95 % of resampled values."""
    ordered = torch.tensor(values, dtype=torch.float64)
    low, high = ordered.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": ordered.mean().item(), "low": low, "high": high}


def compare(real: Tensor, drawn: Tensor, draws: int = 50, seed: int = 0) -> pd.DataFrame:
    """Measures of drawn images, and of other real ones as the floor, against half of the real ones.

    One line a measure and kind (``samples``, ``real``): value (mean over random halvings), low, high, n images a side.
    Both kinds use sets of the same size n, since Frechet distance, precision and recall all depend on it.
    """
    results = {(kind, name): [] for kind in ("samples", "real") for name in MEASURES}
    n = 0
    for half in halvings(real, drawn, draws, seed):
        n = len(half.reference)
        for kind, images in (("samples", half.drawn), ("real", half.other)):
            for name, value in measure(half.reference, images).items():
                results[kind, name].append(value)
    return pd.DataFrame(
        [{"of": kind, "measure": name, **spread(values), "n": n} for (kind, name), values in results.items()]
    )


def groups(opened: OpenRun) -> dict[str, list[int]]:
    """Name -> classes: all of them, those of each task, each alone."""
    tasks, names = opened.tasks, opened.classes
    everything = [cls for classes in tasks for cls in classes]
    by_task = {f"task {k}": classes for k, classes in enumerate(tasks, 1)}
    return {"all": everything} | by_task | {f"class {names[cls]}": [cls] for cls in everything}


def images_of(opened: OpenRun, split: str, count: int | None = None) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """(real images of ``split``, samples), each class -> uint8 images; ``count`` samples a class."""
    if split not in ("train", "test"):
        raise LabError(f"split={split}: accepted is train or test.")
    if opened.learner is None:
        raise LabError(f"The method {opened.experiment.method} draws no samples: there is nothing to judge.")
    everything = groups(opened)["all"]
    real = {cls: getattr(opened.work.dataset, split).of(cls).pixels for cls in everything}
    return real, {cls: opened.samples(cls, count) for cls in everything}


def joined(features: dict[int, Tensor], classes: list[int]) -> Tensor:
    return torch.cat([features[cls] for cls in classes])


def classifier_quality(opened: OpenRun, draws: int = 50, split: str = "train") -> pd.DataFrame:
    """``compare`` on classifier features for every group of classes, which the column ``group`` names.

    The classifier has seen the images of split train, so unseen real images too lie at some distance from them
    (``unseen`` measures it); split test is free of that, with fewer images.
    """
    real, drawn = images_of(opened, split)
    real, drawn = (
        {cls: classifier.features(opened.judge, images) for cls, images in part.items()} for part in (real, drawn)
    )
    tables = []
    for group, classes in groups(opened).items():
        table = compare(joined(real, classes), joined(drawn, classes), draws, opened.experiment.seed)
        tables.append(table.assign(group=group))
    columns = ["group", "of", "measure", "value", "low", "high", "n"]
    return pd.concat(tables, ignore_index=True)[columns].assign(features="classifier features", split=split)


def unseen(opened: OpenRun, draws: int = 50) -> pd.DataFrame:
    """``compare`` with real test images in place of samples, of all classes: what no generator can be asked to beat."""
    dataset = opened.work.dataset
    train, test = (classifier.features(opened.judge, part.pixels) for part in (dataset.train, dataset.test))
    return compare(train, test, draws, opened.experiment.seed).replace({"of": {"samples": "test"}})


def decay(opened: OpenRun, draws: int = 50, split: str = "train") -> pd.DataFrame:
    """``compare`` for the classes of task 1 as they are drawn after every task: what retraining does to old classes."""
    first = opened.tasks[0]
    real = torch.cat([getattr(opened.work.dataset, split).of(cls).pixels for cls in first])
    real, tables = classifier.features(opened.judge, real), []
    for task in range(1, len(opened.tasks) + 1):
        samples = opened.samples_after(task)
        drawn = classifier.features(opened.judge, torch.cat([samples[cls] for cls in first]))
        tables.append(compare(real, drawn, draws, opened.experiment.seed).assign(task=task))
    return pd.concat(tables, ignore_index=True)


def nearest(real: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """(distance, index) of the nearest of real images (N, ...) to each drawn image (M, ...) -> (M,), (M,).

    Distance is the root mean square over pixels, in grey levels of 0-255.
    """
    flat = [images.flatten(1).double() for images in (drawn, real)]
    distance, index = distances(*flat).min(1)
    return distance / flat[0].shape[1] ** 0.5, index


def memorisation(train: Tensor, test: Tensor, drawn: Tensor) -> dict[str, float]:
    """How near samples lie to training images, measured by how near unseen real images lie to them.

    ``nearer`` is the share of samples that are nearer to a training image than the median unseen image is: one half
    for samples like fresh real images, one for a memory. ``copies`` is the share at distance zero.
    """
    to_train, _ = nearest(train, drawn)
    unseen, _ = nearest(train, test)
    return {
        "samples": to_train.median().item(),
        "unseen": unseen.median().item(),
        "nearer": (to_train < unseen.median()).double().mean().item(),
        "copies": (to_train == 0).double().mean().item(),
    }


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """A table for reading: a line a group and protocol, a column a measure, each value with its interval."""
    shown = table.assign(
        text=[f"{row.value:.3g} ({row.low:.3g} to {row.high:.3g})" for row in table.itertuples()],
    )
    keys = [name for name in table.columns if name not in ("measure", "value", "low", "high")]
    shown = shown.pivot(index=keys, columns="measure", values="text")[list(dict.fromkeys(table["measure"]))]
    return shown.loc[table[keys].drop_duplicates().itertuples(index=False, name=None)].rename_axis(columns=None)
