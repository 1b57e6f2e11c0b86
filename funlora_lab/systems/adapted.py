"""FunLoRA and the compared adapters: a frozen base, and one row of numbers for every later class (Algorithm 1)."""

from contextlib import ExitStack
from copy import copy
from dataclasses import asdict
from itertools import accumulate

import torch
from torch import Tensor

from funlora_lab.adapters import METHODS, Adapters, Method, Row, stack, unstack
from funlora_lab.seeds import Shuffle, seed_of
from funlora_lab.store import Artefact, canonical, fingerprint, read_json, write_atomically
from funlora_lab.systems.generator import Source
from funlora_lab.systems.network import WholeNetwork, meta_unet, noisy_batch
from funlora_lab.systems.sampling import glimpse
from funlora_lab.training import Inputs, Plan, Trainer, autocast, rounded
from funlora_lab.unet import UNet


class AdaptedBase(WholeNetwork):
    """A network trained on task 1 and frozen; every later class is a row of numbers over it."""

    frozen = True
    adapter = "funlora"  # the method of adapters in a system that subclasses this one; else it is the experiment's

    @property
    def method(self) -> Method:
        name = self.context.experiment.method
        return METHODS[name if name in METHODS else self.adapter]

    def check(self) -> None:
        super().check()
        Adapters(meta_unet(self.context.experiment), self.context.experiment, self.method).check()

    def learn(self, task: int) -> None:
        context, classes = self.context, self.context.tasks[task]
        if task == 0:
            return self.train("base", classes, context.dataset.train.of(classes), context.experiment.base.steps)
        for group in self.groups(task):
            self._make(group)
        self._take(classes)

    def learn_classes(self, classes: list[int]) -> None:
        """Learn the adapters of some classes side by side; what is stored is reused, what was interrupted goes on."""
        self._make(classes)
        self._take(classes)

    def tuned(self, cls: int, pixels: Tensor) -> "AdaptedBase":
        """This generator with one class trained on from its row, on other images uint8 (N, C, H, W) (Sec. 4.2).

        Every other class keeps its row. The training is a new one, as long as the first: Adam, rate and average begin
        anew. It is known by the row it goes on from and by the images; what was interrupted resumes.
        """
        after, other = self.keys[cls], copy(self)
        artefact = self.artefact_of(cls, data=fingerprint({"pixels": pixels})[:16], after=after)
        row = self.learned_alone(artefact, cls, pixels, self.rows[cls], "tuned", after)
        other.rows, other.keys = self.rows | {cls: row}, self.keys | {cls: artefact.key}
        return other

    def learned_alone(self, artefact: Artefact, cls: int, pixels: Tensor, start: Row, *key: str) -> Row:
        """One class's row, trained by itself from ``start`` on images uint8 (N, C, H, W) and kept in an artefact.

        ``key`` names the random streams, by default those of any adapter.
        """

        def make() -> None:
            rows, facts = self.adapter_trainer(artefact, [cls], [pixels], [start], *key).fit()
            artefact.finish(unstack(rows, 1)[0], **facts, cls=cls)

        self.context.ready(artefact, make)
        return artefact.result()[0]

    def groups(self, task: int) -> list[list[int]]:
        """The classes of a later task in groups trained side by side; tasks that follow fill the lanes left over."""
        classes = self.context.tasks[task]
        lanes = self.context.experiment.lanes or len(classes)
        together = classes if lanes <= len(classes) else [cls for later in self.context.tasks[1:] for cls in later]
        groups = [together[first : first + lanes] for first in range(0, len(together), lanes)]
        return [group for group in groups if group[0] in classes]

    def adopt(self, net: UNet, key: str, labels: list[int]) -> None:
        super().adopt(net, key, labels)
        self.adapters = Adapters(self.net, self.context.experiment, self.method)

    def artefact_of(self, cls: int, **other) -> Artefact:
        """One class's adapter: independent of other classes, of their order and of their grouping.

        ``other``: what a class that is trained alone, tuned again or one's own, depends on besides, or instead.
        """
        e, method = self.context.experiment, self.method
        given = {"method": method.identity(e), "training": asdict(e.adapter) | {"lr": method.rate_of(e)}}
        return self.context.store.artefact("adapter", base=self.key, cls=cls, **self.context.inputs | given | other)

    def _take(self, classes: list[int]) -> None:
        for cls in classes:
            artefact = self.artefact_of(cls)
            self.rows[cls], facts = artefact.result()
            self.keys[cls], self.context.seconds[artefact.key] = artefact.key, facts["seconds"]

    def _make(self, classes: list[int]) -> None:
        """See to it that the adapters of some classes are finished: those missing are trained side by side."""
        context, artefacts = self.context, {cls: self.artefact_of(cls) for cls in classes}
        with ExitStack() as held:
            for artefact in sorted(artefacts.values(), key=lambda artefact: artefact.key):  # nobody waits in a ring
                if not artefact.done:
                    context.may_make(artefact)
                    held.enter_context(artefact.held(context.runtime.check, context.runtime.tell))
            groups = _begun_together(artefacts)
            context.replay(*(artefacts[cls] for cls in classes if not any(cls in group for group in groups)))
            for group in groups:
                self._train({cls: artefacts[cls] for cls in group})

    def _train(self, artefacts: dict[int, Artefact]) -> None:
        """Train a group, keep its result as a whole, then hand out to every class its own part."""
        classes, keys = list(artefacts), [artefact.key for artefact in artefacts.values()]
        group = self.context.store.artefact("adapters", members=keys)
        missing = {cls: artefact for cls, artefact in artefacts.items() if not artefact.done}
        for artefact in missing.values():
            write_atomically(artefact.folder / "group.json", canonical(keys).encode())

        self.context.ready(group, lambda: self.adapter_trainer(group, classes).finish())
        rows, facts = group.result()
        facts |= {"seconds": facts["seconds"] / len(classes), "side_by_side": len(classes)}
        rows = dict(zip(classes, unstack(rows, len(classes)), strict=True))
        for cls, artefact in missing.items():
            artefact.resume()
            for event in group.events():
                if event["class"] == cls:
                    artefact.log(event)
            artefact.finish(rows[cls], **facts, cls=cls)

    def adapter_trainer(self, group: Artefact, classes: list[int], pixels=None, rows=None, *key: str) -> Trainer:
        """The training of K classes side by side: every class has its own images, random stream and average.

        ``pixels`` and ``rows`` are other images and starts than the run's; ``key`` then names the random streams.
        """
        e, device, adapters = self.context.experiment, self.context.runtime.device, self.adapters
        K, N, rate, key = len(classes), e.adapter.batch, adapters.method.rate_of(e), key or ("adapter",)
        images = pixels or [self.context.dataset.train.of(cls).pixels for cls in classes]
        pixels, first = torch.cat(images).to(device), torch.tensor([0, *accumulate(map(len, images[:-1]))])[:, None]
        shuffles = [Shuffle(len(own), e.seed, *key, cls) for cls, own in zip(classes, images, strict=True)]
        frozen = rounded(self.net, e.precision, device)
        started = stack(rows or [adapters.start(cls) for cls in classes])
        parameters = {name: value.to(device).requires_grad_() for name, value in started.items()}

        def inputs_at(step: int) -> Inputs:
            order = first + torch.stack([shuffle.batch(step, N) for shuffle in shuffles])
            return {"order": order, "seeds": torch.tensor([seed_of(e.seed, *key, cls, step) for cls in classes])}

        def losses_of(inputs: Inputs) -> Tensor:
            batch = noisy_batch(pixels, inputs["order"], e.flip, inputs["seeds"])
            with autocast(e.precision, device):
                return self.loss(adapters.velocity(parameters, K, frozen), batch).reshape(N, K).mean(0)

        def draw(rows: Row) -> Tensor:
            other = copy(self)
            other.rows, other.keys = dict(zip(classes, unstack(rows, K), strict=True)), dict.fromkeys(classes, "")
            return glimpse(other, classes)

        plan = Plan.of(e.adapter, rate, e.adapter.steps, e.log_every)
        optimizer = torch.optim.Adam(parameters.values(), lr=rate, fused=True)
        labels = [{"stage": "adapter", "class": cls} for cls in classes]
        given = optimizer, parameters, inputs_at, losses_of, self.context.runtime, labels
        return Trainer(group, plan, *given, draw=draw)

    def source(self, cls: int) -> Source:
        if cls in self.labels:
            return super().source(cls)
        row = {name: value.to(self.context.runtime.device) for name, value in self.rows[cls].items()}

        @torch.no_grad()
        def velocity():
            return self.adapters.velocity(stack([row]), 1)

        return Source(self.keys[cls], velocity)

    @property
    def parameters_per_class(self) -> int:
        return self.adapters.parameters_per_class


def _begun_together(artefacts: dict[int, Artefact]) -> list[list[int]]:
    """The classes whose adapters are missing, in the groups in which their training began, all others in a new one.

    How many are trained side by side shows in an adapter's last bits, so a group goes on with all its members.
    """
    known = {artefact.key: cls for cls, artefact in artefacts.items()}
    fresh, groups = [cls for cls, artefact in artefacts.items() if not artefact.done], []
    for cls in list(fresh):
        companions = artefacts[cls].folder / "group.json"
        members = read_json(companions) if companions.exists() else []
        if cls in fresh and members and known.keys() >= set(members):
            groups.append([known[key] for key in members])
            fresh = [other for other in fresh if other not in groups[-1]]
    return groups + ([fresh] if fresh else [])
