"""Class-incremental learning as a generator of named events (Algorithm 1 of the paper).

For every task: the generator learns the new classes, draws the samples of every class seen so far, a classifier is
trained from scratch (on real images at task 1, afterwards on samples alone), and it is scored on real test images of
all classes seen. The command, the notebooks and the widgets print and draw from the events; the loop knows none of
them.

Events (each a dictionary with ``event``): ``run``, ``loss``, ``samples``, ``certificate``, ``accuracy``, ``result``.
Those read back from disk instead of computed now carry ``replayed``. ``accuracy`` comes after every task, with the
recognition of every class seen and the seconds that the task's training, sampling and classifier took.
"""

import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from funlora_lab import __version__, data, metrics
from funlora_lab import classifier as classifiers
from funlora_lab.certificate import certify
from funlora_lab.config import Experiment
from funlora_lab.data import Dataset, Images, to_floats
from funlora_lab.disk import clear_leftovers, locked, make_folder
from funlora_lab.errors import LabError
from funlora_lab.flow import flow_loss
from funlora_lab.generators import generator_of
from funlora_lab.sampling import draw
from funlora_lab.speed import arithmetic, autocast, sent
from funlora_lab.store import Run, Stage, Store
from funlora_lab.streams import Shuffle, stream
from funlora_lab.training import Event, Plan, Runtime, fit
from funlora_lab.work import Source, Work, sample_stage


