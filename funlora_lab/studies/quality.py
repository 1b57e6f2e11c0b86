"""How good samples are: Frechet and kernel distance, precision and recall, and nearest real neighbours.

The measures take features of any extractor, in float64: N real images, M drawn ones, D features each. A run reports
them on "classifier features", the last hidden layer of its own real-data classifier: such numbers compare runs of one
experiment; they are not FID and not comparable with published ones (fidelity.py makes those).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from funlora_lab import __version__
from funlora_lab.continual import OpenRun
from funlora_lab.data import to_floats
from funlora_lab.errors import LabError
from funlora_lab.seeds import stream
from funlora_lab.store import key_of, read_json, write_json
from funlora_lab.studies import neighbours, plots
from funlora_lab.systems import sample_artefact

NEIGHBOURS = 3  # k of precision and recall, as in Kynkaanniemi et al. 2019 and torch-fidelity
MEASURES = ("Frechet", "kernel", "precision", "recall")


def _factor(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean (D,), R) of features (N, D) with R^T R = the unbiased covariance, without ever forming it."""
    mean = x.double().mean(0)
    centred = (x - mean) / (len(x) - 1) ** 0.5
    return mean, torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred


def frechet(real: Tensor, drawn: Tensor) -> float:
    """Frechet distance between the Gaussians fitted to features (N, D) and (M, D) (Dowson & Landau 1982).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); the root's trace is the sum of singular values of R1 R2^T, S = R^T R.
    """
    (m1, R1), (m2, R2) = _factor(real), _factor(drawn)
    cross = torch.linalg.svdvals(R1 @ R2.T).sum()
    return max(0.0, ((m1 - m2).square().sum() + R1.square().sum() + R2.square().sum() - 2 * cross).item())


def kernel_distance(real: Tensor, drawn: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018): of equal sets 0 on average."""
    x, y = real.double(), drawn.double()
    N, M, D = len(x), len(y), x.shape[1]

    def total(a: Tensor, b: Tensor) -> Tensor:
        return sum(((part @ b.T / D + 1) ** 3).sum() for part in a.split(max(1, neighbours.BLOCK // len(b))))

    own_x, own_y = (((a.square().sum(1) / D + 1) ** 3).sum() for a in (x, y))  # an image with itself does not count
    apart = (total(x, x) - own_x) / (N * (N - 1)) + (total(y, y) - own_y) / (M * (M - 1))
    return (apart - 2 * total(x, y) / (N * M)).item()


def precision_recall(real: Tensor, drawn: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall of features (N, D) and (M, D) (Kynkaanniemi et al. 2019).

    Precision: the share of drawn images inside the real manifold, the union of balls around each real image that
    reach its k-th neighbour. Recall: the share of real images inside the manifold of the drawn ones.
    """
    if min(len(real), len(drawn)) <= k:
        raise LabError(f"Precision and recall need more than {k} images on each side: here {len(real)}, {len(drawn)}.")
    around_real, around_drawn = (neighbours.nearest(x, x, k)[0][:, -1] for x in (real, drawn))
    inside = neighbours.within(drawn, real, around_real), neighbours.within(real, drawn, around_drawn)
    return inside[0].double().mean().item(), inside[1].double().mean().item()


def measure(real: Tensor, drawn: Tensor) -> dict[str, float]:
    values = (frechet(real, drawn), kernel_distance(real, drawn), *precision_recall(real, drawn))
    return dict(zip(MEASURES, values, strict=True))


