"""Devices: which one, in what layout and arithmetic a network runs on it, and how a GPU is given whole steps at once.

Nothing above knows of it. A step is a function ``advance(inputs)`` of a few small tensors; on a CPU it is called, on a
GPU its kernels are recorded as one CUDA graph and replayed. FUNLORA_WITHOUT=graph,kernels,determinism (any of them)
leaves the graphs out, our own kernels, or the deterministic forms of PyTorch's, to compare or when one of them fails.
"""

import os
import re
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from funlora_lab.errors import LabError
from funlora_lab.seeds import seeded

Inputs = dict[str, Tensor]  # what a step depends on: small tensors, of the same shapes at every step
FEATURES = ("graph", "kernels", "determinism")  # of a GPU, which FUNLORA_WITHOUT leaves out
WARM = 3  # calls of a function before its kernels are recorded, in which libraries set themselves up
ROWS = 32  # steps whose inputs are sent to a GPU together


def without(feature: str) -> bool:
    """Whether FUNLORA_WITHOUT names one of FEATURES."""
    return feature in os.environ.get("FUNLORA_WITHOUT", "").split(",")


def pick_device(word: str) -> torch.device:
    """auto, cpu, cuda or cuda:N; raises LabError when it is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not (known := re.fullmatch(r"auto|cpu|cuda(?::(0|[1-9]\d*))?", word)):
        raise LabError(f"device={word}: accepted is auto, cpu, cuda or cuda:N.")
    if word.startswith("cuda") and int(known[1] or 0) >= count:
        there = f"cuda:0 to cuda:{count - 1}" if count else "auto or cpu"
        raise LabError(f"device={word}: there is no such CUDA device here; accepted is {there}.")
    if unknown := set(filter(None, os.environ.get("FUNLORA_WITHOUT", "").split(","))) - set(FEATURES):
        raise LabError(f"FUNLORA_WITHOUT={','.join(unknown)}: accepted are {', '.join(FEATURES)}, joined by commas.")
    return torch.device(("cuda" if count else "cpu") if word == "auto" else word)


def prepared(network: nn.Module, device: torch.device) -> nn.Module:
    """A network moved to the device, in place; a CPU loses by channels last: 1.37 s a step against 1.22."""
    return network.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format)


@cache
def has_bf16(device_type: str) -> bool:
    """Whether a kind of device multiplies in bf16; a CPU that imitates it took 1.5 s for a convolution of 14 ms."""
    if device_type == "cpu":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cuda.is_bf16_supported(including_emulation=False)


@cache
def arithmetic(precision: str, device: torch.device) -> str:
    """In what ``precision`` is computed on a device: where there are no instructions for bf16 in fp32, said once."""
    if precision == "bf16" and not has_bf16(device.type):
        warnings.warn("This processor has no bf16 instructions: precision=bf16 computes in fp32.", stacklevel=2)
        return "fp32"
    return precision


def convolutions_in(precision: str, device: torch.device) -> str:
    """In what arithmetic convolutions are computed: PyTorch's fp32 on a GPU is TF32, with factors of 10 bits."""
    name = arithmetic(precision, device)
    return "tf32" if name == "fp32" and device.type == "cuda" and torch.backends.cudnn.allow_tf32 else name


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Compute in ``precision``: under bf16 convolutions and products are rounded, weights stay fp32."""
    # on a GPU it keeps no rounded weight to use again: a graph would go on reading it when it is gone
    return torch.autocast(device.type, torch.bfloat16, arithmetic(precision, device) == "bf16", device.type == "cpu")


@contextmanager
def computing(device: torch.device, exact: bool = False):
    """A block of a run's own computing; on a CPU nothing.

    On a GPU PyTorch's deterministic kernels, so that on one card the same inputs give the same bits (FUNLORA_WITHOUT=
    determinism: any), never cuDNN's attention, which fails for some shapes, and where it has to be ``exact`` no TF32.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, filling = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(exact or not without("determinism"))
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]  # the gradients of the efficient kind are never repeatable
    tf32 = torch.backends.cudnn.allow_tf32 and not exact
    try:
        with torch.cuda.device(device), sdpa_kernel(kernels), torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            yield
    finally:
        torch.set_deterministic_debug_mode(before)
        torch.utils.deterministic.fill_uninitialized_memory = filling


class Recorded:
    """A function without arguments, whose work on a GPU is recorded and then replayed as one CUDA graph.

    The first calls run as they are. What cannot be recorded (a function that waits for the GPU) goes on like that, and
    a warning says why. On a CPU every call runs as it is. The next replay overwrites what the last one returned.
    """

    def __init__(self, function: Callable[[], Tensor | None], device: torch.device, record: bool = True):
        self.function, self.device, self.graph, self.calls = function, device, None, 0
        self.warm = WARM if record and device.type == "cuda" and not without("graph") else float("inf")
        self.stream = torch.cuda.Stream(device) if self.warm == WARM else None

    def __call__(self) -> Tensor | None:
        if self.graph is None and self.calls >= self.warm:
            self._record()
        self.calls += 1
        if self.graph is not None:
            self.graph.replay()
        elif self.stream is None:
            return self.function()
        else:  # on the stream on which it is recorded, as autograd wants it
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self.result = self.function()
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return self.result

    def _record(self) -> None:
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that this mode is a prototype
                torch.cuda.set_sync_debug_mode("error")  # waiting raises before it spoils more than the recording
                try:
                    self.result = self.function()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            self.graph = graph
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as reason:
            self.warm = float("inf")
            warnings.warn(f"Running without a CUDA graph: {str(reason).splitlines()[0]}", stacklevel=2)


