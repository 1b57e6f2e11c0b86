"""How a generator comes to know classes, task after task: the methods of every comparison, behind one small interface.

``learn(task)`` trains whatever the method trains at that task, yielding events; ``source(cls)`` then says, for any
class learned so far, by which key its images are known and how to build its velocity. Everything else (samples,
classifier, scores) is the same for all methods.
"""

from collections.abc import Iterator

import torch

from funlora_lab.config import WHOLE_NETWORK
from funlora_lab.data import Images
from funlora_lab.frozen import FrozenBase
from funlora_lab.network import WholeNetwork
from funlora_lab.sampling import draw
from funlora_lab.streams import Shuffle
from funlora_lab.training import Event
from funlora_lab.work import Work, sample_stage


class FineTune(WholeNetwork):
    """The naive way: the whole network is trained on each new task's images alone, and forgets."""

    def learn(self, task: int) -> Iterator[Event]:
        work, classes = self.work, self.work.tasks[task]
        e = work.experiment
        steps = e.base_steps if task == 0 else -(-e.adapter_images * len(classes) // e.base_batch)
        name = "base" if task == 0 else f"fine-tune-{task + 1}"
        yield from self.train(name, self.labels + classes, work.dataset.train.of(classes), steps)


class SelfReplay(WholeNetwork):
    """Deep generative replay (Shin et al. 2017) on this backbone: no adapters, and no real image of an old class.

    At every task the generator draws ``samples_per_class`` images of each class learned so far; then the whole network
    goes on training on those and on the real images of the new classes, every class as often as any other. An adapter
    is trained on ``adapter_images`` images of its class once; here all classes seen are trained on as many again at
    every task, so the cost of a task grows with the number of classes, and an old class is a copy of a copy.
    """

    def learn(self, task: int) -> Iterator[Event]:
        work, new = self.work, self.work.tasks[task]
        e, real = work.experiment, work.dataset.train
        if task == 0:
            yield from self.train("base", new, real.of(new), e.base_steps)
            return
        parts, drawn = [real.of(cls) for cls in new], {}
        for cls in self.labels:
            stage = drawn[str(cls)] = sample_stage(work, self.source(cls), cls)
            images, _ = yield from draw(stage, self.source(cls).velocity, e, cls, e.samples_per_class, work.runtime)
            parts.append(Images(images, torch.full((len(images),), cls)))
        images = _evened(parts, e.seed, task)
        seen = self.labels + new
        steps = -(-e.adapter_images * len(seen) // e.base_batch)
        replayed = {cls: stage.key for cls, stage in drawn.items()}
        yield from self.train(
            f"self-replay-{task + 1}", seen, images, steps, replayed=replayed, count=e.samples_per_class
        )


def _evened(parts: list[Images], seed: int, task: int) -> Images:
    """The images of several classes joined, each class filled up to the largest by repeating images of its own."""
    size = max(map(len, parts))
    picked = []
    for part in parts:
        order = Shuffle(len(part), seed, "evened", task, int(part.labels[0])).batch(0, size)
        picked.append(Images(part.pixels[order], part.labels[order]))
    return Images(torch.cat([part.pixels for part in picked]), torch.cat([part.labels for part in picked]))


class GenerativeMultitask(WholeNetwork):
    """The upper bound: one network trained on all classes at once, on as many images as an incremental run sees."""

    def learn(self, task: int) -> Iterator[Event]:
        if task:
            return
        work, e = self.work, self.work.experiment
        everything = [cls for classes in work.tasks for cls in classes]
        new = len(everything) - len(work.tasks[0])
        steps = -(-(e.base_images + e.adapter_images * new) // e.base_batch)
        yield from self.train("multitask", everything, work.dataset.train, steps)


def generator_of(work: Work) -> WholeNetwork | None:
    """The generator of the experiment's method; None for classifier-multitask, which draws no samples."""
    method = work.experiment.method
    if method not in WHOLE_NETWORK:
        return FrozenBase(work)
    whole = {"fine-tune": FineTune, "self-replay": SelfReplay, "generative-multitask": GenerativeMultitask}
    return whole.get(method, lambda work: None)(work)
