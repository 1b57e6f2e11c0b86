"""Class-incremental learning (Algorithm 1 of the paper).

For every task: the generator learns the new classes, draws the samples of every class seen so far, a classifier is
trained from scratch (on real images at task 1, afterwards on samples alone), and it is scored on real test images. All
is reported as events, dictionaries with ``event``: ``run``, ``loss``, ``samples``, ``certificate``, ``accuracy`` (after
every task), ``result``. Those read back from disk carry ``replayed``.
"""

import platform
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import torch

from funlora_lab import __version__
from funlora_lab.continual import scores
from funlora_lab.continual.certificate import certify
from funlora_lab.continual.classifier import predict, synthetic, train_classifier
from funlora_lab.data import Dataset, check_unchanged, load, tasks
from funlora_lab.errors import Absent, LabError
from funlora_lab.experiment import Experiment
from funlora_lab.store import Run, clear_leftovers, fingerprint, locked
from funlora_lab.systems import Context, Generator, check_method, draw, generator_of, sample_artefact, solver_of
from funlora_lab.training import Event, Report, Runtime, convolutions_in
from funlora_lab.unet import read_checkpoint


def provenance(device: torch.device, dataset: Dataset, experiment: Experiment) -> dict:
    """Where, in which arithmetic, with what and from which images and weights, by their content, a result was made."""
    data = {"name": dataset.name, "fingerprint": dataset.fingerprint, "unlabelled": dataset.unlabelled_fingerprint}
    weights = {"base_weights": fingerprint(read_checkpoint(place))[:16]} if (place := experiment.base_weights) else {}
    name = f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    packages = ("torch", "torchvision", "torchdiffeq", "numpy")
    return {
        "device": f"{device.type} ({name})",
        "arithmetic": convolutions_in(experiment.precision, device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"funlora-lab": __version__} | {package: version(package) for package in packages},
        "data": {name: value for name, value in data.items() if value},
        **weights,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def prepare(
    experiment: Experiment, runtime: Runtime, home: Path | None = None, read_only: bool = False
) -> tuple[Context, Generator]:
    """(context, generator that has learned nothing) of an experiment; LabError when anything does not fit."""
    check_method(experiment.method)
    solver_of(experiment)
    dataset = runtime.dataset or load(experiment, home, runtime.check)
    store = runtime.store or runtime.team.store(Run.of(experiment, home).folder.parent)
    context = Context(experiment, dataset, tasks(experiment, len(dataset.classes)), store, runtime, read_only)
    generator = generator_of(context)
    generator.check()
    return context, generator


def run(
    experiment: Experiment, report: Report | None = None, runtime: Runtime | None = None, home: Path | None = None
) -> dict:
    """Run an experiment, or the rest of it, or read back its stored events when it is complete -> its results.

    Every event goes to ``report`` (by default the runtime's). Raises LabError for bad configurations before anything
    is written, for images or ``base_weights`` that are no longer those a stored result was made of, and Stopped when
    the runtime asks for it.
    """
    runtime, record = runtime or Runtime(), Run.of(experiment, home)
    report = report or runtime.report
    record.check()
    if stored := record.results():
        _check_unchanged(experiment, stored["provenance"], home, runtime)
        return record.replay(report)

    def log_and_report(event: Event) -> None:
        record.log({key: value for key, value in event.items() if key != "replayed"})
        report(event)

    context, generator = prepare(experiment, replace(runtime, report=log_and_report), home)
    about = provenance(runtime.device, context.dataset, experiment)
    with locked(record.folder, runtime.check, runtime.tell):
        if not record.results():  # else another process finished it while this one waited
            clear_leftovers(record.folder)
            record.open(about)
            results = _run(context, generator) | {"provenance": about}
            record.log(results)
            record.finish(results)
            report(record.results())
            return record.results()
    return record.replay(report)


def learn_base(experiment: Experiment, runtime: Runtime, home: Path | None = None) -> None:
    """Train the network of task 1 alone, in all processes of the runtime's team, of which only the first one writes."""
    record, first = Run.of(experiment, home), runtime.team.rank == 0
    record.check()
    context, generator = prepare(experiment, runtime, home)
    with locked(record.folder, runtime.check, runtime.tell) if first else nullcontext():
        if first and not record.config_file.exists():
            record.open(provenance(runtime.device, context.dataset, experiment))
        generator.learn(0)


def _check_unchanged(experiment: Experiment, made: dict, home: Path | None, runtime: Runtime) -> None:
    """Raise LabError when what the experiment names by a place is no longer what a run was made of.

    What is not there any more is not compared: results outlive it.
    """
    with suppress(Absent):
        check_unchanged(experiment, made["data"], home, runtime.check)
    if (file := experiment.base_weights) and "base_weights" in made and Path(file).exists():
        if fingerprint(read_checkpoint(file))[:16] != made["base_weights"]:
            raise LabError(f"base_weights={file}: the weights there have changed since this run was made with them.")


def _run(context: Context, generator: Generator) -> dict:
    e, dataset, order, report = context.experiment, context.dataset, context.classes, context.runtime.report
    about = {"preset": e.preset, "method": e.method, "seed": e.seed}
    report({"event": "run", **about, "classes": list(dataset.classes), "tasks": context.tasks})
    matrix: list[list[float] | None] = []  # None after tasks that are not scored
    own: list[float] = []  # averages of the system's own classifier, where it has one
    samples, recognised, judged = {}, {}, {}
    predicted = true = torch.empty(0, dtype=torch.long)
    for k, new in enumerate(context.tasks):
        done, seen, clock = context.tasks[: k + 1], order[: sum(map(len, context.tasks[: k + 1]))], []
        clock.append(context.total_seconds)
        generator.learn(k)
        if k == 0:  # the judge is not part of the method: its training is not part of the cost
            spent = dict(context.seconds)
            judge, *real = train_classifier(context, order)
            context.seconds = spent
        if e.score_after != "every" and k < len(context.tasks) - 1:
            matrix.append(None)
            continue
        clock.append(context.total_seconds)
        sources = {cls: generator.source(cls) for cls in seen} if generator.draws else {}
        artefacts = {cls: sample_artefact(context, source, cls) for cls, source in sources.items()}
        for cls, source in sources.items():
            samples[cls], context.seconds[artefacts[cls].key] = draw(context, source, cls, e.samples_per_class)
            if judged.get(cls) != (key := artefacts[cls].key):  # else its samples are those of the task before
                judged[cls], recognised[cls] = key, scores.recognition(judge, order, samples[cls], cls)
        if e.score_after == "none":
            matrix.append(None)
            break
        clock.append(context.total_seconds)
        if sources:
            report(certify(context, generator, k, {cls: (artefacts[cls].name, samples[cls]) for cls in seen}))
        given = synthetic(context, sources, samples) if sources and k else ()  # else real images
        _, predicted, true = train_classifier(context, seen, *given)
        if logits := generator.classifier(seen):
            answers = torch.tensor(seen)[predict(logits, dataset.test.of(seen).pixels, context.runtime.device)]
            own.append(mean(scores.accuracy_per_task(answers, true, done)))
        clock.append(context.total_seconds)
        matrix.append(scores.accuracy_per_task(predicted, true, done))
        spent = zip(("train", "sample", "classify"), clock[:-1], clock[1:], strict=True)
        report(
            {"event": "accuracy", "task": k + 1, "of": len(context.tasks), "classes": new, "per_task": matrix[-1]}
            | {"average": mean(matrix[-1])}
            | ({"own_average": own[-1]} if logits else {})
            | {"recognition": {str(cls): value for cls, value in recognised.items()}}
            | {"seconds": {name: round(after - before, 3) for name, before, after in spent}}
        )

    later = order[len(context.tasks[0]) :]
    losses = {cls: scores.held_out_loss(context, generator.source(cls), cls) for cls in order if generator.draws}
    known = [losses[cls] for cls in later if losses.get(cls) is not None]
    confusion = torch.zeros(len(order), len(order), dtype=torch.long)
    confusion.index_put_((true, predicted), torch.ones_like(true), accumulate=True)
    return {
        "event": "result",
        **about,
        **dict(zip(("LA", "AIA"), scores.last_and_incremental(matrix), strict=True)),  # None when not scored
        **({"own_LA": own[-1], "own_AIA": mean(own) if len(own) == len(matrix) else None} if own else {}),
        "PPC": generator.parameters_per_class,
        "recognition": mean(recognised[cls] for cls in later) if recognised else None,
        "flow_loss": mean(known) if known else None,
        "seconds": context.total_seconds,
        "accuracy": matrix,
        "recognition_per_class": {str(cls): value for cls, value in recognised.items()},
        "flow_loss_per_class": {str(cls): value for cls, value in losses.items()},
        "upper_bound_real": (real[0] == real[1]).float().mean().item(),
        "confusion": confusion.tolist(),
    }
