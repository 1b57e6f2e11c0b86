"""How a generator comes to know classes, task after task: the methods of every comparison, behind one small interface.

``learn(task)`` trains whatever the method trains at that task, yielding events; ``source(cls)`` then says, for any
class learned so far, by which key its images are known and how to build its velocity. Everything else (samples,
classifier, scores) is the same for all methods.
"""

import heapq
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from funlora_lab.adapters import METHODS, Adapters, Row, stack, unstack
from funlora_lab.config import WHOLE_NETWORK, Experiment
from funlora_lab.data import Dataset, Images, to_floats
from funlora_lab.disk import canonical, fingerprint, read_json, write_atomically
from funlora_lab.flow import Velocity, flow_loss
from funlora_lab.sampling import draw
from funlora_lab.speed import sent
from funlora_lab.store import Stage, Store
from funlora_lab.streams import Shuffle, seeded, stream
from funlora_lab.training import Event, Plan, Runtime, fit
from funlora_lab.unet import UNet

NULL = -1  # the label of pictures without one


@dataclass
class Work:
    """What every stage needs: the experiment, its images and tasks, where artefacts lie, and where to compute."""

    experiment: Experiment
    dataset: Dataset
    tasks: list[list[int]]
    store: Store
    runtime: Runtime
    seconds: dict[str, float] = field(default_factory=dict)  # cost of every stage used, reused ones at first cost

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def replay(self, stage: Stage) -> Iterator[Event]:
        """A finished stage's events as they were logged, marked as replayed."""
        for event in stage.events():
            yield {**event, "replayed": True}

    def ready(self, stage: Stage, make: Callable[[], Iterator[Event]]) -> Iterator[Event]:
        """See to it that a stage is finished: replay it, or ``make`` it while no other process does the same."""
        team = self.runtime.team
        if not team.agree(stage.done):
            with stage.held(self.runtime):
                if not team.agree(stage.done):
                    yield from make()
                    return
        yield from self.replay(stage)


@dataclass(frozen=True)
class Source:
    """Where a class's images come from: the key of its weights, and a function that builds its velocity."""

    key: str
    velocity: Callable[[], Velocity]


def sample_stage(work: Work, source: Source, cls: int) -> Stage:
    """The stage of one class's samples: it does not depend on how many are asked for."""
    e = work.experiment
    adaptive = e.solver.startswith("dopri5")
    solver = {"solver": e.solver} | ({"tolerance": e.tolerance} if adaptive else {"steps": e.steps})
    return work.store.stage(
        "samples", weights=source.key, cls=cls, seed=e.seed, chunk=e.chunk, precision=e.precision, **solver
    )


def build_unet(experiment: Experiment, classes: int) -> UNet:
    """A fresh U-Net of the experiment's configuration; its first weights depend on the seed alone."""
    e = experiment
    with seeded(e.seed, "network weights", classes):
        net = UNet(
            e.image_size,
            e.channels,
            classes,
            e.base_channels,
            e.multipliers,
            e.res_blocks,
            e.attention,
            e.head_channels,
            e.norm_groups,
            e.dropout,
        )
    return net


def _autocast(experiment: Experiment, device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=experiment.precision == "bf16")


