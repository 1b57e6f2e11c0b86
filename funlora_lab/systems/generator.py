"""How a system comes to know classes, task after task: one interface for all of them, and their registry."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from funlora_lab.adapters import METHODS, Row, source_text
from funlora_lab.data import Dataset
from funlora_lab.diffusion import Sampler
from funlora_lab.errors import LabError, Missing
from funlora_lab.experiment import REGISTERED_TEXTS, Experiment
from funlora_lab.flow import Solver, Velocity, flow_loss
from funlora_lab.store import Artefact, Store
from funlora_lab.training import Runtime
from funlora_lab.unet import UNet

SYSTEMS: dict[str, type["Generator"]] = {}


@dataclass
class Context:
    """What every stage of a run needs: the experiment, its images and tasks, where artefacts lie, where to compute."""

    experiment: Experiment
    dataset: Dataset
    tasks: list[list[int]]
    store: Store
    runtime: Runtime
    read_only: bool = False  # nothing is trained, drawn or deleted; LabError names what is missing
    seconds: dict[str, float] = field(default_factory=dict)  # of every artefact used, reused ones at first cost
    base_weights: str = ""  # fingerprint of those of the file ``base_weights``, if a stored run remembers it

    classes = property(lambda self: [cls for task in self.tasks for cls in task])  # in the order they are learned
    total_seconds = property(lambda self: sum(self.seconds.values()))

    @property
    def inputs(self) -> dict:
        """What every training depends on."""
        e = self.experiment
        return {"data": self.dataset.fingerprint, "seed": e.seed, "flip": e.flip, "precision": e.precision}

    def replay(self, *artefacts: Artefact) -> None:
        """Report the events of finished artefacts as they were logged, by step, marked as replayed."""
        for event in sorted((e for a in artefacts for e in a.events()), key=lambda event: event["step"]):
            self.runtime.report({**event, "replayed": True})

    def may_make(self, artefact: Artefact, part: str = "") -> None:
        if self.read_only:
            raise Missing(f"The artefact {artefact.name}{part} is missing.")

    def ready(self, artefact: Artefact, make: Callable[[], None]) -> None:
        """See to it that an artefact is finished: replay it, or ``make`` it while no other process does the same."""
        runtime, team = self.runtime, self.runtime.team
        if not team.agree(artefact.done):
            self.may_make(artefact)
            check = runtime.check if team.size == 1 else lambda: None  # none may leave while others go on
            with artefact.held(check, runtime.tell):
                if not team.agree(artefact.done):
                    return make()
        if not self.read_only:
            with suppress(LabError):  # in a folder that may only be read it stays
                artefact.forget_progress()
        self.replay(artefact)

    def tensors(self, artefact: Artefact, make: Callable[[], None]) -> dict[str, Tensor]:
        """Those of an artefact that this run uses, made ``ready`` first; its seconds count."""
        self.ready(artefact, make)
        tensors, facts = self.runtime.team.agree(artefact.result())
        self.seconds[artefact.key] = facts["seconds"]
        return tensors


class Source(NamedTuple):
    """Where a class's images come from."""

    key: str  # of its weights
    velocity: Callable[[], Velocity]  # builds its velocity, or the noise that it predicts
    solver: Solver | Sampler | None = None  # what integrates it; None: the experiment's solver of a velocity
    # a chunk's number -> (its images in [-1, 1], evaluations an image), where they do not come from ``velocity`` alone
    chunk: Callable[[int], tuple[Tensor, int]] | None = None


class Batch(NamedTuple):
    x1: Tensor  # images (B, C, H, W) in [-1, 1]
    x0: Tensor  # noise of the same shape
    t: Tensor  # times (B,)
    y: Tensor | None = None  # positions (B,) in the network's embedding; None where adapters are trained
    step: Tensor | None = None  # of the training, and a seed () for what a system draws itself; None with adapters
    seed: Tensor | None = None


class Generator:
    """A system that learns classes; subclasses are registered by ``@system``, which fills in ``name`` and ``about``."""

    name = about = ""
    draws = True  # False where its images are the real ones, which are neither judged nor certified
    pooled = False  # True where images of all classes are chosen from one pool, so that they are drawn together
    frozen = False  # True where a class is a row over a frozen base, so that rows can be exported, bent and added
    parameters_per_class = 0  # PPC: the numbers that one class more costs

    def __init__(self, context: Context):
        self.context = context
        self.labels: list[int] = []  # the classes that its network knows by their label embedding
        self.rows: dict[int, Row] = {}  # class -> the numbers learned for it apart from all others
        self.keys: dict[int, str] = {}  # class with a row -> what its samples' keys hold
        self.net: UNet | None = None  # of a system that draws: its network after the tasks learned so far,
        self.key = ""  # and the key of that network's artefact

    def check(self) -> None:
        """Raise LabError when the experiment does not fit the system; costs no memory and no time."""

    def learn(self, task: int) -> None:
        """Learn the classes of ``context.tasks[task]``."""
        raise NotImplementedError

    def source(self, cls: int) -> Source:
        """How the images of a class learned so far are drawn."""
        raise NotImplementedError

    def loss(self, velocity: Velocity, batch: Batch) -> Tensor:
        """The training loss of every image (B,): Eq. 1, unless a system distils or trains jointly."""
        return flow_loss(velocity, batch.x1, batch.x0, batch.t)

    def classifier(self, seen: list[int]) -> Callable[[Tensor], Tensor] | None:
        """Its own, scored beside the protocol's: images (B, C, H, W) in [-1, 1] -> logits (B, K) of those seen."""
        return None


def system(name: str, about: str) -> Callable[[type[Generator]], type[Generator]]:
    """Register a generator as the method ``name``; one from outside the package is known by its source text too."""

    def registered(kind: type[Generator]) -> type[Generator]:
        if name in METHODS or (name in SYSTEMS and name not in REGISTERED_TEXTS):
            raise LabError(f"The method {name} is built in: register yours under another name.")
        kind.name, kind.about = name, about
        if text := source_text(*kind.__mro__[:-1]):
            REGISTERED_TEXTS[name] = text
        SYSTEMS[name] = kind
        return kind

    return registered


def all_methods() -> dict[str, str]:
    """Every value that ``method`` accepts, with a sentence: adapters over a frozen base, then systems."""
    return {name: kind.about for name, kind in (METHODS | SYSTEMS).items()}


def check_method(name: str) -> None:
    """Raise LabError unless a method of that name is registered."""
    if name not in all_methods():
        raise LabError(f"method={name}: accepted is one of {', '.join(all_methods())}.")
    if name in METHODS and name in SYSTEMS:
        raise LabError(f"method={name}: a method and a system have this name; register yours under another.")
