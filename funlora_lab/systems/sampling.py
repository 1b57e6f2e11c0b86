"""Drawing the images of a class: in chunks of fixed composition, each saved once, so that sets are nested.

Image i of a class depends on the class's weights, the solver, the seed, the chunk size and i: not on how many images
are asked for, on other classes or on the task after which it is drawn.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from funlora_lab.data import to_bytes
from funlora_lab.errors import Damaged, memory_for
from funlora_lab.experiment import Experiment
from funlora_lab.flow import Solver, Velocity, noise
from funlora_lab.store import Artefact
from funlora_lab.systems.generator import Context, Generator, Source
from funlora_lab.training import autocast, computing, replays


def solver_of(experiment: Experiment) -> Solver:
    return Solver(experiment.solver, experiment.steps, experiment.tolerance)


def sample_artefact(context: Context, source: Source, cls: int) -> Artefact:
    """The artefact of one class's samples: it does not depend on how many are asked for."""
    e = context.experiment
    given = {"seed": e.seed, "chunk": e.chunk, "precision": e.precision} | (source.solver or solver_of(e)).identity
    return context.store.artefact("samples", weights=source.key, cls=cls, **given)


@torch.no_grad()
def draw_chunk(velocity: Velocity, e: Experiment, cls: int, chunk: int, device, solver) -> tuple[Tensor, int]:
    """(images in [-1, 1], evaluations of the network) of one whole chunk (chunk, C, H, W)."""
    x0 = noise(e.seed, cls, chunk, (e.chunk, e.channels, e.image_size, e.image_size))
    with computing(device), autocast(e.precision, device):
        return solver.integrate(velocity, x0.to(device))


def stored_chunk(context: Context, artefact: Artefact, chunk: int, make: Callable) -> tuple[dict, dict, bool]:
    """(tensors, facts, whether it was missing) of one chunk of an artefact; ``make()`` draws it: (tensors, facts)."""
    path, runtime = artefact.folder / f"chunk-{chunk:05d}.safetensors", context.runtime
    if fresh := not path.exists():
        context.may_make(artefact, f"/{path.stem}")
        with artefact.held(runtime.check, runtime.tell), memory_for("chunk"):
            if not path.exists():
                tensors, facts = make()
                artefact.write(path, tensors, facts | {"chunk": chunk})
    tensors, facts = artefact.read(path)
    if facts.get("chunk", chunk) != chunk:
        raise Damaged(path, f"{path} is foreign: it holds chunk {facts['chunk']}")
    if fresh:
        runtime.check()
    return tensors, facts, fresh


@torch.no_grad()
def glimpse(generator: Generator, classes: list[int], count: int = 8) -> Tensor:
    """About ``count`` images of classes by a generator in training, uint8 (N, C, H, W): in few steps, nothing kept."""
    e, device, images = generator.context.experiment, generator.context.runtime.device, []
    for cls in classes[:count]:
        shape = (max(1, count // len(classes)), e.channels, e.image_size, e.image_size)
        source, x0 = generator.source(cls), noise(e.seed, cls, 0, shape).to(device)
        with computing(device), autocast(e.precision, device):
            images.append((source.solver or Solver("midpoint", 3)).integrate(source.velocity(), x0)[0])
    return to_bytes(torch.cat(images)).cpu()


def draw(context: Context, source: Source, cls: int, count: int) -> tuple[Tensor, float]:
    """The first ``count`` images of a class: (uint8 (count, C, H, W), seconds that their chunks took when drawn)."""
    e, runtime = context.experiment, context.runtime
    artefact, images, seconds = sample_artefact(context, source, cls), [], 0.0
    velocity, device = cache(source.velocity), runtime.device
    solver = replace(source.solver or solver_of(e), repeated=replays(device))
    drawn_by = source.chunk or (lambda chunk: draw_chunk(velocity(), e, cls, chunk, device, solver))

    def make(chunk: int) -> tuple[dict[str, Tensor], dict]:
        begun = time.monotonic()
        drawn, evaluations = drawn_by(chunk)
        return {"images": to_bytes(drawn).cpu()}, {"evaluations": evaluations, "seconds": time.monotonic() - begun}

    for chunk in range(-(-count // e.chunk)):
        tensors, facts, fresh = stored_chunk(context, artefact, chunk, partial(make, chunk))
        images.append(tensors["images"])
        seconds += facts["seconds"]
        event = {"event": "samples", "class": cls, "drawn": min(count, (chunk + 1) * e.chunk), "of": count}
        event |= {"artefact": artefact.name, "evaluations": facts["evaluations"], "seconds": round(seconds, 3)}
        runtime.report(event if fresh else {**event, "replayed": True})
    return torch.cat(images)[:count], seconds
