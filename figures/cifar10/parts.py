"""The parts of a lease of one GPU, which ``lease.py`` calls one after the other.

    parts.py check KEEP             what holds here, a line a check; KEEP/without names what did not, to be left out
    parts.py speed KEEP SECONDS     KEEP/speed.jsonl, a flushed line a row, for at most so many seconds
    parts.py data ARCHIVE KEEP      pictures unpacked into KEEP/data and decoded; without an archive those of DATA
    parts.py pack RUNS OUT          what travels back, 60 MiB in all: the full network's base in bf16, small files
    parts.py unpack OUT KEEP        and there again: KEEP/runs, and KEEP/base.safetensors for base_weights=

SETTINGS (key=value with spaces) make it a rehearsal at another size.
"""

import contextlib
import io
import json
import os
import sys
import tarfile
import tempfile
import time
import zlib
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from funlora_lab import continual, preset, verify
from funlora_lab.data import load
from funlora_lab.errors import Stopped
from funlora_lab.experiment import override
from funlora_lab.store import Run, fingerprint, read_tensors
from funlora_lab.training import Runtime, convolutions_in, pick_device, prepared

EXPERIMENT = override(preset("cifar10"), ["precision=bf16", *os.environ.get("SETTINGS", "").split()])
LIMIT, PART, SLACK = 60 * 2**20, 15 * 2**20, 2**16  # bytes in all, of one file, and kept free in the tar file


# ---- check


def kernels_are_right(device: torch.device, folder: Path) -> bool:
    import kernels

    return kernels.check("check", "cuda")


def stop_after(questions: int):
    left = iter(range(questions))
    return lambda: None if next(left, None) is not None else "enough"


def trained(device: torch.device, home: Path, stops: int = 0) -> dict[str, str]:
    """Fingerprints of the artefacts of a whole smoke run with dropout, stopped so many times on the way."""
    experiment = preset("smoke").but(dropout=0.1, precision=EXPERIMENT.precision, steps=8)  # enough to be recorded
    for _ in range(stops):
        with contextlib.suppress(Stopped):
            continual.run(experiment, runtime=Runtime(device, stop=stop_after(30)), home=home)
    continual.run(experiment, runtime=Runtime(device), home=home)
    files = sorted((home / "artefacts").glob("*/*.safetensors"))
    return {file.parent.name + file.name: fingerprint(read_tensors(file)[0]) for file in files}


def resumes_exactly(device: torch.device, folder: Path) -> bool:
    return trained(device, folder / "whole") == trained(device, folder / "stopped", 4)


def graph_is_the_eager_step(device: torch.device, folder: Path) -> bool:
    os.environ["FUNLORA_WITHOUT"] = "graph"
    try:
        return trained(device, folder / "eager") == trained(device, folder / "whole")
    finally:
        del os.environ["FUNLORA_WITHOUT"]


def nothing_is_forgotten(device: torch.device, folder: Path) -> bool:
    run = next(Run.at(path) for path in sorted((folder / "whole").glob("smoke-*")))
    found = [verify(run, device), verify(run, torch.device("cpu"))]
    print(*(sentence for each in found for sentence in each.sentences()), sep="\n")
    return all(each.unchanged for each in found)


CHECKS = {  # what it is called, what is left out where it fails
    "our kernels against float64": (kernels_are_right, "kernels"),
    "a run stopped four times, bit for bit": (resumes_exactly, None),
    "a captured step and the same step eager, bit for bit": (graph_is_the_eager_step, "graph"),
    "verify, on the GPU and on the CPU": (nothing_is_forgotten, None),
}


