"""How fast the steps are: times, ratios, memory, and the share of the device's own rate (``funlora bench``).

Things to compare take turns, repetition by repetition, in one process, and a ratio is the median of the ratios of
neighbouring turns: a machine that slows down for a while slows both.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from funlora_lab.adapters import Adapters, stack
from funlora_lab.config import Experiment
from funlora_lab.contenders import BASE, Contenders, PerImage, Turn, torchcfm_unet
from funlora_lab.continual import provenance
from funlora_lab.network import build_unet
from funlora_lab.speed import arithmetic, has_bf16
from funlora_lab.training import Runtime

LANES = (1, 5, 20)  # classes side by side in the comparison at a constant number of images
RATIOS = {
    "base_vs_torchcfm_fp32": "our base step in fp32 / torchcfm's U-Net in an ordinary fp32 loop",
    "base_vs_torchcfm_bf16": "our base step in bf16 / torchcfm's U-Net in an ordinary fp32 loop",
    "base_bf16_vs_torchcfm_autocast": "our base step in bf16 / torchcfm's U-Net in the same loop under bf16 autocast",
    "adapter_vs_base": "adapter step of two classes / base step, at the same number of images",
    "adapter_vs_per_image": "adapter step of two classes / the same with kernels of its own for every image",
    "lanes20x6_vs_1x120": "adapter step of 20 classes x 6 images / 1 class x 120 images",
    "merged_vs_plain": "drawing images of an adapted class / of a class of the plain network",
}


def clock(device: torch.device) -> float:
    """Seconds; on a single CPU thread those of this process alone, which other programs disturb least."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


@dataclass
class Race:
    """Seconds a step and bytes of working memory of contenders that take turns."""

    device: torch.device
    steps: int = 1  # taken in one turn
    times: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)

    def run(self, turns: dict[str, Turn], repeats: int) -> "Race":
        """One round to warm up, in which memory is measured, then ``repeats`` rounds that count."""
        for repeat in range(repeats + 1):
            for name, turn in turns.items():
                with peak_memory(self.device) as peak:
                    begun = clock(self.device)
                    turn()
                    seconds = (clock(self.device) - begun) / self.steps
                    if repeat == 0:
                        self.memory[name], self.times[name] = peak(), []
                    else:
                        self.times[name].append(seconds)
        return self

    def ratio(self, ours: str, theirs: str) -> float:
        """Median over neighbouring turns of our time by theirs: below 1 is faster."""
        return median(a / b for a, b in zip(self.times[ours], self.times[theirs], strict=True))

    def seconds(self, name: str) -> float:
        return median(self.times[name])


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of square matrix products on the device: the best of the turns that fit into ``seconds``."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best, end = 0.0, None
    while end is None or clock(device) < end:
        begun = clock(device)
        for _ in range(repeat := 20 if device.type == "cuda" else 1):
            c = a @ b
        c[0, 0].item()
        if end is None:  # the first turn only warms up
            end = clock(device) + seconds
            continue
        best = max(best, 2 * n**3 * repeat / (clock(device) - begun))
    return best


def flops(experiment: Experiment, device: torch.device, batch: int = 2) -> dict[str, float]:
    """FLOPs an image of a base step, an adapter step (two classes) and one evaluation, as many as this device does."""
    e = experiment
    net = build_unet(e, 2).to(device)
    x = torch.zeros(batch, e.channels, e.image_size, e.image_size, device=device)
    t, y = torch.zeros(batch, device=device), torch.zeros(batch, dtype=torch.long, device=device)

    def counted(run: Callable) -> float:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused kernels are not counted
            run()
        return counter.get_total_flops() / batch

    base = counted(lambda: net(t, x, y).sum().backward())
    net.requires_grad_(False)
    adapters = Adapters(net, e)
    rows = stack([adapters.start(0), adapters.start(1)])
    rows = {name: value.to(device).requires_grad_() for name, value in rows.items()}
    return {
        "base": base,
        "adapter": counted(lambda: adapters.velocity(rows, 2)(t, x).sum().backward()),
        "sampling": counted(lambda: net(t, x, y)),
    }


@contextlib.contextmanager
def peak_memory(device: torch.device):
    """A function that says how many bytes the block took at most beyond what was held before it.

    On the GPU of PyTorch's own; on Linux of the whole process, so blocks freed before it are counted as held.
    """
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - held
        return
    try:
        clear.write_text("5")  # starts the high-water mark anew
    except OSError:
        yield lambda: None
        return

    def kilobytes(name: str) -> int:
        return int(status.read_text().split(name + ":")[1].split()[0])

    held = kilobytes("VmRSS")
    yield lambda: (kilobytes("VmHWM") - held) * 1024