def provenance(device: torch.device, dataset: Dataset, precision: str) -> dict:
    """Where, in which arithmetic, with what and from which images a result was made."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    packages = ("torch", "torchvision", "torchdiffeq", "numpy")
    return {
        "device": f"{device.type} ({name})",
        "arithmetic": arithmetic(precision, device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"funlora-lab": __version__} | {package: version(package) for package in packages},
        "data": {"name": dataset.name, "fingerprint": dataset.fingerprint, "pictures": dataset.pictures},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def pick_device(word: str) -> torch.device:
    """auto, cpu, cuda or cuda:N; raises LabError when it is not there."""
    if word == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(word)
    except RuntimeError:
        raise LabError(f"device={word}: accepted is auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise LabError(f"device={word}: accepted is auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise LabError(f"device={word}: no CUDA device is available here; accepted is auto or cpu.")
    return device


def train_classifier(work: Work, classes: list[int], images: Images, origin: dict) -> Iterator[Event]:
    """Train a classifier of ``classes`` from scratch on ``images`` and let it label the real test images.

    Returns (network, predicted classes of the test images of ``classes``, their true classes). ``origin`` says in the
    stage's key where the images come from.
    """
    e = work.experiment
    stage = work.store.stage(
        "classifier",
        origin=origin,
        classes=classes,
        seed=e.seed,
        flip=e.flip,
        precision=e.precision,
        data=work.dataset.fingerprint,
        settings=e.select("classifier", "crop", "image_size", "channels"),
    )
    net = work.runtime.laid_out(classifiers.build(e, len(classes), len(classes)))
    yield from work.ready(stage, lambda: _fit_classifier(work, stage, net, classes, images))
    tensors, facts = stage.result()
    predicted, true = tensors.pop("predicted"), tensors.pop("true")
    net.load_state_dict(tensors)
    work.seconds[stage.key] = facts["seconds"]
    return net.eval(), predicted, true


def _fit_classifier(work: Work, stage: Stage, net, classes: list[int], images: Images) -> Iterator[Event]:
    e, device = work.experiment, work.runtime.device
    position = torch.full((max(classes) + 1,), -1)
    position[torch.tensor(classes)] = torch.arange(len(classes))
    local = Images(images.pixels.to(device), position[images.labels].to(device))
    batch = min(e.classifier_batch, len(images))
    steps = e.classifier_epochs * -(-len(images) // batch)
    shuffle = Shuffle(len(images), e.seed, "classifier order", len(classes))
    parameters = dict(net.named_parameters())
    optimizer = torch.optim.SGD(
        parameters.values(),
        lr=e.classifier_lr,
        momentum=e.classifier_momentum,
        weight_decay=e.classifier_weight_decay,
        nesterov=e.classifier_momentum > 0,
    )

    def loss_at(step: int) -> Tensor:
        net.train()
        order = sent(shuffle.batch(step, batch), device)
        with autocast(e.precision, device):
            return classifiers.classifier_loss(net, e, local, order, step, "classifier", len(classes))[None]

    plan = Plan(steps, batch, e.classifier_lr, "one-cycle", log_every=e.log_every)
    labels = [{"stage": "classifier", "classes": len(classes)}]
    _, facts = yield from fit(
        stage, plan, optimizer, parameters, loss_at, work.runtime, labels, buffers=dict(net.named_buffers())
    )
    test = work.dataset.test.of(classes)
    predicted = torch.tensor(classes)[classifiers.predict(net, test.pixels)]
    stage.finish(dict(net.state_dict()) | {"predicted": predicted, "true": test.labels}, **facts)


def held_out_loss(work: Work, source: Source, cls: int, draws: int = 8) -> float | None:
    """Flow-matching loss on the held-out images of a class, with ``draws`` fixed noises and times an image."""
    images = work.dataset.valid.of(cls)
    if not len(images):
        return None
    device, velocity = work.runtime.device, source.velocity()
    losses = []
    for k in range(draws):
        generator = stream(0, "held out", cls, k)
        x1 = to_floats(images.pixels)
        x0 = torch.randn(x1.shape, generator=generator)
        t = (torch.rand(len(x1), generator=generator) + torch.arange(len(x1))) / len(x1)  # one in every slice of [0, 1]
        with torch.no_grad():
            losses.append(flow_loss(velocity, x1.to(device), x0.to(device), t.to(device)).mean().item())
    return mean(losses)


def run(experiment: Experiment, runtime: Runtime | None = None, home: Path | None = None) -> Iterator[Event]:
    """Run an experiment, or the rest of it, or read back its stored events when it is complete.

    Raises LabError for bad configurations before anything is written, and Stopped when the runtime asks for it.
    """
    runtime = runtime or Runtime()
    record = Run.of(experiment, home)
    record.check()
    if stored := record.results():
        data.check_unchanged(experiment, stored)
        yield from _stored(record)
        return
    dataset = data.load(experiment, home)
    tasks = data.tasks(experiment, len(dataset.classes))
    work = Work(experiment, dataset, tasks, Store(record.folder.parent), runtime)
    learner = generator_of(work)
    if learner is not None:
        learner.check()
    about = provenance(runtime.device, dataset, experiment.precision)
    make_folder(record.folder)
    with locked(record.folder, runtime.check, runtime.tell):
        if not record.results():  # else another process finished it while this one waited
            clear_leftovers(record.folder)
            record.open(about)
            for event in _run(work, learner):
                kept = {key: value for key, value in event.items() if key != "replayed"}
                if event["event"] != "result":
                    record.log(kept)
                    yield event
                else:
                    results = kept | {"provenance": about}
                    record.log(results)
                    record.finish(results)
            yield record.results()
            return
    yield from _stored(record)


def _stored(record: Run) -> Iterator[Event]:
    """The events of a finished run as they were logged, marked as replayed."""
    for event in record.events():
        yield {**event, "replayed": True}


def _run(work: Work, learner) -> Iterator[Event]:
    e, dataset, tasks = work.experiment, work.dataset, work.tasks
    yield {
        "event": "run",
        "preset": e.preset,
        "method": e.method,
        "seed": e.seed,
        "classes": list(dataset.classes),
        "tasks": tasks,
    }
    everything = [cls for classes in tasks for cls in classes]
    judge, *upper = yield from train_classifier(work, everything, dataset.train.of(everything), {"real": everything})
    work.seconds.clear()  # the judge is not part of the method: its training is not part of the cost

    matrix: list[list[float] | None] = []  # None after tasks that are not scored
    samples: dict[int, Tensor] = {}
    recognised: dict[int, float] = {}
    predicted, true = upper
    for k, new in enumerate(tasks):
        seen = everything[: sum(map(len, tasks[: k + 1]))]
        clock = [work.total_seconds]
        if learner is not None:
            yield from learner.learn(k)
        last = k == len(tasks) - 1
        if not last and e.score_after != "every":
            matrix.append(None)
            continue
        clock.append(work.total_seconds)
        if learner is not None:
            for cls in seen:
                samples[cls] = yield from _draw(work, learner.source(cls), cls)
                recognised[cls] = _recognised(judge, everything, samples[cls], cls)
        if e.score_after == "none":
            matrix.append(None)
            break
        clock.append(work.total_seconds)
        if learner is not None:
            folders = {cls: sample_stage(work, learner.source(cls), cls).folder.name for cls in seen}
            yield certify(work, learner, k, {cls: (folders[cls], samples[cls]) for cls in seen})
        if k == 0 or learner is None:
            images, origin = dataset.train.of(seen), {"real": seen}
        else:
            images, origin = synthetic(work, {cls: learner.source(cls) for cls in seen}, samples)
        _, predicted, true = yield from train_classifier(work, seen, images, origin)
        clock.append(work.total_seconds)
        matrix.append(accuracy_per_task(predicted, true, tasks[: k + 1]))
        yield {
            "event": "accuracy",
            "task": k + 1,
            "of": len(tasks),
            "classes": new,
            "per_task": matrix[-1],
            "average": mean(matrix[-1]),
            "recognition": {str(cls): value for cls, value in recognised.items()},
            "seconds": {
                name: round(after - before, 3)
                for name, before, after in zip(("train", "sample", "classify"), clock[:-1], clock[1:], strict=True)
            },
        }

    new_classes = everything[len(tasks[0]) :]
    losses = {cls: held_out_loss(work, learner.source(cls), cls) for cls in everything} if learner is not None else {}
    known = [losses[cls] for cls in new_classes if losses.get(cls) is not None]
    if not matrix[-1]:
        predicted, true = predicted[:0], true[:0]
    confusion = torch.zeros(len(dataset.classes), len(dataset.classes), dtype=torch.long)
    confusion.index_put_((true, predicted), torch.ones_like(true), accumulate=True)
    yield {
        "event": "result",
        "preset": e.preset,
        "method": e.method,
        "seed": e.seed,
        "LA": metrics.last_accuracy(matrix),  # None when not scored
        "AIA": metrics.average_incremental_accuracy(matrix),  # None unless scored after every task
        "PPC": learner.parameters_per_class if learner else 0,
        "recognition": mean(recognised[cls] for cls in new_classes) if recognised else None,
        "flow_loss": mean(known) if known else None,
        "seconds": work.total_seconds,
        "accuracy": matrix,
        "recognition_per_class": {str(cls): value for cls, value in recognised.items()},
        "flow_loss_per_class": {str(cls): value for cls, value in losses.items()},
        "upper_bound_real": (upper[0] == upper[1]).float().mean().item(),
        "confusion": confusion.tolist(),
    }


def synthetic(work: Work, sources: dict[int, Source], samples: dict[int, Tensor]) -> tuple[Images, dict]:
    """(samples of several classes as one training set, what a classifier's key says of their origin)."""
    images = Images(
        torch.cat([samples[cls] for cls in sources]),
        torch.cat([torch.full((len(samples[cls]),), cls) for cls in sources]),
    )
    keys = {str(cls): sample_stage(work, source, cls).key for cls, source in sources.items()}
    return images, {"samples": keys, "count": work.experiment.samples_per_class}


def accuracy_per_task(predicted: Tensor, true: Tensor, tasks: list[list[int]]) -> list[float]:
    """a_{k,j} of Eq. 22: accuracy on the test images of each task's classes, among all classes seen."""
    correct = predicted == true
    return [correct[torch.isin(true, torch.tensor(task))].float().mean().item() for task in tasks]


def _draw(work: Work, source: Source, cls: int) -> Iterator[Event]:
    stage = sample_stage(work, source, cls)
    count = work.experiment.samples_per_class
    images, work.seconds[stage.key] = yield from draw(stage, source.velocity, work.experiment, cls, count, work.runtime)
    return images


def _recognised(judge, order: list[int], samples: Tensor, cls: int) -> float:
    """Share of a class's samples that the classifier trained on real images takes for that class."""
    return (torch.tensor(order)[classifiers.predict(judge, samples)] == cls).float().mean().item()