def halvings(real: Tensor, drawn: Tensor, draws: int, seed: int, told: Callable = lambda *_: None) -> Iterator[tuple]:
    """``draws`` times a random half of the real features (N, D), the other half, and as many drawn ones (M, D).

    ``told`` is given (halves done, ``draws``) whenever one is done with.
    Their spread estimates the standard error of a value for the whole set: the variance of a mean over half of N, given
    the N, is that of the mean over all N. Drawing with replacement would make copies, which break neighbourhoods.
    """
    size = min(len(real) // 2, len(drawn))
    for number in range(draws):
        generator = stream(seed, "halving", number)
        order, picked = (torch.randperm(len(x), generator=generator) for x in (real, drawn))
        yield real[order[:size]], real[order[size : 2 * size]], drawn[picked[:size]]
        told(number + 1, draws)


def interval(values: list[float]) -> dict[str, float]:
    """Mean of resampled values, and the interval that holds their middle 95 %."""
    low, high = np.quantile(values, [0.025, 0.975])
    return {"value": float(np.mean(values)), "low": float(low), "high": float(high)}


def compare(real: Tensor, drawn: Tensor, draws: int = 50, seed: int = 0, told: Callable = lambda *_: None):
    """Measures of samples, and of other real images as the floor, against half of the real ones: all in sets of n."""
    halves, lines = halvings(real, drawn, draws, seed, told), []
    pairs = [(measure(half, picked), measure(half, other)) for half, other, picked in halves]
    for of, values in zip(("samples", "real"), zip(*pairs, strict=True), strict=True):
        lines += [{"of": of, "measure": name} | interval([each[name] for each in values]) for name in MEASURES]
    return pd.DataFrame(lines).assign(n=min(len(real) // 2, len(drawn)))


def by_group(run: OpenRun, extract: Callable, split: str, count: int | None = None) -> Iterator[tuple]:
    """(name, ``extract`` of real images (N, D), of ``count`` samples a class (M, D)) of all, each task, each class.

    The features lie on the run's device.
    """
    if split not in ("train", "test"):
        raise LabError(f"split={split}: accepted is train or test.")
    if not run.generator.draws:
        raise LabError(f"The method {run.experiment.method} draws no samples: there is nothing to judge.")
    images, order, device = getattr(run.context.dataset, split), run.order, run.runtime.device
    real = {cls: extract(images.of(cls).pixels).to(device) for cls in order}
    drawn = {cls: extract(run.samples(cls, count)).to(device) for cls in order}
    groups = {"all": order} | {f"task {k}": classes for k, classes in enumerate(run.remaining, 1) if classes}
    for name, classes in (groups | {f"class {run.classes[cls]}": [cls] for cls in order}).items():
        yield name, torch.cat([real[cls] for cls in classes]), torch.cat([drawn[cls] for cls in classes])


@torch.no_grad()
def features(net: nn.Module, pixels: Tensor, batch: int = 500) -> Tensor:
    """What the last linear layer sees of each uint8 image (N, C, H, W) -> (N, D) in float64, on the CPU."""
    net.eval()
    device = next(net.parameters()).device
    last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    seen: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].double().cpu()))
    try:
        for part in pixels.split(batch):
            net(to_floats(part.to(device)))
    finally:
        hook.remove()
    return torch.cat(seen)


def kept(folder: Path) -> dict[str, list[dict]]:
    """Every table of quality in a run's folder, as lines; none where the file is missing or damaged."""
    with suppress(LabError):
        return read_json(folder / "quality.json") if (folder / "quality.json").exists() else {}
    return {}