class _Rounded(torch.autograd.Function):
    """Tensors in bf16, and their gradients in fp32: two launches for all of them."""

    @staticmethod
    def forward(ctx, *values: Tensor):
        low = [torch.empty_like(value, dtype=torch.bfloat16) for value in values]
        torch._foreach_copy_(low, values)
        return tuple(low)

    @staticmethod
    def backward(ctx, *upstream: Tensor):
        grads = [torch.empty_like(grad, dtype=torch.float32) for grad in upstream]
        torch._foreach_copy_(grads, upstream)
        return tuple(grads)


def rounded(network: nn.Module, precision: str, device: torch.device) -> dict[str, Tensor]:
    """The weights that autocast would round at every use, rounded, with their gradient; none on a CPU or in fp32."""
    if device.type == "cpu" or arithmetic(precision, device) != "bf16":
        return {}
    weights = {
        f"{name}.{key}": value
        for name, module in network.named_modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear))
        for key, value in module.named_parameters(recurse=False)
    }
    return dict(zip(weights, _Rounded.apply(*weights.values()), strict=True))


class Steps:
    """Takes steps by ``advance(inputs)``: their inputs lie in a table on the device, whose next row a step reads.

    Dropout on a GPU is seeded by ``inputs["dropout"]`` before the step; on a CPU ``dropout_from`` does it in its midst.
    """

    def __init__(self, advance: Callable, inputs_at: Callable[[int], Inputs], steps: int, device, record: bool = True):
        self.advance, self.inputs_at, self.steps, self.device = advance, inputs_at, steps, device
        self.table: Inputs = {}
        self.next, self.first, self.seeds = torch.zeros(1, dtype=torch.long, device=device), 0, []
        self.rows, self.recorded, self.sent = 0, Recorded(self._take, device, record), None

    def __call__(self, step: int) -> None:
        if self.device.type == "cpu":
            return self.advance(self.inputs_at(step))
        with nullcontext() if self.recorded.graph else computing(self.device):  # a graph has it in it
            self.replay(step)

    def replay(self, step: int) -> None:
        """One step from the table."""
        if not self.first <= step < self.first + self.rows:
            self._send(step)
        if self.seeds and self.device.type == "cuda":
            torch.cuda.default_generators[self.next.device.index].manual_seed(self.seeds[step - self.first])
        self.recorded()

    def _send(self, step: int) -> None:
        if self.sent is not None:
            self.sent.synchronize()  # at most two tables are waiting for the GPU
        each = [self.inputs_at(later) for later in range(step, min(step + ROWS, self.steps))]
        for name in each[0]:
            values = torch.stack([inputs[name] for inputs in each])
            if name not in self.table:
                self.table[name] = torch.zeros(ROWS, *values.shape[1:], dtype=values.dtype, device=self.device)
            values = values.pin_memory() if self.device.type == "cuda" else values  # from there it goes without waiting
            self.table[name][: len(each)].copy_(values, non_blocking=True)
        self.next.zero_()
        self.first, self.rows = step, len(each)
        self.seeds = [inputs["dropout"].item() for inputs in each if "dropout" in inputs]
        self.sent = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None

    def _take(self) -> None:
        self.advance({name: values.index_select(0, self.next)[0] for name, values in self.table.items()})
        self.next += 1


def dropout_from(seed: Tensor):
    """A block whose dropout masks are a function of a seed (int64); on a GPU that is seen to before the step."""
    return nullcontext() if seed.is_cuda else seeded(seed.item())


def update(optimizer: torch.optim.Optimizer, rate: Tensor) -> None:
    """One step of an optimizer at a rate (); on a GPU the fused kernel reads it, and its count of steps, there."""
    for group in optimizer.param_groups:
        group["lr"] = rate.float() if rate.is_cuda else rate.item()
        if rate.is_cuda:
            group |= {"fused": True, "foreach": False} | ({"capturable": True} if "capturable" in group else {})
    optimizer.step()


def move(average: list[Tensor], values: list[Tensor], share: Tensor) -> None:
    """average + share (values - average), in place."""
    if share.is_cuda:  # where lerp would wait for its share
        difference = torch._foreach_sub(values, average)
        torch._foreach_mul_(difference, share.float())
        torch._foreach_add_(average, difference)
    elif share > 0:
        torch._foreach_lerp_(average, values, share.item())


def replays(device: torch.device) -> Callable:
    """``functools.partial`` for functions of tensors, without gradients; on a GPU what it gives is replayed as a graph.

    It is recorded once for the same function and first arguments; all other inputs have the same shapes every time.
    """

    @cache
    def replayed(function: Callable, *first) -> Callable[..., Tensor]:
        given: list[Tensor] = []
        recorded = Recorded(lambda: function(*first, *given), device)

        def call(*inputs: Tensor) -> Tensor:
            if not given:
                given.extend(map(torch.empty_like, inputs))
            torch._foreach_copy_(given, inputs)
            return recorded().clone()

        return call

    return replayed if device.type == "cuda" else partial
