"""Random numbers as a function of their name: every draw takes a fresh generator of (seed, purpose, class, step).

So a resumed run needs no generator state, and a class draws the same numbers whoever is trained before or beside it.
"""

import hashlib
import json
import math
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


def stream(seed: int, *key: str | int) -> torch.Generator:
    """The generator of one purpose."""
    return torch.Generator().manual_seed(seed_of(seed, *key))


@contextmanager
def seeded(seed: int, *key: str | int):
    """Run a block (dropout, weight initialisation) with PyTorch's global generator of the CPU seeded, then restore it.

    Without a key ``seed`` is taken as it is.
    """
    with _GLOBAL_GENERATORS, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, *key) if key else seed)
        yield


class Streams:
    """K streams of random numbers, one from each of K seeds, in the order in which they are asked for.

    On a CPU they are PyTorch's generators. On a GPU (``counted``) a number is a function of its stream's seed and its
    place in it, computed by tensor operations: so a step recorded once draws anew when the seeds in its memory change.
    """

    def __init__(self, seeds: Tensor, counted: bool | None = None):  # int64 (K,)
        self.seeds, self.drawn = seeds, 0
        counted = seeds.is_cuda if counted is None else counted
        self.generators = [] if counted else [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]

    def bits(self, n: int) -> Tensor:
        """The next n numbers of SplitMix64 (Steele, Lea & Flood 2014) of every stream: int64 (K, n)."""
        places = torch.arange(self.drawn + 1, self.drawn + 1 + n, device=self.seeds.device)
        self.drawn += n
        z = self.seeds[:, None] + places * (0x9E3779B97F4A7C15 - 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ ((z >> shift) & (2 ** (64 - shift) - 1))) * (factor - 2**64)
        return z ^ ((z >> 31) & (2**33 - 1))

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1): (K, *shape)."""
        if self.generators:
            return torch.stack([torch.rand(shape, generator=generator) for generator in self.generators])
        return ((self.bits(math.prod(shape)) >> 40 & 0xFFFFFF).float() / 2**24).unflatten(1, shape)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers (K, *shape); the counted ones by Box and Muller."""
        if self.generators:
            return torch.stack([torch.randn(shape, generator=generator) for generator in self.generators])
        n = math.prod(shape)
        bits = self.bits(-(-n // 2))
        radius = ((((bits >> 32) & 0xFFFFFFFF).float() + 1) / 2**32).log().mul(-2).sqrt()
        angle = (bits & 0xFFFFFF).float() * (2 * math.pi / 2**24)
        return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :n].unflatten(1, shape)

    def integers(self, end: int, *shape: int) -> Tensor:
        """Whole numbers from 0 up to, not including, ``end``: int64 (K, *shape)."""
        if self.generators:
            return torch.stack([torch.randint(end, shape, generator=generator) for generator in self.generators])
        return (self.uniform(*shape) * end).long()


class Shuffle:
    """Endless passes over ``n`` items, each pass a permutation that depends on (seed, key, pass number) alone."""

    def __init__(self, n: int, seed: int, *key: str | int):
        self.n = n
        self.permutation = lru_cache(2)(lambda k: torch.randperm(n, generator=stream(seed, *key, "pass", k)))

    def batch(self, step: int, size: int) -> Tensor:
        """Indices (size,) of batch ``step``: items ``step*size`` up to ``(step+1)*size`` of the endless sequence."""
        number, offset = divmod(step * size, self.n)
        passes = [self.permutation(number + i) for i in range((offset + size - 1) // self.n + 1)]
        return (torch.cat(passes) if passes[1:] else passes[0])[offset : offset + size]