def _noised(images: Images, order: Tensor, flip: bool, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(x1, x0, t) of one batch: images in [-1, 1], noise and times, all from one stream."""
    device = images.pixels.device
    x1 = to_floats(images.pixels[sent(order, device)])
    if flip:
        mirrored = torch.rand(len(x1), generator=generator, device=device) < 0.5
        x1 = torch.where(mirrored[:, None, None, None], x1.flip(3), x1)
    x0 = torch.randn(x1.shape, generator=generator, device=device)
    t = torch.rand(len(x1), generator=generator, device=device)
    return x1, x0, t


def train_network(work: Work, stage: Stage, net: UNet, images: Images, steps: int, name: str) -> Iterator[Event]:
    """Train the whole network on images whose labels are positions in its embedding, and finish the stage.

    Of several processes each computes its part of every batch.
    """
    e, device, team = work.experiment, work.runtime.device, work.runtime.team
    team.check(stage.state_file, e.base_batch)
    model = team.wrap(work.runtime.prepared(net).train())
    images = Images(images.pixels.to(device), images.labels.to(device))
    shuffle = Shuffle(len(images), e.seed, name, "order")
    parameters = dict(net.named_parameters())

    def loss_at(step: int) -> Tensor:
        order = shuffle.batch(step, e.base_batch)
        x1, x0, t = _noised(images, order, e.flip, stream(e.seed, name, step, device=device))
        x1, x0, t, y = team.part(x1, x0, t, images.labels[sent(order, device)])
        with seeded(e.seed, name, "dropout", step, *team.key, device=device), _autocast(e, device):
            return team.mean(flow_loss(lambda t, x: model(t, x, y), x1, x0, t), e.base_batch)[None]

    plan = Plan(
        steps,
        e.base_batch,
        e.base_lr,
        e.base_schedule,
        e.base_warmup // e.base_batch,
        e.base_ema,
        e.base_ema_start // e.base_batch,
        e.log_every,
    )
    optimizer = torch.optim.Adam(parameters.values(), lr=e.base_lr, fused=True)
    result, facts = yield from fit(
        stage, plan, optimizer, parameters, loss_at, work.runtime, [{"stage": name}], clip=e.grad_clip
    )
    stage.finish(result, **facts, batch=e.base_batch, processes=team.size)
    team.wait()


class WholeNetwork:
    """Shared by every method whose generator is a single network trained as a whole."""

    def __init__(self, work: Work):
        self.work = work
        self.net: UNet | None = None
        self.key = ""
        self.labels: list[int] = []  # class of each row of the network's embedding

    def check(self) -> None:
        """Raise LabError when the experiment does not fit the network; costs no memory and no time."""
        with torch.device("meta"):
            build_unet(self.work.experiment, 1)

    def train(self, name: str, labels: list[int], images: Images, steps: int, **inputs) -> Iterator[Event]:
        """Train (or load) the network on ``images``, from the current one if there is one, else from scratch.

        With ``pretrain_root`` "from scratch" means: from a network trained on the unlabelled pictures there.
        """
        work, e = self.work, self.work.experiment
        if self.net is None and e.pretrain_root and labels != [NULL]:
            yield from self._pretrain()
        stage = work.store.stage(
            "network",
            name=name,
            labels=labels,
            steps=steps,
            after=self.key,
            seed=e.seed,
            flip=e.flip,
            precision=e.precision,
            unet={name: getattr(e, name) for name in UNET_FIELDS},
            training=e.select("base_batch", "base_lr", "base_schedule", "base_warmup", "base_ema", "grad_clip"),
            **({"data": work.dataset.fingerprint} | inputs),
        )
        net = build_unet(e, len(labels))
        if self.net is not None:
            old = self.net.state_dict()
            embedding = net.label_emb.weight.detach().clone()
            embedding[: len(self.labels)] = old["label_emb.weight"].cpu()
            if self.labels == [NULL]:  # every class starts where the unlabelled pictures left off
                embedding[:] = old["label_emb.weight"].cpu()
            net.load_state_dict(old | {"label_emb.weight": embedding})

        def make() -> Iterator[Event]:
            position = {cls: i for i, cls in enumerate(labels)}
            local = torch.tensor([position[c] for c in images.labels.tolist()])
            return train_network(work, stage, net, Images(images.pixels, local), steps, name)

        yield from work.ready(stage, make)
        weights, facts = stage.result()
        net.load_state_dict(weights)
        work.seconds[stage.key] = facts["seconds"]
        self.adopt(net, stage.key, labels)

    def adopt(self, net: UNet, key: str, labels: list[int]) -> None:
        """Take a trained network as the current one; nothing trains it until the next task does."""
        self.net = self.work.runtime.prepared(net).eval().requires_grad_(False)
        self.key, self.labels = key, labels

    def _pretrain(self) -> Iterator[Event]:
        """Unsupervised pre-training of the base (the paper's supplement 6.4), conditioned on one learned null label.

        The paper does not say what stands in for the label; one embedding shared by all pictures does here, and the
        embedding of every class of task 1 starts as a copy of it.
        """
        pixels = self.work.dataset.unlabelled
        images = Images(pixels, torch.full((len(pixels),), NULL))
        steps = self.work.experiment.pretrain_steps
        yield from self.train("pretrain", [NULL], images, steps, data=fingerprint({"pixels": pixels})[:16])

    def source(self, cls: int) -> Source:
        position, net, device = self.labels.index(cls), self.net, self.work.runtime.device

        def velocity() -> Velocity:
            y = torch.tensor([position], device=device)
            return lambda t, x: net(t, x, y.expand(len(x)))

        return Source(f"{self.key}:{cls}", velocity)

    @property
    def parameters_per_class(self) -> int:
        """A class adds nothing but its label embedding, since the whole network is trained again."""
        return self.net.embedding


UNET_FIELDS = (
    "image_size",
    "channels",
    "base_channels",
    "multipliers",
    "res_blocks",
    "attention",
    "head_channels",
    "norm_groups",
    "dropout",
)


class FrozenBase(WholeNetwork):
    """Algorithm 1: the whole network on task 1, then one row of adapter numbers for every later class."""

    def __init__(self, work: Work):
        super().__init__(work)
        self.rows: dict[int, Row] = {}
        self.keys: dict[int, str] = {}
        self.adapters: Adapters | None = None

    def learn(self, task: int) -> Iterator[Event]:
        work, classes = self.work, self.work.tasks[task]
        if task == 0:
            yield from self.train("base", classes, work.dataset.train.of(classes), work.experiment.base_steps)
            return
        for group in self.groups(task):
            yield from self.learn_side_by_side(group)

    def groups(self, task: int) -> list[list[int]]:
        """The classes of a later task, divided into those trained side by side.

        With more lanes than a task has classes, those of the tasks that follow fill them: no class's result depends on
        another. A group is then learned with the task of its first class.
        """
        classes = self.work.tasks[task]
        lanes = self.work.experiment.lanes or len(classes)
        together = classes if lanes <= len(classes) else [cls for later in self.work.tasks[1:] for cls in later]
        groups = [together[first : first + lanes] for first in range(0, len(together), lanes)]
        return [group for group in groups if group[0] in classes]

    def adopt(self, net: UNet, key: str, labels: list[int]) -> None:
        super().adopt(net, key, labels)
        self.adapters = Adapters(self.net, self.work.experiment)

    def check(self) -> None:
        with torch.device("meta"):
            net = build_unet(self.work.experiment, 1)
        Adapters(net, self.work.experiment).neutral()

    def stage(self, cls: int) -> Stage:
        """The stage of one class's adapter: independent of other classes, of their order and of their grouping."""
        e = self.work.experiment
        return self.work.store.stage(
            "adapter",
            base=self.key,
            cls=cls,
            data=self.work.dataset.fingerprint,
            seed=e.seed,
            flip=e.flip,
            precision=e.precision,
            method={name: getattr(e, name) for name in METHODS[e.method].settings},
            rate=e.adapter_rate,
            training=e.select("adapter_images", "adapter_batch", "adapter_schedule", "adapter_warmup", "adapter_ema"),
        )

    def learn_side_by_side(self, classes: list[int]) -> Iterator[Event]:
        """Learn the adapters of some classes at once; what is stored is reused, what was interrupted goes on."""
        work, stages = self.work, {cls: self.stage(cls) for cls in classes}
        with ExitStack() as held:
            for stage in sorted(stages.values(), key=lambda stage: stage.key):  # in one order: nobody waits in a ring
                if not stage.done:
                    held.enter_context(stage.held(work.runtime))
            groups = self._groups(classes, [cls for cls in classes if not stages[cls].done])
            parts = [self._train(group) for group in groups]
            parts += [work.replay(stages[cls]) for cls in classes if not any(cls in group for group in groups)]
            # by step, then class, whoever was trained when and with whom: the log of a run has one order only
            yield from heapq.merge(*parts, key=lambda event: (event["step"], classes.index(event["class"])))
        for cls in classes:
            stage = self.stage(cls)
            row, facts = stage.result()
            self.rows[cls], self.keys[cls] = row, stage.key
            work.seconds[stage.key] = facts["seconds"]

    def _groups(self, classes: list[int], missing: list[int]) -> list[list[int]]:
        """The missing classes in the groups in which their training began, and all others in a new one.

        The bits of an adapter depend (in the last places) on how many are trained side by side, so a group goes on as
        it began, even when some of its members were already handed out.
        """
        known = {self.stage(cls).key: cls for cls in classes}
        groups, fresh = [], list(missing)
        for cls in missing:
            companions = self._companions_file(cls)
            members = read_json(companions) if companions.exists() else []
            if cls in fresh and members and known.keys() >= set(members):
                groups.append([known[key] for key in members])
                fresh = [other for other in fresh if other not in groups[-1]]
        return groups + ([fresh] if fresh else [])

    def _companions_file(self, cls: int) -> Path:
        return self.stage(cls).folder / "group.json"

    def _train(self, classes: list[int]) -> Iterator[Event]:
        """Train a group, keep its result as a whole, then hand out to every class its own part."""
        keys = [self.stage(cls).key for cls in classes]
        group = self.work.store.stage("adapters", members=keys)
        for cls in classes:
            if not self.stage(cls).done:
                write_atomically(self._companions_file(cls), canonical(keys).encode())
        yield from self.work.ready(group, lambda: self._fit(classes, group))
        result, facts = group.result()
        facts["seconds"] /= len(classes)
        for cls, row in zip(classes, unstack(result, len(classes)), strict=True):
            stage = self.stage(cls)
            if not stage.done:
                stage.resume()
                for event in group.events():
                    if event["class"] == cls:
                        stage.log(event)
                stage.finish(row, **facts, cls=cls, side_by_side=len(classes))

    def _fit(self, classes: list[int], group: Stage) -> Iterator[Event]:
        e, device, adapters = self.work.experiment, self.work.runtime.device, self.adapters
        K, N = len(classes), e.adapter_batch
        images = [self.work.dataset.train.of(cls) for cls in classes]
        images = [Images(part.pixels.to(device), part.labels.to(device)) for part in images]
        shuffles = [Shuffle(len(part), e.seed, "adapter", cls) for cls, part in zip(classes, images, strict=True)]
        rows = stack([adapters.start(cls) for cls in classes])
        parameters = {name: value.to(device).requires_grad_() for name, value in rows.items()}

        def loss_at(step: int) -> Tensor:
            batches = [
                _noised(part, shuffle.batch(step, N), e.flip, stream(e.seed, "adapter", cls, step, device=device))
                for cls, part, shuffle in zip(classes, images, shuffles, strict=True)
            ]
            x1, x0, t = (torch.stack(parts, 1).flatten(0, 1) for parts in zip(*batches, strict=True))  # (N*K, ...)
            with _autocast(e, device):
                return flow_loss(adapters.velocity(parameters, K), x1, x0, t).reshape(N, K).mean(0)

        plan = Plan(
            e.adapter_steps,
            N,
            e.adapter_rate,
            e.adapter_schedule,
            e.adapter_warmup // N,
            e.adapter_ema,
            e.adapter_ema_start // N,
            e.log_every,
        )
        optimizer = torch.optim.Adam(parameters.values(), lr=e.adapter_rate, fused=True)
        labels = [{"stage": "adapter", "class": cls} for cls in classes]
        result, facts = yield from fit(group, plan, optimizer, parameters, loss_at, self.work.runtime, labels)
        group.finish(result, **facts, base=fingerprint(self.net.state_dict()))

    def source(self, cls: int) -> Source:
        if cls in self.labels:
            return super().source(cls)
        row = {name: value.to(self.work.runtime.device)[None] for name, value in self.rows[cls].items()}

        def velocity() -> Velocity:
            with torch.no_grad():
                return self.adapters.velocity(row, 1)

        return Source(self.keys[cls], velocity)

    @property
    def parameters_per_class(self) -> int:
        return self.adapters.parameters_per_class


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