def measure(
    experiment: Experiment,
    runtime: Runtime,
    batch: int = 0,
    repeats: int = 0,
    lane_images: int = 120,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict:
    """All comparisons for one configuration on one device, as one object (see ``RATIOS``).

    ``batch`` images a base step (0: 8 on a CPU, the configuration's own on a GPU), ``repeats`` counted turns of every
    contender (0: 5). What needs bf16 is None where the device has no instructions for it. Raises LabError before
    anything is measured when torchcfm is missing.
    """
    torchcfm_unet(experiment, 1, device=torch.device("meta"))
    device = runtime.device
    bf16 = has_bf16(device.type)
    e = experiment.but(method="funlora", precision=arithmetic(experiment.precision, device))
    cuda = device.type == "cuda"
    B, repeats, K = batch or (e.base_batch if cuda else 8), repeats or 5, max(LANES)
    rates = {
        "fp32": matrix_rate(device, torch.float32),
        "bf16": matrix_rate(device, torch.bfloat16) if bf16 else None,
    }
    work = flops(e, device)
    expected = work["base"] * B / rates[e.precision]  # seconds, at the device's full rate
    steps = max(1, min(20, round(0.2 / expected)))
    with tempfile.TemporaryDirectory() as folder:
        contenders = Contenders(e, runtime, Path(folder), len(BASE) + K, steps)
        about = provenance(device, contenders.dataset, e.precision) | {"compile": runtime.compile}

        def race(what: str, turns: dict[str, Turn], repeats: int) -> Race:
            say(what)
            done = Race(device, steps).run(turns, repeats)
            contenders.close()
            return done

        turns = {}
        for precision in ("fp32", "bf16") if bf16 else ("fp32",):
            turns[f"ours {precision}"] = contenders.base_step(B, precision)
            turns[f"torchcfm {precision}"] = contenders.torchcfm_step(B, precision)
        turns["adapter"] = contenders.adapter_step(2, B // 2)
        turns["per image"] = contenders.adapter_step(2, B // 2, PerImage)
        base = race("base and adapter steps", turns, repeats)
        sampling = race("sampling", contenders.sampling(B), repeats)
        turns = {f"{k} x {lane_images // k}": contenders.adapter_step(k, lane_images // k) for k in LANES}
        lanes = race("adapter steps of more and more classes", turns, max(1, repeats // 2))
        forms = {}
        for k in (2, K):
            shape = f"{k} x {lane_images // k}"
            done = race(f"forms of the per-class convolution, {shape}", contenders.forms(k, lane_images // k), repeats)
            forms[shape] = {name: done.seconds(name) for name in done.times}
    ours = f"ours {e.precision}"
    images = {
        "base": B / base.seconds(ours),
        "adapter": B // 2 * 2 / base.seconds("adapter"),
        "sampling": 2 * B / sampling.seconds("merged"),
    }
    one, most = f"1 x {lane_images}", f"{K} x {lane_images // K}"
    return {
        "preset": e.preset,
        "precision": e.precision,
        "batch": B,
        "repeats": repeats,
        "steps_per_turn": steps,
        "provenance": about,
        "matrix_flops_per_second": rates,
        "images_per_second": images,
        "gflop_per_image": {name: value / 1e9 for name, value in work.items()},
        "share_of_matrix_rate": {name: images[name] * work[name] / rates[e.precision] for name in images},
        "base_vs_torchcfm_fp32": base.ratio("ours fp32", "torchcfm fp32"),
        "base_vs_torchcfm_bf16": base.ratio("ours bf16", "torchcfm fp32") if bf16 else None,
        "base_bf16_vs_torchcfm_autocast": base.ratio("ours bf16", "torchcfm bf16") if bf16 else None,
        "adapter_vs_base": base.ratio("adapter", ours),
        "adapter_vs_per_image": base.ratio("adapter", "per image"),
        "lanes20x6_vs_1x120": lanes.ratio(most, one),
        "merged_vs_plain": sampling.ratio("merged", "plain"),
        "seconds_per_step": {name: base.seconds(name) for name in base.times},
        "seconds_per_adapter_step": {name: lanes.seconds(name) for name in lanes.times},
        "seconds_of_largest_convolution": forms,
        "memory_bytes": base.memory | {f"adapter {name}": value for name, value in lanes.memory.items()},
    }


def table(result: dict) -> str:
    """The comparisons as lines of text."""

    def megabytes(value: int | None) -> str:
        return "not measured" if value is None else f"{value / 2**20:,.0f} MiB"

    rate = result["matrix_flops_per_second"]
    about = result["provenance"]
    lines = [
        f"{result['preset']} in {result['precision']}, {result['batch']} images a step, on {about['device']}, "
        f"{about['threads']} threads, torch {about['versions']['torch']}, compile {about['compile']}",
        f"matrix products: {rate['fp32'] / 1e12:.2f} TFLOP/s in fp32, "
        + (f"{rate['bf16'] / 1e12:.2f} in bf16" if rate["bf16"] else "no instructions for bf16"),
        "",
        f"{'':<10} {'images/s':>10} {'GFLOP/image':>12} {'of matrix rate':>15}",
    ]
    for name, images in result["images_per_second"].items():
        share = result["share_of_matrix_rate"][name]
        lines.append(f"{name:<10} {images:>10.1f} {result['gflop_per_image'][name]:>12.3f} {share:>15.1%}")
    lines += ["(sampling: network evaluations of one image)", "", f"{'ratio':>6}"]
    for name, meaning in RATIOS.items():
        ratio = result[name]
        lines.append(f"{'-' if ratio is None else format(ratio, '.2f'):>6}  {name}: {meaning}")
    lines += ["", f"{'seconds':>9}  {'memory':>14}"]
    for name, seconds in (result["seconds_per_step"]).items():
        lines.append(f"{seconds:>9.4f}  {megabytes(result['memory_bytes'][name]):>14}  {name}")
    for name, seconds in result["seconds_per_adapter_step"].items():
        memory = megabytes(result["memory_bytes"][f"adapter {name}"])
        lines.append(f"{seconds:>9.4f}  {memory:>14}  adapter, {name} images")
    for shape, forms in result["seconds_of_largest_convolution"].items():
        for name, seconds in forms.items():
            lines.append(f"{seconds:>9.4f}  {'':>14}  largest adapted convolution and its gradients, {shape}, {name}")
    return "\n".join(lines)
