"""What a sampling budget buys: solver, steps and images a class against accuracy, time and network evaluations.

Samples are nested (the first n of a larger set are the set of n), so a sweep draws each image once, and every solver
starts from the same noise. LA needs the last task's classifier alone, one for every cell.
"""

from dataclasses import replace
from statistics import mean, stdev

import pandas as pd
from matplotlib.lines import Line2D

from funlora_lab.continual import OpenRun, scores, synthetic, train_classifier
from funlora_lab.errors import LabError
from funlora_lab.experiment import Experiment
from funlora_lab.flow import EVALUATIONS_A_STEP, SOLVERS, Solver
from funlora_lab.studies import plots, published
from funlora_lab.systems import draw, solver_of

# (samplers with a fixed grid, with a tolerance, few evaluations, many, multiples of the run's images a class)
TABLE_VII = ("rk4 2, rk4 3, rk4 4, rk4 5, rk4 6, rk4 10, rk4 20", "", "rk4 2", "rk4 20", "1, 2, 3, 4, 5, 6, 10")
SMALL = (
    "euler 1, euler 2, euler 4, midpoint 1, midpoint 2, midpoint 4, rk4 1, rk4 2, rk4 4",
    "dopri5 1e-1, dopri5 1e-2, dopri5 1e-4, dopri5-each 1e-1, dopri5-each 1e-2",
    "midpoint 1",
    "rk4 4",
    "0.1, 0.33, 1",
)


def grid(experiment: Experiment, *given: str) -> tuple[str, ...]:
    """What is given of a grid, and for what is empty the paper's own on its benchmark CIFAR100, elsewhere ``SMALL``."""
    own = TABLE_VII if experiment.preset.startswith("cifar100") else SMALL
    return tuple(text or default for text, default in zip(given, own, strict=True))


def samplers(text: str) -> list[dict]:
    """``"euler 4, dopri5 1e-3"`` -> the settings of each sampler once; raises LabError naming what it cannot read."""
    found = {}
    for words in (part.split() for part in text.split(",") if part.strip()):
        try:
            name, number = words
            kind, value = ("tolerance", float(number)) if Solver(name).adaptive else ("steps", int(number))
        except (ValueError, LabError):
            accepted = f"a solver ({', '.join(SOLVERS)}) with its steps or, for dopri5 and dopri5-each, its tolerance"
            example = "as in euler 4, dopri5 1e-3"
            raise LabError(f"'{' '.join(words)}' is not a sampler: accepted is {accepted}, {example}.") from None
        found[name, value] = {"solver": name, kind: value}
    return list(found.values())


def counts(text: str, run: OpenRun) -> list[int]:
    """``"0.1, 1"`` -> images a class, as multiples of the run's own number; raises LabError for one not above 0."""
    try:
        shares = [float(word) for word in text.split(",")]
    except ValueError:
        shares = [0]
    if min(shares) <= 0:
        raise LabError(f"multiples={text}: accepted are numbers above 0 joined by commas, such as 0.1, 1.")
    return sorted({max(1, round(share * run.experiment.samples_per_class)) for share in shares})