def check(out: Path) -> None:
    device, without = pick_device("cuda"), []
    print(torch.__version__, torch.cuda.get_device_name(device), torch.backends.cudnn.version(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, (holds, feature) in CHECKS.items():
            begun = time.monotonic()
            try:
                good, why = holds(device, Path(folder)), ""
            except Exception as reason:  # whatever it is, the lease goes on
                good, why = False, f": {type(reason).__name__} {reason}".splitlines()[0]
            without += [feature] if feature and not good else []
            print(f"{'ok' if good else 'WRONG':<6}{name}, {time.monotonic() - begun:.1f} s{why}", flush=True)
    (out / "without").write_text(",".join(without))


# ---- speed


def rows(contenders, B: int):
    """(name, images a step or evaluation, a function that makes its turn, FUNLORA_WITHOUT) of everything measured."""
    device = contenders.runtime.device

    def base(batch: int):
        return lambda: contenders.base_steps(batch, EXPERIMENT.precision)

    def adapters(K: int, N: int):
        return lambda: contenders.adapter_steps(K, N)

    yield f"base {B}", B, base(B), ""
    yield f"adapters 2 x {B // 2}", B, adapters(2, B // 2), ""
    yield f"adapters 8 x {B // 2}", 8 * (B // 2), adapters(8, B // 2), ""
    for name in ("merged", "plain"):
        yield f"sampling {name} {4 * B}", 8 * B, lambda name=name: contenders.sampling(4 * B)[name], ""
    yield f"base {B} without graph", B, base(B), "graph"
    yield f"base {B} without kernels", B, base(B), "kernels"
    yield f"base {B} without determinism", B, base(B), "determinism"
    yield f"base {2 * B}", 2 * B, base(2 * B), ""
    yield "adapters 20 x 6", 120, adapters(20, 6), ""
    for precision in ("bf16", "fp32"):
        name = convolutions_in(precision, device)
        yield f"torchcfm {name} {B}", B, lambda precision=precision: contenders.torchcfm_steps(B, precision), ""
    for K, N in ((2, B // 2), (20, 6)):
        for form in ("one by one", "unfolded", "grouped"):
            turn = lambda K=K, N=N, form=form: contenders.forms(K, N)[form]  # noqa: E731
            yield f"largest convolution {K} x {N} {form}", K * N, turn, ""
    for channels in (3, 8):  # whether the first and last convolution's three should be padded
        turn = lambda channels=channels: first_convolution(channels, B, device, contenders.steps)  # noqa: E731
        yield f"first convolution of {channels} channels", B, turn, ""


def first_convolution(channels: int, B: int, device: torch.device, steps: int):
    """A function that convolves B images in bf16 so many times, forward and backward."""
    size, width = EXPERIMENT.image_size, EXPERIMENT.network.base_channels
    x = torch.zeros(B, channels, size, size, device=device, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    layer = prepared(torch.nn.Conv2d(channels, width, 3, padding=1).bfloat16(), device)

    def turn() -> None:
        for _ in range(steps):
            grads = torch.autograd.grad(layer(x).sum(), (x, layer.weight))
        grads[1].sum().item()

    return turn


def speed(out: Path, seconds: float) -> None:
    from benchmark import BASE, Contenders, Race, matrix_rate

    device, end = pick_device("cuda"), time.monotonic() + seconds
    steps, turns = (20, 3) if EXPERIMENT.base.batch >= 64 else (8, 1)
    with (out / "speed.jsonl").open("w") as file, tempfile.TemporaryDirectory() as folder:

        def note(**row) -> None:
            print(line := json.dumps(row), flush=True)
            file.write(line + "\n")
            file.flush()

        kinds = {convolutions_in("bf16", device): torch.bfloat16, convolutions_in("fp32", device): torch.float32}
        note(row="matrix products", flops={name: matrix_rate(device, dtype, 0.2) for name, dtype in kinds.items()})
        contenders = Contenders(EXPERIMENT, Runtime(device), Path(folder), len(BASE) + 20, steps)
        given = os.environ.get("FUNLORA_WITHOUT", "")
        for name, images, make, without in rows(contenders, EXPERIMENT.base.batch):
            if time.monotonic() > end:
                note(row=name, skipped="no time left")
                continue
            os.environ["FUNLORA_WITHOUT"] = ",".join(filter(None, (given, without)))
            try:
                race = Race(device, steps).run({name: make()}, turns)
                rate = images / race.seconds(name)
                note(row=name, images_per_second=rate, seconds=race.times[name], bytes=race.memory[name])
            except Exception as reason:  # one row less
                note(row=name, failed=f"{type(reason).__name__}: {reason}".splitlines()[0])
            torch.cuda.empty_cache()


# ---- pack


def planes(tensors: dict[str, torch.Tensor]) -> bytes:
    """Weights rounded to bf16, exponents apart from the rest, each deflated: 42 MiB of the paper's 35.75 M."""
    flat = torch.cat([value.to(torch.bfloat16).flatten() for value in tensors.values()])
    bits = flat.view(torch.uint8).unflatten(0, (-1, 2))
    parts = [zlib.compress(bits[:, i].contiguous().numpy().tobytes(), 6) for i in (0, 1)]
    head = json.dumps({"shapes": {name: list(value.shape) for name, value in tensors.items()}, "low": len(parts[0])})
    return len(head).to_bytes(8, "little") + head.encode() + parts[0] + parts[1]


def unplaned(content: bytes) -> dict[str, torch.Tensor]:
    size = int.from_bytes(content[:8], "little")
    head, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    both = [
        torch.frombuffer(bytearray(zlib.decompress(part)), dtype=torch.uint8)
        for part in (rest[: head["low"]], rest[head["low"] :])
    ]
    flat, tensors = torch.stack(both, 1).flatten().view(torch.bfloat16).float(), {}
    for name, shape in head["shapes"].items():
        count = torch.Size(shape).numel()
        tensors[name], flat = flat[:count].reshape(shape), flat[count:]
    return tensors


def base_of(runs: Path) -> dict[str, torch.Tensor]:
    """The largest network's averaged weights, also of a training that is still going on."""
    files = [path for path in runs.glob("artefacts/network-*/*.safetensors") if path.stem in ("result", "state")]
    if not files:
        return {}
    largest = max(files, key=lambda path: path.stat().st_size)
    tensors, prefix = read_tensors(largest)[0], "average/" if largest.stem == "state" else ""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def pack(runs: Path, out: Path) -> None:
    """The base, and of all other files as many as there is room for, the smallest first."""
    base = base_of(runs)
    packed = planes(base) if base else b""
    for i in range(0, len(packed), PART):
        (out / f"base-{i // PART}.planes").write_bytes(packed[i : i + PART])
    files = [path for path in runs.rglob("*") if path.is_file() and "images" not in path.relative_to(runs).parts]
    archive, skipped, room = io.BytesIO(), 0, min(PART, LIMIT - len(packed))
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for path in sorted(files, key=lambda path: path.stat().st_size):
            if archive.tell() + path.stat().st_size + SLACK < room:
                tar.add(path, path.relative_to(runs))
            else:
                skipped += 1
    (out / "small.tar.gz").write_bytes(archive.getvalue())
    print(f"packed {len(archive.getvalue()):,} bytes of files, {len(packed):,} of a base; left out: {skipped}")


def unpack(carried: Path, keep: Path) -> None:
    """What came back -> KEEP/runs, and KEEP/base.safetensors for ``base_weights``."""
    import safetensors.torch

    with tarfile.open(carried / "small.tar.gz") as tar:
        tar.extractall(keep / "runs", filter="data")
    if parts := sorted(carried.glob("base-*.planes")):
        safetensors.torch.save_file(unplaned(b"".join(map(Path.read_bytes, parts))), keep / "base.safetensors")


# ---- data


def data(archive: str, keep: Path) -> None:
    """Pictures out of a tar file, and decoded once for both sizes of the network."""
    folder = keep / "data"
    if archive and not folder.exists():
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    load(override(EXPERIMENT, os.environ.get("DATA", "").split()))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["check", out]:
            check(Path(out))
        case ["speed", out, seconds]:
            speed(Path(out), float(seconds))
        case ["data", archive, keep]:
            data(archive, Path(keep))
        case ["pack", runs, out]:
            pack(Path(runs), Path(out))
        case ["unpack", carried, keep]:
            unpack(Path(carried), Path(keep))
        case _:
            sys.exit(__doc__)
