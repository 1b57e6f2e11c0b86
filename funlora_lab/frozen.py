"""FunLoRA and the compared adapters: a frozen base, and one row of numbers for every later class (Algorithm 1)."""

import heapq
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from funlora_lab.adapters import METHODS, Adapters, Row, stack, unstack
from funlora_lab.data import Images
from funlora_lab.disk import canonical, fingerprint, read_json, write_atomically
from funlora_lab.flow import Velocity, flow_loss
from funlora_lab.network import WholeNetwork, build_unet, noised
from funlora_lab.speed import autocast
from funlora_lab.store import Stage
from funlora_lab.streams import Shuffle, stream
from funlora_lab.training import Event, Plan, fit
from funlora_lab.unet import UNet
from funlora_lab.work import Source, Work


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
                noised(part, shuffle.batch(step, N), e.flip, stream(e.seed, "adapter", cls, step, device=device))
                for cls, part, shuffle in zip(classes, images, shuffles, strict=True)
            ]
            x1, x0, t = (torch.stack(parts, 1).flatten(0, 1) for parts in zip(*batches, strict=True))  # (N*K, ...)
            with autocast(e.precision, device):
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