def score(run: OpenRun, repeats: int = 1, **changes) -> dict:
    """One cell: the run's generator sampled with other settings, and the last task's classifier trained on that.

    ``changes`` are settings of the experiment. LA is the mean of ``repeats`` classifiers, each with a seed of its own
    and the same images, ``spread`` the standard deviation (nan for one). Seconds are those of the first time.
    """
    e, events, samples, seconds = run.experiment.but(**changes), [], {}, {}
    context = replace(run.context, experiment=e, runtime=replace(run.runtime, report=events.append), seconds={})
    order, tasks = run.order, [task for task in run.remaining if task]
    sources = {cls: run.source(cls) for cls in order}
    for cls, source in sources.items():
        samples[cls], seconds[cls] = draw(context, source, cls, e.samples_per_class)
    used = e.samples_per_class / (-(-e.samples_per_class // e.chunk) * e.chunk)  # of a last chunk only a part
    evaluations = mean(event["evaluations"] for event in events)
    images, origin = synthetic(context, sources, samples)
    again = [replace(context, experiment=e.but(seed=e.seed + repeat)) for repeat in range(repeats)]
    answers = [train_classifier(each, order, images, origin)[1:] for each in again]  # (predicted, true)
    accuracies = [mean(scores.accuracy_per_task(*both, tasks)) for both in answers]
    solver, setting = solver_of(e).identity.values()
    cell = {"solver": solver, "setting": f"{setting:g}", "images": e.samples_per_class, "evaluations": evaluations}
    cell |= {"LA": mean(accuracies), "spread": stdev(accuracies) if repeats > 1 else float("nan")}
    cell["recognition"] = mean(
        scores.recognition(run.judge, context.classes, samples[cls], cls) for cls in order[len(run.tasks[0]) :]
    )
    cell["sampling seconds"] = used * sum(seconds.values())
    return cell | {"classifier seconds": context.total_seconds / repeats}


def sweep(run: OpenRun, samplers: list[dict], counts: list[int], repeats: int = 1) -> pd.DataFrame:
    """``score`` of every sampler with every number of images a class: one line a cell."""
    cells = [score(run, repeats, samples_per_class=n, **sampler) for sampler in samplers for n in sorted(counts)]
    table = pd.DataFrame(cells)
    return table.assign(**{"total evaluations": table["evaluations"] * table["images"]})  # for one class


def seconds(table: pd.DataFrame, own: int) -> pd.DataFrame:
    """Table VII's last row beside ours: seconds of sampling all classes, by multiple of the ``own`` images a class."""
    names, multiples = table["solver"] + " " + table["setting"], (table["images"] / own).map("x{:.2g}".format)
    ours = table.assign(name=names, multiple=multiples).pivot(
        index="name", columns="multiple", values="sampling seconds"
    )
    ours = ours.loc[names.unique(), multiples.unique()]
    theirs = pd.DataFrame({f"x{n}": {"published, CIFAR100": spent} for n, spent in published.BUDGET_SECONDS.items()})
    return pd.concat([theirs, ours.round(2)]).astype(object).fillna("")


def pareto(table: pd.DataFrame, cost: str, gain: str) -> pd.DataFrame:
    """The lines that no other beats in both: rising ``gain`` for rising ``cost``, cheapest first."""
    ordered = table.sort_values([cost, gain], ascending=[True, False])
    best = ordered[gain].cummax().shift(fill_value=float("-inf"))
    return ordered[ordered[gain] > best]


def plot_lines(table: pd.DataFrame, own: float) -> plots.Drawing:
    """LA against evaluations an image, one panel a number of images, one line a solver; dots: the run's ``own`` LA."""
    numbers = sorted(table["images"].unique())
    figure, axes = plots.drawing(2.6 * len(numbers) + 1.9, 3.1, 1, len(numbers), sharey=True)
    for axis, n in zip(axes[0], numbers, strict=True):
        for i, (solver, part) in enumerate(table[table["images"] == n].groupby("solver", sort=False)):
            part, look = part.sort_values("evaluations"), plots.style(i, 4, capsize=2, linewidth=1.2, label=solver)
            axis.errorbar(part["evaluations"], part["LA"], part["spread"], **look)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_title(f"{n} images a class", fontsize=10)
        axis.set_xlabel("evaluations an image")
        axis.axhline(own, color=plots.GREY, linewidth=0.9, linestyle=":")
    axes[0, 0].set_ylabel("LA after the last task")
    plots.legend(figure, "outside right center", fontsize=8)
    return figure


def plot_tables(table: pd.DataFrame) -> plots.Drawing:
    """Two heatmaps of LA in per cent: Table VII as published, and ours; rows images, columns the sampler."""
    theirs = published.BUDGET.add_prefix("x", axis=0)
    theirs.columns = [f"{steps}\n({EVALUATIONS_A_STEP['rk4'] * steps})" for steps in theirs]
    fixed = table[table["solver"].isin(EVALUATIONS_A_STEP)]
    names = fixed["solver"] + "\n" + fixed["setting"] + fixed["evaluations"].map(" ({:g})".format)
    ours = 100 * fixed.assign(name=names).pivot(index="images", columns="name", values="LA")[names.unique()]
    height = 0.34 * max(len(ours), len(theirs)) + 1.9
    both = {"paper, CIFAR100, RK4": theirs, "ours": ours}
    figure, axes = plots.heatmaps(both, 13, height, "{:.1f}", unit="LA, per cent")
    axes[0].set(xlabel="steps (evaluations an image)", ylabel="images drawn / real images")
    axes[1].set(xlabel="solver, its steps (evaluations an image)", ylabel="images drawn a class")
    axes[1].tick_params("x", labelsize=8)
    return figure


def plot_front(table: pd.DataFrame, front: pd.DataFrame, cost: str, gain: str, xlabel: str) -> plots.Drawing:
    """Every cell as a point, colour by solver and size by images; the front as a line, its settings numbered."""
    figure, axis = plots.chart(9.2, 4, xlabel, gain)
    for i, (solver, part) in enumerate(table.groupby("solver", sort=False)):
        size = 14 + 110 * part["images"] / table["images"].max()
        axis.scatter(part[cost], part[gain], size, color=plots.COLOURS[i], alpha=0.75, label=solver, linewidth=0)
    axis.plot(front[cost], front[gain], color=plots.INK, linewidth=0.9, drawstyle="steps-post")
    axis.set_xscale("log")
    settings = []
    for i, (_, cell) in enumerate(front.iterrows(), 1):
        axis.annotate(str(i), (cell[cost], cell[gain]), (0, 8), textcoords="offset points", ha="center", fontsize=8)
        label = f"{cell['solver']} {cell['setting']}, {cell['images']} images"
        settings.append(Line2D([], [], marker=f"${i}$", label=label, color=plots.INK, ls="none", markersize=5))
    plots.legend(figure, handles=settings, fontsize=8, title="front")
    for handle in plots.legend(figure, "outside right lower", fontsize=8, title="solver").legend_handles:
        handle.set_sizes([36])
    return figure
