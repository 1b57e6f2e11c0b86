"""Devices, and how a network runs fastest on one: memory layout, arithmetic, compilation."""

import re
import warnings
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn

from funlora_lab.errors import LabError

COMPILE = ("auto", "off", "on", "graphs")  # auto: on a GPU on, else off; graphs: replayed as CUDA graphs


def pick_device(word: str) -> torch.device:
    """auto, cpu, cuda or cuda:N; raises LabError when it is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = re.fullmatch(r"auto|cpu|cuda(?::(0|[1-9]\d*))?", word)
    if not known:
        raise LabError(f"device={word}: accepted is auto, cpu, cuda or cuda:N.")
    if word.startswith("cuda") and int(known[1] or 0) >= count:
        there = f"cuda:0 to cuda:{count - 1}" if count else "auto or cpu"
        raise LabError(f"device={word}: there is no such CUDA device here; accepted is {there}.")
    return torch.device(("cuda" if count else "cpu") if word == "auto" else word)


def prepared(network: nn.Module, device: torch.device, compile: str = "auto") -> nn.Module:
    """A network moved to the device, in place, and compiled as asked for; a warning says why where that fails."""
    if compile not in COMPILE:
        raise LabError(f"compile={compile}: accepted is one of {', '.join(COMPILE)}.")
    cuda = device.type == "cuda"
    if compile == "graphs" and not cuda:
        warnings.warn("Not compiled: CUDA graphs need a CUDA device.", stacklevel=2)
    elif (compile == "on" or (cuda and compile != "off")) and network._compiled_call_impl is None:
        # every precision, batch size and mode of use is a version of its own; beyond the limit PyTorch stops compiling
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        mode = "reduce-overhead" if compile == "graphs" else None
        compiled = torch.compile(network._call_impl, mode=mode, dynamic=False)
        network._compiled_call_impl = partial(_call, network, compiled)
    layout = {"memory_format": torch.channels_last} if cuda else {}  # a CPU loses by it: 1.37 s a step against 1.22
    return network.to(device, **layout)


def _call(network: nn.Module, compiled: Callable, *args, **kwargs):
    try:
        return compiled(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception as reason:  # whatever the compiler trips over, the network runs without it
        first = (str(reason).strip() or type(reason).__name__).splitlines()[0]
        warnings.warn(f"Running uncompiled, because compiling failed: {first}", stacklevel=2)
        network._compiled_call_impl = network._call_impl
        return network._call_impl(*args, **kwargs)


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


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Compute in ``precision``: under bf16 convolutions and products are rounded, weights stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=arithmetic(precision, device) == "bf16")


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A small CPU tensor on the device, without waiting for what the device is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
