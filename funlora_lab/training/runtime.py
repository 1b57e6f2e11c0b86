"""What every stage of a run is handed: where work is done, how often it is saved, who is told of it."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from funlora_lab.errors import LabError, Stopped
from funlora_lab.training.processes import Team

Event = dict  # {"event": kind, ...}: what a run reports and logs
Report = Callable[[Event], None]
Watch = Callable[[Event, Tensor], None]


def ignore(event: Event | str) -> None:
    """A report that nobody reads."""


def _save_seconds() -> float:
    word = os.environ.get("FUNLORA_SAVE_SECONDS") or "20"
    with suppress(ValueError):
        if (seconds := float(word)) >= 0:
            return seconds
    raise LabError(f"FUNLORA_SAVE_SECONDS={word}: accepted is a number of seconds from 0 up.")


@dataclass
class Runtime:
    """Nothing here changes a result beyond the device's own rounding."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stop: Callable[[], str | None] = lambda: None  # asked after every step and chunk of samples; a sentence stops
    report: Report = ignore  # is given every event of a run as it happens
    tell: Callable[[str], None] = ignore  # is given a sentence when something outside holds the work up
    save_seconds: float = field(default_factory=_save_seconds)  # the least time between two saves; 0: every step
    # is given, now and then, stage, classes, step and loss of a training, and what is drawn then, uint8 (N, C, H, W)
    watch: Watch | None = None
    team: Team = field(default_factory=Team)  # the processes that train a whole network together
    dataset: object = None  # the experiment's images, where they have been read already
    store: object = None  # where artefacts are kept, if not in the run's home

    def check(self) -> None:
        """Raise Stopped when a stop was asked for; only where everything is already saved."""
        if reason := self.stop():
            raise Stopped(reason)
