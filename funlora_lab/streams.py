"""Random numbers that are a function of their name: no generator state is ever carried from step to step.

Every draw takes a fresh generator seeded from (seed, purpose, class, step). So a resumed run needs no saved
generator state, a class draws the same numbers whoever is trained beside it, and the order of tasks is irrelevant.
"""

import hashlib
import json
import threading
from contextlib import contextmanager

import torch
from torch import Tensor


def seed_of(seed: int, *key: str | int) -> int:
    """A 63-bit seed derived from ``seed`` and a readable key such as ``("noise", 7, 120)``."""
    digest = hashlib.blake2b(json.dumps([seed, *key]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(seed: int, *key: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one purpose at one step, on ``device``; streams of different devices differ."""
    return torch.Generator(device).manual_seed(seed_of(seed, *key))


_GLOBAL_GENERATORS = threading.RLock()  # PyTorch's own are shared by all threads: one ``seeded`` block at a time


@contextmanager
def seeded(seed: int, *key: str | int, device: torch.device | str = "cpu"):
    """Run a block (dropout, weight initialisation) with PyTorch's global generators seeded, then restore them."""
    device = torch.device(device)
    with _GLOBAL_GENERATORS, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of(seed, *key))
        yield


class Shuffle:
    """Endless passes over ``n`` items, each pass a permutation that depends on (seed, key, pass number) alone."""

    def __init__(self, n: int, seed: int, *key: str | int):
        self.n, self.seed, self.key = n, seed, key
        self._passes: dict[int, Tensor] = {}

    def _pass(self, number: int) -> Tensor:
        if number not in self._passes:
            self._passes = {k: v for k, v in self._passes.items() if k >= number - 1}
            self._passes[number] = torch.randperm(self.n, generator=stream(self.seed, *self.key, "pass", number))
        return self._passes[number]

    def batch(self, step: int, size: int) -> Tensor:
        """Indices (size,) of batch ``step``: items ``step*size`` up to ``(step+1)*size`` of the endless sequence."""
        first, last = step * size, (step + 1) * size
        passes = range(first // self.n, (last - 1) // self.n + 1)
        joined = torch.cat([self._pass(number) for number in passes])
        offset = first - passes[0] * self.n
        return joined[offset : offset + size]
