"""Putting a network on a device the way it runs fastest there: layout, arithmetic, compilation, with their reasons."""

import warnings
from functools import cache

import torch
from torch import Tensor, nn

from funlora_lab.errors import LabError

COMPILE = ("auto", "off", "on", "graphs")


def laid_out(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to the device, in place, in the memory layout that suits it there.

    Tensor cores want channels last. A CPU does not: measured at the CIFAR configuration (batch 8, bf16) a base step
    took 1.37 s of one core channels last against 1.22 s as it comes, the difference in group norms.
    """
    if device.type == "cuda":
        return network.to(device, memory_format=torch.channels_last)
    return network.to(device)


def prepared(network: nn.Module, device: torch.device, compile: str = "auto") -> nn.Module:
    """Lay a network out on the device, in place, and compile it where that is asked for.

    compile: off, on (torch.compile), graphs (the same, replayed as CUDA graphs), auto (on a GPU on, else off: on a
    CPU compiling takes longer than small networks train). What cannot be compiled runs uncompiled, with a warning that
    says why; results differ in rounding only.
    """
    if compile not in COMPILE:
        raise LabError(f"compile={compile}: accepted is one of {', '.join(COMPILE)}.")
    laid_out(network, device)
    if compile == "graphs" and device.type != "cuda":
        warnings.warn("Not compiled: CUDA graphs need a CUDA device.", stacklevel=2)
    elif compile in ("on", "graphs") or (compile == "auto" and device.type == "cuda"):
        _compile(network, "reduce-overhead" if compile == "graphs" else None)
    return network


def has_bf16(device_type: str) -> bool:
    """Whether a kind of device multiplies in bf16.

    A CPU without such instructions imitates them: a 3 x 3 convolution of 128 channels (32 x 32, batch 8) then took
    1.5 s instead of 14 ms.
    """
    return device_type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def _say_that_bf16_is_missing() -> None:
    warnings.warn("This processor has no bf16 instructions: precision=bf16 computes in fp32.", stacklevel=3)


def arithmetic(precision: str, device: torch.device) -> str:
    """In what ``precision`` is computed on a device: where there are no instructions for bf16 in fp32, said once."""
    if precision == "bf16" and not has_bf16(device.type):
        _say_that_bf16_is_missing()
        return "fp32"
    return precision


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Compute in ``precision``: under bf16 convolutions and products are rounded, weights and their sums stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=arithmetic(precision, device) == "bf16")


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A small CPU tensor on the device, without waiting for what the device is doing."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # an ordinary copy would wait for every kernel before it


def _compile(network: nn.Module, mode: str | None) -> None:
    """Compile the network's call in place: its parameters keep their names and may be replaced as before."""
    if network._compiled_call_impl is not None:
        return
    # every precision, batch size and mode of use is a version of its own; beyond the limit PyTorch stops compiling
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    plain = network._call_impl
    compiled = torch.compile(plain, mode=mode, dynamic=False)

    def call(*args, **kwargs):
        try:
            return compiled(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as reason:  # whatever the compiler trips over, the network itself runs without it
            first = (str(reason).strip() or type(reason).__name__).splitlines()[0]
            warnings.warn(f"Running uncompiled, because compiling failed: {first}", stacklevel=2)
            network._compiled_call_impl = plain
            return plain(*args, **kwargs)

    network._compiled_call_impl = call
