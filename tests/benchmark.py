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
from contenders import BASE, Contenders, PerImage, Turn, torchcfm_unet
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from funlora_lab.adapters import Adapters, stack
from funlora_lab.continual import provenance
from funlora_lab.experiment import Experiment
from funlora_lab.systems import build_unet
from funlora_lab.training import Runtime, arithmetic, convolutions_in
from funlora_lab.training.device import has_bf16

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
    n, products = (8192, 20) if device.type == "cuda" else (2048, 1)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    tf32 = convolutions_in("fp32", device) == "tf32"  # then products are measured in what convolutions compute in
    before = torch.backends.cuda.matmul.allow_tf32

    def rate() -> float:
        begun = clock(device)
        for _ in range(products):
            c = a @ b
        c[0, 0].item()
        return 2 * n**3 * products / (clock(device) - begun)

    torch.backends.cuda.matmul.allow_tf32 = tf32
    rate()  # to warm up
    best, end = 0.0, clock(device) + seconds
    while clock(device) < end:
        best = max(best, rate())
    torch.backends.cuda.matmul.allow_tf32 = before
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
    adapter = counted(lambda: adapters.velocity(rows, 2)(t, x).sum().backward())
    return {"base": base, "adapter": adapter, "sampling": counted(lambda: net(t, x, y))}


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
    tell: Callable[[str], None] = lambda sentence: None,
    row: Callable[[dict], None] = lambda row: None,
) -> dict:
    """All comparisons for one experiment on one device, as one object (see ``RATIOS``).

    ``batch`` images a base step (0: the experiment's own; on a CPU at most those of a second at the rate of matrix
    products), ``repeats`` counted turns of every contender (0: 5). ``row`` is given every comparison as soon as it is
    made. What needs bf16 is None where the device has no instructions for it. Raises LabError before anything is
    measured when torchcfm is missing.
    """
    torchcfm_unet(experiment, 1, device=torch.device("meta"))
    device = runtime.device
    e = experiment.but(method="funlora", precision=arithmetic(experiment.precision, device))
    repeats, K = repeats or 5, max(LANES)
    precisions = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if has_bf16(device.type) else {})
    bf16 = "bf16" in precisions
    rates = dict.fromkeys(("fp32", "bf16")) | {name: matrix_rate(device, dtype) for name, dtype in precisions.items()}
    row({"matrix_flops_per_second": rates, "fp32_is": convolutions_in("fp32", device)})
    cost = flops(e, device)
    a_second = max(2, int(rates[e.precision] / cost["base"]) // 2 * 2)
    B = batch or (e.base.batch if device.type == "cuda" else min(e.base.batch, a_second))
    steps = max(1, min(20, round(0.2 * rates[e.precision] / (cost["base"] * B))))  # a fifth of a second at full rate
    shapes = {k: f"{k} x {lane_images // k}" for k in (2, *LANES)}
    with tempfile.TemporaryDirectory() as folder:
        contenders = Contenders(e, runtime, Path(folder), len(BASE) + K, steps)
        about = provenance(device, contenders.dataset, e)

        def race(what: str, turns: dict[str, Turn], repeats: int = repeats) -> Race:
            tell(f"{what} ...")
            done = Race(device, steps).run(turns, repeats)
            row({"compared": what, "seconds": {name: done.seconds(name) for name in turns}})
            return done

        def base_and_adapters() -> dict[str, Turn]:
            turns = {}
            for precision in precisions:
                turns[f"ours {precision}"] = contenders.base_steps(B, precision)
                turns[f"torchcfm {precision}"] = contenders.torchcfm_steps(B, precision)
            turns["adapter"] = contenders.adapter_steps(2, B // 2)
            return turns | {"per image": contenders.adapter_steps(2, B // 2, PerImage)}

        def lanes_turns() -> dict[str, Turn]:
            return {shapes[k]: contenders.adapter_steps(k, lane_images // k) for k in LANES}

        base = race("base and adapter steps", base_and_adapters())
        sampling = race("sampling", contenders.sampling(B))
        lanes = race("adapter steps of more and more classes", lanes_turns(), max(1, repeats // 2))
        forms = {}
        for k in (2, K):
            done = race(f"per-class convolution, {shapes[k]}", contenders.forms(k, lane_images // k))
            forms[shapes[k]] = {name: done.seconds(name) for name in done.times}
    ours = f"ours {e.precision}"
    images = {
        "base": B / base.seconds(ours),
        "adapter": B // 2 * 2 / base.seconds("adapter"),
        "sampling": 2 * B / sampling.seconds("merged"),
    }
    return {
        "preset": e.preset,
        "precision": e.precision,
        "batch": B,
        "repeats": repeats,
        "steps_per_turn": steps,
        "provenance": about,
        "matrix_flops_per_second": rates,
        "fp32_is": convolutions_in("fp32", device),
        "images_per_second": images,
        "gflop_per_image": {name: value / 1e9 for name, value in cost.items()},
        "share_of_matrix_rate": {name: images[name] * cost[name] / rates[e.precision] for name in images},
        "base_vs_torchcfm_fp32": base.ratio("ours fp32", "torchcfm fp32"),
        "base_vs_torchcfm_bf16": base.ratio("ours bf16", "torchcfm fp32") if bf16 else None,
        "base_bf16_vs_torchcfm_autocast": base.ratio("ours bf16", "torchcfm bf16") if bf16 else None,
        "adapter_vs_base": base.ratio("adapter", ours),
        "adapter_vs_per_image": base.ratio("adapter", "per image"),
        "lanes20x6_vs_1x120": lanes.ratio(shapes[K], shapes[1]),
        "merged_vs_plain": sampling.ratio("merged", "plain"),
        "seconds_per_step": {name: base.seconds(name) for name in base.times},
        "seconds_per_adapter_step": {name: lanes.seconds(name) for name in lanes.times},
        "seconds_of_largest_convolution": forms,
        "memory_bytes": base.memory | {f"adapter {name}": value for name, value in lanes.memory.items()},
    }


def table(result: dict) -> str:
    """The comparisons as lines of text."""
    rate, about, memory = result["matrix_flops_per_second"], result["provenance"], result["memory_bytes"]
    lines = [
        f"{result['preset']} in {result['precision']}, {result['batch']} images a step, on {about['device']}, "
        f"{about['threads']} threads, torch {about['versions']['torch']}",
        f"matrix products: {rate['fp32'] / 1e12:.2f} TFLOP/s in {result['fp32_is']}, "
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

    def line(seconds: float, size: str, what: str) -> None:
        lines.append(f"{seconds:>9.4f}  {size:>14}  {what}")

    def held(name: str) -> str:
        return "not measured" if memory[name] is None else f"{memory[name] / 2**20:,.0f} MiB"

    for name, seconds in result["seconds_per_step"].items():
        line(seconds, held(name), name)
    for name, seconds in result["seconds_per_adapter_step"].items():
        line(seconds, held(f"adapter {name}"), f"adapter, {name} images")
    for shape, forms in result["seconds_of_largest_convolution"].items():
        for name, seconds in forms.items():
            line(seconds, "", f"largest adapted convolution and its gradients, {shape}, {name}")
    return "\n".join(lines)
