"""Drawing the images of a class: in chunks of fixed composition, each saved once, so that sets are nested.

Image i of a class depends on the class's weights, the solver, the seed, the chunk size and i: not on how many images
are asked for, on other classes or on the task after which it is drawn. A finished class is drawn once and for all.
"""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from funlora_lab.config import Experiment
from funlora_lab.data import to_bytes
from funlora_lab.errors import Damaged
from funlora_lab.flow import Solver, Velocity, noise
from funlora_lab.speed import autocast
from funlora_lab.store import Stage
from funlora_lab.training import Event, Runtime, memory_for


def solver_of(experiment: Experiment) -> Solver:
    return Solver(experiment.solver, experiment.steps, experiment.tolerance)


def draw_chunk(
    velocity: Velocity, experiment: Experiment, cls: int, chunk: int, device: torch.device
) -> tuple[Tensor, int]:
    """(images in [-1, 1], evaluations of the network) of one whole chunk (chunk, C, H, W)."""
    size = experiment.image_size
    x0 = noise(experiment.seed, cls, chunk, (experiment.chunk, experiment.channels, size, size))
    with autocast(experiment.precision, device):
        return solver_of(experiment).integrate(velocity, x0.to(device))


def draw(stage: Stage, velocity, experiment: Experiment, cls: int, count: int, runtime: Runtime) -> Iterator[Event]:
    """Draw the first ``count`` images of a class, reusing stored chunks.

    Returns (uint8 images (count, C, H, W), seconds that drawing all their chunks took, whenever that was).

    ``velocity()`` builds the class's velocity and is only called when something is left to draw.
    """
    images, seconds, field = [], 0.0, None
    for chunk in range(-(-count // experiment.chunk)):
        path = stage.folder / f"chunk-{chunk:05d}.safetensors"
        fresh = not path.exists()
        if fresh:
            runtime.check()
            with stage.held(runtime), memory_for("chunk"):
                if not path.exists():
                    field = field or velocity()
                    begun = time.monotonic()
                    drawn, evaluations = draw_chunk(field, experiment, cls, chunk, runtime.device)
                    pixels = to_bytes(drawn).cpu()
                    spent = time.monotonic() - begun
                    stage.write(
                        path, {"images": pixels}, {"evaluations": evaluations, "seconds": spent, "chunk": chunk}
                    )
        tensors, facts = stage.read(path)
        if facts.get("chunk", chunk) != chunk:
            raise Damaged(path, f"{path} is foreign: it holds chunk {facts['chunk']}")
        images.append(tensors["images"])
        seconds += facts["seconds"]
        event = {
            "event": "samples",
            "class": cls,
            "drawn": min(count, (chunk + 1) * experiment.chunk),
            "of": count,
            "evaluations": facts["evaluations"],
            "seconds": round(seconds, 3),
        }
        yield event if fresh else {**event, "replayed": True}
    return torch.cat(images)[:count], seconds
