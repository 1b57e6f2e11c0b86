"""The bounds and the plain ways to learn a class more: fine-tuning, self-replay, all classes at once, real images."""

import torch

from funlora_lab.data import Images, Later
from funlora_lab.errors import LabError
from funlora_lab.seeds import Shuffle
from funlora_lab.systems.generator import Generator, Source, system
from funlora_lab.systems.network import WholeNetwork
from funlora_lab.systems.sampling import draw, sample_artefact


@system("fine-tune", "the whole network trained on each new task's images alone: it forgets")
class FineTune(WholeNetwork):
    def learn(self, task: int) -> None:
        e, classes = self.context.experiment, self.context.tasks[task]
        steps = e.base.steps if task == 0 else -(-e.adapter.images * len(classes) // e.base.batch)
        name = "base" if task == 0 else f"fine-tune-{task + 1}"
        self.train(name, self.labels + classes, self.context.dataset.train.of(classes), steps)


@system("self-replay", "deep generative replay: the whole network trained on its own samples and the new images")
class SelfReplay(WholeNetwork):
    """Deep generative replay (Shin et al. 2017) on this backbone: no adapters, and no real image of an old class.

    At every task it goes on training on ``samples_per_class`` images that it has drawn of each class learned so far and
    on the real images of the new ones: ``adapter_images`` of every class seen, where an adapter sees as many of its own
    once. So the cost of a task grows with the number of classes, and an old class is a copy of a copy.
    """

    def learn(self, task: int) -> None:
        context, new = self.context, self.context.tasks[task]
        e, real = context.experiment, context.dataset.train
        if task == 0:
            return self.train("base", new, real.of(new), e.base.steps)
        drawn, replayed = self.draw({cls: self.replayed(cls) for cls in self.labels})
        images = Later(lambda: evened([real.of(cls) for cls in new] + drawn, e.seed, task))
        self.train(f"self-replay-{task + 1}", self.labels + new, images, self.steps(task), **replayed)

    def replayed(self, cls: int) -> Source:
        """How the images of a class that are trained on again are drawn."""
        return self.source(cls)

    def steps(self, task: int) -> int:
        """Of the training after a task: ``adapter_images`` for each class that ``replay_budget`` counts."""
        e, tasks = self.context.experiment, self.context.tasks
        counted = sum(map(len, tasks[: task + 1])) if e.prior.replay_budget == "seen" else len(tasks[task])
        return -(-e.adapter.images * counted // e.base.batch)

    def draw(self, sources: dict[int, Source]) -> tuple[list[Images], dict]:
        """(``replay_per_class`` images of every class, what the key of a training on them says of their origin)."""
        context, e, parts, keys = self.context, self.context.experiment, [], {}
        count = e.prior.replay_per_class or e.samples_per_class
        for cls, source in sources.items():
            keys[str(cls)] = key = sample_artefact(context, source, cls).key
            images, context.seconds[key] = draw(context, source, cls, count)
            parts.append(Images(images, torch.full((count,), cls)))
        return parts, {"replayed": keys, "count": count}


def evened(parts: list[Images], seed: int, task: int) -> Images:
    """The images of several classes joined, each class filled up to the largest by repeating images of its own."""
    size, picked = max(map(len, parts)), []
    for part in parts:
        order = Shuffle(len(part), seed, "evened", task, int(part.labels[0])).batch(0, size)
        picked.append(part.at(order))
    return Images(torch.cat([part.pixels for part in picked]), torch.cat([part.labels for part in picked]))


@system("generative-multitask", "upper bound: one network trained on all classes at once")
class GenerativeMultitask(WholeNetwork):
    def first_classes(self) -> list[int]:
        return self.context.classes

    def learn(self, task: int) -> None:
        context, e = self.context, self.context.experiment
        if task == 0:  # on as many images as an incremental run
            images = e.base.images + e.adapter.images * (len(context.classes) - len(context.tasks[0]))
            self.train("multitask", context.classes, context.dataset.train, -(-images // e.base.batch))


@system("classifier-multitask", "upper bound: no generator, the classifier learns from the real images of all classes")
class RealData(Generator):
    draws = False

    def learn(self, task: int) -> None:
        self.labels = self.labels + self.context.tasks[task]

    def source(self, cls: int) -> Source:
        raise LabError(f"The method {self.name} draws no images: choose a run of another method.")
