"""The stages of a run: what each needs and costs, and the function that makes one, or says what it lacks."""

from typing import NamedTuple

from funlora_lab.continual import prepare, run, synthetic, train_classifier
from funlora_lab.errors import Missing
from funlora_lab.experiment import Experiment
from funlora_lab.flow import EVALUATIONS_A_STEP
from funlora_lab.store import Run
from funlora_lab.systems import Context, Generator, draw
from funlora_lab.training import Runtime


class Stage(NamedTuple):
    """A part of a run that one task makes."""

    kind: str  # network | adapters | samples | classifier | result
    task: int  # from 0: after which the generator stands there; the classifiers of 0 learn from real images
    classes: tuple[int, ...]

    def __str__(self) -> str:
        several = len(self.classes) > 1
        return f"{self.kind} of {f'{len(self.classes)} classes' if several else f'class {self.classes[0]}'}"


def plan(context: Context, generator: Generator) -> dict[Stage, set[Stage]]:
    """Every stage of a run, each with those that have to be made before it, which come before it."""
    e, order = context.experiment, tuple(context.classes)
    planned: dict[Stage, set[Stage]] = {Stage("classifier", 0, order): set()}  # the judge
    before: set[Stage] = set()  # what the next training of a whole network needs
    for k, new in enumerate(context.tasks):
        seen = order[: order.index(new[-1]) + 1]
        if k == 0 or not generator.frozen:
            network = Stage("network", k, tuple(new))
            learned, before, teacher = {network: before}, {network}, dict.fromkeys(seen, network)
        else:
            learned = {Stage("adapters", k, tuple(group)): {network} for group in generator.groups(k)}
            teacher |= {cls: stage for stage in learned for cls in stage.classes}  # after which a class can be drawn
        planned |= learned
        if e.score_after != "every" and k < len(context.tasks) - 1:
            continue
        groups = [] if not generator.draws else [seen] if generator.pooled else [(cls,) for cls in seen]
        drawn = {Stage("samples", k * (not generator.frozen), group): {teacher[c] for c in group} for group in groups}
        planned |= drawn
        before = before | drawn.keys()  # self-replay learns from them
        if e.score_after != "none":
            planned[Stage("classifier", k * generator.draws, seen)] = set(drawn) if k else set()
    return planned | {Stage("result", 0, order): set(planned)}


def make(stage: Stage, experiment: Experiment, runtime: Runtime, home, read_only: bool = False) -> None:
    """See to it that what a stage makes lies in ``home``; read-only, Missing names what is lacking first."""
    if stage.kind == "result":
        record = Run.of(experiment, home)
        if read_only and not record.results():
            raise Missing(f"The run {record.folder.name} is not finished.")
        return None if read_only else run(experiment, runtime=runtime, home=home)
    context, generator = prepare(experiment, runtime, home, read_only)
    classes, count = list(stage.classes), experiment.samples_per_class
    if stage.kind == "classifier" and not stage.task:
        return train_classifier(context, classes)
    for task in range(1 if generator.frozen else stage.task + 1):
        generator.learn(task)
    if generator.frozen:
        generator.learn_classes([cls for cls in classes if cls not in generator.labels])
    if stage.kind == "samples":
        for cls in classes:
            draw(context, generator.source(cls), cls, count)
    elif stage.kind == "classifier":
        sources = {cls: generator.source(cls) for cls in classes}
        samples = {cls: draw(context, source, cls, count)[0] for cls, source in sources.items()}
        train_classifier(context, classes, *synthetic(context, sources, samples))


def cost(stage: Stage, context: Context, generator: Generator) -> float:
    """What a stage costs, in passes of one image through the network; 250 and 0.3 by the paper's hours (``COST``)."""
    e, n = context.experiment, len(stage.classes)
    if stage.kind == "network":  # that of task 1 may know more classes than those of its task
        later = n if stage.task else len(getattr(generator, "first_classes", lambda: stage.classes)()) - n
        return 3.0 * generator.draws * (e.adapter.images * later + e.base.images * (not stage.task))
    each = {
        "adapters": 2.0 * e.adapter.images,
        "samples": e.samples_per_class * (EVALUATIONS_A_STEP.get(e.solver, 0) * e.steps or 250.0),
        "classifier": 0.3 * e.classifier.epochs * e.samples_per_class,
    }
    return n * each.get(stage.kind, 0.0)  # a result costs nothing
