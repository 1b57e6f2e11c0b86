"""Several processes train one network: every process computes its part of the same global batch.

The random streams are functions of the step, so all processes draw the same whole batch and take every size-th image
of it; DistributedDataParallel adds the gradients up. The result equals that of one process up to rounding (with
dropout: up to the masks, which are drawn for the part of each process). Process 0 alone writes; all others read the
same home, so on several machines it has to lie on a shared file system.

    torchrun --nproc-per-node 8 -m funlora_lab run imagenet100
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from funlora_lab.disk import read_tensors
from funlora_lab.errors import LabError
from funlora_lab.store import Stage, Store

ASK_EVERY = 10  # steps between two questions whether to stop, to which all processes need the same answer
PATIENCE = timedelta(days=7)  # with which a process waits for the others: reading many pictures takes its time


@dataclass(frozen=True)
class Team:
    """The processes that train together; the default is one process alone, for which everything is as without."""

    rank: int = 0
    size: int = 1

    @property
    def key(self) -> tuple[int, ...]:
        """What tells this process's dropout masks from those of the others; nothing when it is alone."""
        return () if self.size == 1 else (self.rank, self.size)

    def wrap(self, net: nn.Module) -> nn.Module:
        """The network whose backward pass averages gradients over the team."""
        return net if self.size == 1 else DistributedDataParallel(net)

    def part(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """This process's images of a global batch."""
        return batch if self.size == 1 else tuple(each[self.rank :: self.size] for each in batch)

    def mean(self, losses: Tensor, count: int) -> Tensor:
        """The mean loss over the global batch of ``count`` images, with the gradient of this process's part.

        Gradients are averaged over processes, so a part counts ``size`` times.
        """
        if self.size == 1:
            return losses.mean()
        mine = losses.sum() * (self.size / count)
        mean = mine.detach() / self.size
        dist.all_reduce(mean)
        return mine - mine.detach() + mean

    def check(self, state: Path, count: int) -> None:
        """Raise LabError unless every process has images of a batch of ``count`` and sees the same saved progress."""
        if self.size == 1:
            return
        if count < self.size:
            raise LabError(f"base_batch={count}: accepted is at least the number of processes, {self.size}.")
        seen: list[int] = [0] * self.size
        dist.all_gather_object(seen, read_tensors(state)[1]["step"] if state.exists() else 0)
        if len(set(seen)) > 1:
            raise LabError(
                f"Processes see different saved progress (steps {', '.join(map(str, seen))}): "
                "accepted is one FUNLORA_HOME for all of them."
            )

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def ask(self, stop: Callable[[], str | None], step: int) -> str | None:
        """``stop()``; of several processes the first one's answer for all of them, at every tenth step only."""
        if self.size == 1:
            return stop()
        if step % ASK_EVERY:
            return None
        answer = [stop() if self.rank == 0 else None]
        dist.broadcast_object_list(answer, device=torch.device("cpu"))
        return answer[0]

    def agree(self, value: bool) -> bool:
        """The first process's ``value``, for all of them."""
        if self.size == 1:
            return value
        answer = [value]
        dist.broadcast_object_list(answer, device=torch.device("cpu"))
        return answer[0]

    def store(self, folder: Path | None) -> Store:
        return Store(folder) if self.rank == 0 else _ReadingStore(folder)


class _ReadStage(Stage):
    """A stage that another process writes: everything is read, nothing is written."""

    @contextmanager
    def held(self, runtime):
        yield

    def open(self) -> None:
        pass

    def log(self, event: dict) -> dict:
        return event

    def save_state(self, tensors: dict[str, Tensor], **facts) -> None:
        pass

    def resume(self) -> tuple[dict[str, Tensor], dict] | None:
        return read_tensors(self.state_file) if self.state_file.exists() else None

    def finish(self, tensors: dict[str, Tensor], **facts) -> None:
        pass


class _ReadingStore(Store):
    def stage(self, kind: str, **inputs) -> Stage:
        stage = super().stage(kind, **inputs)
        return _ReadStage(stage.folder, stage.kind, stage.key, stage.inputs)


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def own_device(device: torch.device) -> torch.device:
    """The device of this process of several: each its own GPU of the machine, or the CPU."""
    if device.type != "cuda" or not launched():
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


@contextmanager
def team_of(device: torch.device) -> Iterator[Team]:
    """The team torchrun made, for the length of a block."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Team(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