def stored(run: OpenRun, about: dict, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """A table of a run's quality: from ``quality.json`` in its folder, or made, and kept there.

    It is known by ``about`` and by the samples it judges; a run that draws nothing is left to ``make`` to refuse.
    """
    known = kept(run.run.folder)
    keys = {cls: sample_artefact(run.context, run.source(cls), cls).key for cls in run.known}
    key = key_of({"version": __version__, "data": run.context.dataset.fingerprint, "samples": keys} | about)
    if key not in known:
        known[key] = make().to_dict("records")
        with suppress(LabError):  # a run in a folder that may only be read is judged all the same
            write_json(run.run.folder / "quality.json", known)
    return pd.DataFrame(known[key])


def telling(run: OpenRun, name: str) -> Callable[[int, int], None]:
    """What reports the halves done of one group of classes as events of the run."""
    begun = time.monotonic()

    def told(done: int, of: int) -> None:
        seconds = time.monotonic() - begun
        run.runtime.report({"event": "quality", "group": name, "done": done, "of": of, "seconds": seconds})

    return told


def classifier_quality(run: OpenRun, draws: int = 50, split: str = "train") -> pd.DataFrame:
    """``compare`` for every group of classes, on classifier features: they know split train (``unseen``), not test."""

    def make() -> pd.DataFrame:
        groups, seed = by_group(run, lambda pixels: features(run.judge, pixels), split), run.experiment.seed
        tables = {name: compare(x, y, draws, seed, telling(run, name)) for name, x, y in groups}
        return pd.concat(tables, names=["group"]).droplevel(1).reset_index().assign(**about)

    about = {"features": "classifier features", "split": split}
    return stored(run, about | {"draws": draws}, make)


def unseen(run: OpenRun, draws: int = 50) -> pd.DataFrame:
    """``compare`` with real test images in place of samples, of all classes: what no generator can be asked to beat."""
    train, test = (features(run.judge, part.pixels) for part in (run.context.dataset.train, run.context.dataset.test))
    return compare(train, test, draws, run.experiment.seed).replace({"of": {"samples": "test"}})


def decay(run: OpenRun, draws: int = 50) -> pd.DataFrame:
    """``compare`` for the classes of task 1 as they are drawn after every task: what retraining does to old classes."""
    first, tables = run.tasks[0], []
    real = features(run.judge, torch.cat([run.context.dataset.train.of(cls).pixels for cls in first]))
    for task in range(1, len(run.tasks) + 1):
        samples = run.samples_after(task)
        drawn = features(run.judge, torch.cat([samples[cls] for cls in first]))
        tables.append(compare(real, drawn, draws, run.experiment.seed).assign(task=task))
    return pd.concat(tables, ignore_index=True)


def nearest(real: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """(root mean square distance in grey levels (M,), index (M,)) of the real image nearest to each drawn one."""
    distance, index = neighbours.nearest(drawn.flatten(1), real.flatten(1))
    return distance[:, 0] / drawn[0].numel() ** 0.5, index[:, 0]


def memorisation(train: Tensor, test: Tensor, drawn: Tensor) -> dict[str, float]:
    """How near samples lie to training images (median), measured by how near unseen real images lie to them.

    nearer: the share nearer than the median unseen image, half for fresh real ones, all for a memory; copies: at zero.
    """
    (to_train, _), (fresh, _) = nearest(train, drawn), nearest(train, test)
    samples, unseen = to_train.median().item(), fresh.median().item()
    nearer, copies = (to_train < unseen).double().mean().item(), (to_train == 0).double().mean().item()
    return {"samples": samples, "unseen": unseen, "nearer": nearer, "copies": copies}


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """A table for reading: a line a group and protocol, a column a measure, each value with its interval."""
    texts = [f"{row.value:.3g} ({row.low:.3g} to {row.high:.3g})" for row in table.itertuples()]
    keys = [name for name in table.columns if name not in ("measure", "value", "low", "high")]
    return table.assign(text=texts).pivot_table("text", keys, "measure", "first", sort=False).rename_axis(columns=None)


def plot_bars(tables: dict[str, pd.DataFrame], groups: Sequence[str]) -> plots.Drawing:
    """A panel a measure, a group of classes a line: one point with its interval a source, real halves as the floor."""
    first = next(iter(tables.values()))
    sources = {"other real images": first[first["of"] == "real"]}
    sources |= {name: table[table["of"] == "samples"] for name, table in tables.items()}
    figure, axes = plots.drawing(11.5, 0.75 * len(groups) + 1.3, 1, len(MEASURES), sharey=True)
    for axis, measure in zip(axes[0], MEASURES, strict=True):
        for i, (name, table) in enumerate(sources.items()):
            part = table[table["measure"] == measure].set_index("group").loc[list(groups)]
            rows = np.arange(len(groups)) + 0.56 * (i / (len(sources) - 1) - 0.5)
            look = plots.style(i, 5, label=name, ls="none") | {"color": plots.COLOURS[i - 1] if i else plots.GREY}
            axis.errorbar(part["value"], rows, xerr=(part[["low", "high"]].T - part["value"]).abs(), **look)
        axis.set_title(
            f"{measure} ({'higher' if measure in ('precision', 'recall') else 'lower'} is better)", fontsize=9
        )
        axis.locator_params(axis="x", nbins=4)
        axis.grid(axis="y", visible=False)
    axes[0, 0].set(yticks=range(len(groups)), yticklabels=groups, ylim=(len(groups) - 0.5, -0.5))
    plots.legend(figure, "outside lower center", fontsize=8, ncols=len(sources))
    return figure


def plot_neighbours(rows: Sequence[tuple[str, Tensor, Tensor, Sequence[float]]]) -> plots.Drawing:
    """A line a class: samples (top) above their nearest training images (bottom), with the distance in grey levels."""
    count, (H, W) = len(rows[0][1]), rows[0][1].shape[2:]
    figure, axes = plots.drawing(0.46 * count + 1.2, 1.16 * len(rows) * H / W + 0.3, len(rows), 1)
    for (name, drawn, real, distance), axis in zip(rows, axes[:, 0], strict=True):
        plots.show_images(axis, torch.cat([drawn, real]), count, [f"{name}: sample", "nearest"], fontsize=7)
        axis.set_xticks([i * (W + 1) + (W - 1) / 2 for i in range(count)], [f"{d:.0f}" for d in distance], fontsize=7)
    return figure


def plot_recognition(tables: dict[str, pd.DataFrame]) -> plots.Drawing:
    """A heatmap a method: recognition of every class (rows) after every task (columns), blank before it is learned."""
    least = min(table.min(axis=None) for table in tables.values())
    size = 3.2 * len(tables) + 1.3, 0.29 * max(map(len, tables.values())) + 1.1
    figure, axes = plots.heatmaps(tables, *size, unit="share recognised", vmin=least, vmax=1)
    for axis in axes:
        axis.set_xlabel("after task")
        axis.tick_params("y", labelleft=axis is axes[0])
    axes[0].set_ylabel("class")
    return figure


def plot_decay(tables: dict[str, pd.DataFrame], measure: str) -> plots.Drawing:
    """A measure of the classes of task 1 after every task, one line a method; other real images as the floor."""
    figure, axis = plots.chart(6.4, 3.2, "after task", f"{measure} distance, classes of task 1")
    for i, (name, table) in enumerate(tables.items()):
        part, floor = (table[(table["measure"] == measure) & (table["of"] == kind)] for kind in ("samples", "real"))
        look = plots.style(i, 6, capsize=3, label=name)
        axis.errorbar(part["task"], part["value"], (part[["low", "high"]].T - part["value"]).abs(), **look)
    axis.plot(floor["task"], floor["value"], color=plots.GREY, linestyle=":", label="other real images")
    axis.set(xticks=list(floor["task"]), ylim=(0, None))
    axis.legend(frameon=False, fontsize=8)
    return figure
