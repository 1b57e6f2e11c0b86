"""What every stage of a run works on, and where a class's images come from once it is learned."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from funlora_lab.config import Experiment
from funlora_lab.data import Dataset
from funlora_lab.errors import LabError
from funlora_lab.flow import Velocity
from funlora_lab.store import Stage, Store
from funlora_lab.training import Event, Runtime


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
        with suppress(LabError):  # in a folder that may only be read it stays
            stage.forget_progress()
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
