"""The certificate of no forgetting: SHA-256, after every task, of the network, of each class's adapter and samples.

Also of a few images of each class drawn there and then; by layer too, so that one that changes later can be named.
"""

from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from funlora_lab.flow import Solver, noise
from funlora_lab.store import fingerprint
from funlora_lab.systems import Context, Generator
from funlora_lab.training import Event, computing

IMAGES = 4  # of each class, drawn anew for every certificate
SOLVER = Solver("euler", 2)  # passes every weight twice; the images need not be good, only sensitive
KEPT_PIXELS = 8  # pixels noted beside a fingerprint, for a comparison on another machine


def machine_of(device: torch.device) -> str:
    """What the last bits of a computation depend on: device, its name, threads and version of PyTorch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = "cpu"
    with suppress(OSError, IndexError):
        name = Path("/proc/cpuinfo").read_text().split("model name")[1].splitlines()[0].strip("\t :")
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def fingerprints_by_layer(tensors: dict[str, Tensor]) -> dict[str, str]:
    """The first 16 digits of the SHA-256 of every layer's tensors, by the layer's name."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        layer = name.rpartition("/" if "/" in name else ".")[0] or name
        layers.setdefault(layer, {})[name] = value
    return {layer: fingerprint(numbers)[:16] for layer, numbers in sorted(layers.items())}


def _entry(file: str, tensors: dict[str, Tensor]) -> dict:
    return {"file": file, "sha256": fingerprint(tensors), "layers": fingerprints_by_layer(tensors)}


@torch.no_grad()
def draw_few(generator: Generator, cls: int) -> Tensor:
    """A fixed few images (IMAGES, C, H, W) of a class from the weights in memory, in full precision, on the CPU."""
    e, device = generator.context.experiment, generator.context.runtime.device
    x0 = noise(e.seed, cls, 0, (IMAGES, e.channels, e.image_size, e.image_size)).to(device)
    with computing(device, exact=True):
        return SOLVER.integrate(generator.source(cls).velocity(), x0)[0].cpu()


def certify(
    context: Context, generator: Generator, task: int, samples: dict[int, tuple[str, Tensor]] | None = None
) -> Event:
    """The certificate after ``task``; ``samples`` are the stored ones of every class seen: (folder's name, images).

    A class that was taken out of the generator is left out.
    """
    classes: dict[str, dict] = {}
    known = {*generator.labels, *generator.rows}
    for cls in (cls for group in context.tasks[: task + 1] for cls in group if cls in known):
        images = draw_few(generator, cls)
        pixels = [round(value, 6) for value in images.flatten()[:: -(-images.numel() // KEPT_PIXELS)].tolist()]
        classes[str(cls)] = {"images": {"sha256": fingerprint({"images": images}), "pixels": pixels}}
        if samples:
            file, stored = samples[cls]
            sha256 = fingerprint({"images": stored})
            classes[str(cls)]["samples"] = {"file": file, "sha256": sha256, "count": len(stored)}
        if cls in generator.rows:
            classes[str(cls)]["adapter"] = _entry(f"adapter-{generator.keys[cls]}", generator.rows[cls])
    about = {"event": "certificate", "task": task + 1, "machine": machine_of(context.runtime.device)}
    backbone = _entry(f"network-{generator.key}", generator.net.state_dict())
    return about | {"backbone": backbone, "classes": classes}
