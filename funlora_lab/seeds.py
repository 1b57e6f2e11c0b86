"""Random numbers as a function of their name: every draw takes a fresh generator of (seed, purpose, class, step).

So a resumed run needs no generator state, and a class draws the same numbers whoever is trained before or beside it.
"""

import hashlib
import json
import threading
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

_GLOBAL_GENERATORS = threading.RLock()  # PyTorch's own are shared by all threads: one ``seeded`` block at a time


def seed_of(seed: int, *key: str | int) -> int:
    """A 63-bit seed derived from ``seed`` and a readable key such as ``("noise", 7, 120)``."""
    digest = hashlib.blake2b(json.dumps([seed, *key]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(seed: int, *key: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one purpose at one step, on ``device``; streams of different devices differ."""
    return torch.Generator(device).manual_seed(seed_of(seed, *key))


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
        self.n = n
        self.permutation = lru_cache(2)(lambda k: torch.randperm(n, generator=stream(seed, *key, "pass", k)))

    def batch(self, step: int, size: int) -> Tensor:
        """Indices (size,) of batch ``step``: items ``step*size`` up to ``(step+1)*size`` of the endless sequence."""
        number, offset = divmod(step * size, self.n)
        passes = [self.permutation(number + i) for i in range((offset + size - 1) // self.n + 1)]
        return torch.cat(passes)[offset : offset + size]
