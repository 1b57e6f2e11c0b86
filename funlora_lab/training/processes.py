"""Several processes train one network: ``torchrun --nproc-per-node 8 -m funlora_lab run imagenet100``, or Ray Train.

Each takes every size-th image of the same global batch: the result is one process's up to rounding and dropout masks.
Process 0 alone reads and writes artefacts and sends the others what it read: they share no file system.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from funlora_lab.errors import LabError
from funlora_lab.store import Artefact, Store

ASK_EVERY = 10  # steps between two questions whether to stop, to which all processes need the same answer
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # of torch.distributed, by the kind of device
PATIENCE = timedelta(days=7)  # with which a process waits for the others, which may have many pictures to read


@dataclass(frozen=True)
class Team:
    """The processes that train together; the default is one process alone, for which everything is as without."""

    rank: int = 0
    size: int = 1

    @classmethod
    def joined(cls) -> "Team":
        """All processes that torch.distributed has joined with this one, if any."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    @property
    def key(self) -> tuple[int, ...]:
        """Part of the key of this process's dropout masks."""
        return () if self.size == 1 else (self.rank, self.size)

    def wrap(self, net: nn.Module) -> nn.Module:
        """The network whose backward pass averages gradients over the team."""
        return net if self.size == 1 else DistributedDataParallel(net)

    def part(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """This process's images of a global batch; LabError where there is none for every process."""
        if len(batch[0]) < self.size:
            raise LabError(f"base_batch={len(batch[0])}: accepted is at least the number of processes, {self.size}.")
        return tuple(each[self.rank :: self.size] for each in batch)

    def mean(self, losses: Tensor, count: int) -> Tensor:
        """The mean loss over the global batch of ``count`` images, with the gradient of this process's part."""
        if self.size == 1:
            return losses.mean()
        mine = losses.sum() * (self.size / count)  # gradients are averaged over the processes
        mean = mine.detach() / self.size
        dist.all_reduce(mean)
        return mine - mine.detach() + mean

    def agree(self, value):
        """The first process's ``value``, for all of them."""
        answer = [value]
        if self.size > 1:
            dist.broadcast_object_list(answer, device=torch.device("cpu"))
        return answer[0]

    def ask(self, stop: Callable[[], str | None], step: int) -> str | None:
        """``stop()``; of several processes the first one's answer, at every tenth step only."""
        if self.size > 1 and step % ASK_EVERY:
            return None
        return self.agree(stop() if self.rank == 0 else None)

    def store(self, folder: Path) -> Store:
        """The store of a home, which is the first process's."""
        return Store(folder, Artefact if self.rank == 0 else _OthersArtefact)


class _OthersArtefact(Artefact):
    """An artefact of another process: here nothing is read or written, and what it holds is agreed on."""

    def held(self, check, tell):
        return nullcontext()

    def log(self, event: dict | None = None, **facts) -> dict | None:
        return event

    open = save_state = finish = forget_progress = resume = result = log


def launched() -> bool:
    """Whether torchrun or Ray Train started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def own_device(device: torch.device) -> torch.device:
    """The device of this process of several: each its own GPU of the machine, or the CPU."""
    own = device.type == "cuda" and launched()
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()) if own else device


@contextmanager
def team_of(device: torch.device) -> Iterator[Team]:
    """The team torchrun made, for the length of a block."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(BACKENDS[device.type], timeout=PATIENCE)
    try:
        yield Team.joined()
    finally:
        dist.destroy_process_group()
