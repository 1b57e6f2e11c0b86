"""The GPU's kernels against float64: in Triton's interpreter where there is no GPU, and compiled for one without it.

    TRITON_INTERPRET=1 python tests/kernels.py [small | real | check]    a line a shape: the largest errors
    python tests/kernels.py sm_90                                        registers and spilled bytes of every kernel

An error is the largest one by the largest number of what was to be found. "check" takes a second on a GPU.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from funlora_lab.unet import kernels

# images, channels, pixels a side, groups; the type of the images
NORMS = {
    "small": [((2, 12, 5, 3), 3, torch.float32, True), ((3, 16, 4, 4), 8, torch.bfloat16, False)],
    "real": [
        ((1, 128, 32, 32), 32, torch.bfloat16, True),
        ((1, 384, 32, 32), 32, torch.bfloat16, True),
        ((2, 256, 16, 16), 32, torch.bfloat16, False),
        ((1, 512, 16, 16), 32, torch.bfloat16, True),
        ((2, 512, 8, 8), 32, torch.bfloat16, True),
        ((2, 512, 4, 4), 32, torch.bfloat16, True),
        ((1, 384, 16, 16), 32, torch.float32, True),
    ],
    "check": [((32, 384, 32, 32), 32, torch.bfloat16, True), ((32, 256, 16, 16), 32, torch.bfloat16, False)],
}
# classes, O, I, kernel size, functions; the type of the weights
PRODUCTS = {
    "small": [(2, 10, 36, 3, 4, torch.float32), (1, 8, 8, 1, 3, torch.bfloat16)],
    "real": [
        (1, 256, 512, 3, 10, torch.float32),
        (2, 256, 384, 1, 10, torch.float32),
        (2, 128, 384, 3, 10, torch.bfloat16),
    ],
    "check": [(8, 256, 512, 3, 10, torch.float32)],
}
# of what comes in a type; sums over it are fp32. To bf16 the interpreter cuts, a GPU rounds to the nearest: half of it
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-7}


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def norm_errors(shape, groups: int, dtype: torch.dtype, silu: bool, device: str) -> dict[str, float]:
    """Of images far from zero mean: of the result and the gradients of x, weight and bias."""
    torch.manual_seed(0)
    x = (3 + torch.randn(shape)).to(dtype).to(device, memory_format=torch.channels_last)
    weight, bias = (torch.randn(shape[1]).to(device) for _ in range(2))
    upstream = torch.randn(shape).to(dtype).to(device, memory_format=torch.channels_last)
    given = [value.detach().requires_grad_() for value in (x, weight, bias)]
    exact = [value.detach().double().requires_grad_() for value in (x, weight, bias)]
    y = kernels.group_norm(given[0], groups, *given[1:], 1e-5, silu)
    z = F.group_norm(exact[0], groups, *exact[1:], 1e-5)
    expected = F.silu(z) if silu else z
    pairs = zip(torch.autograd.grad(y, given, upstream), torch.autograd.grad(expected, exact, upstream), strict=True)
    errors = [error(y, expected), *(error(*pair) for pair in pairs)]
    return dict(zip(("y", "x", "weight", "bias"), errors, strict=True))


def product_errors(K: int, O: int, I: int, k: int, p: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Of the weights, and of the gradients of A, B, ponderations and frequencies."""
    torch.manual_seed(0)
    W0 = torch.randn(O, I, k, k).to(device, memory_format=torch.channels_last)
    numbers = [1 + 0.2 * torch.randn(K, n) for n in (O, I)] + [torch.randn(K, p), torch.arange(1.0, p + 1).repeat(K, 1)]
    given = [value.to(device).requires_grad_() for value in numbers]
    exact = [value.to(device).double().requires_grad_() for value in numbers]
    weights = kernels.cosine_weights(W0, *given, dtype)
    A, B, ponderation, frequency = exact
    angles = frequency[:, :, None, None] * (A[:, None, :, None] * B[:, None, None, :])
    expected = W0.double() * (ponderation[:, :, None, None] * angles.cos()).sum(1)[..., None, None]
    upstream = torch.randn(weights.shape).to(device, dtype)
    found, wanted = (
        torch.autograd.grad(weights, given, upstream),
        torch.autograd.grad(expected, exact, upstream.double()),
    )
    errors = [error(weights, expected), *(error(*pair) for pair in zip(found, wanted, strict=True))]
    return dict(zip(("weights", "A", "B", "ponderation", "frequency"), errors, strict=True))


def check(size: str, device: str) -> bool:
    """Print a line a shape; whether every error is within its tolerance."""
    fine = True
    runs = [("norm", norm_errors, given) for given in NORMS[size]]
    runs += [("W0 * F", product_errors, given) for given in PRODUCTS[size]]
    for name, errors_of, given in runs:
        errors = errors_of(*given, device)
        dtype = next(value for value in given if isinstance(value, torch.dtype))
        rounded = ("y", "x", "weights")  # come in the type of the images or weights, the others in fp32
        good = all(value <= TOLERANCES[dtype if what in rounded else torch.float32] for what, value in errors.items())
        said = "  ".join(f"{what} {value:.1e}" for what, value in errors.items())
        print(f"{'ok' if good else 'WRONG':<6} {name} {' '.join(map(str, given[:-1]))} {given[-1]}: {said}", flush=True)
        fine &= good
    return fine


def compiled() -> None:
    """Every kernel at the sizes of the paper's network, compiled for sm_90 by the assembler that Triton brings."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pixels = {"C": 384, "CP": 512, "G": 32, "HW": 1024, "SPAN": 64, "P": 8}
    whole = {"C": 384, "G": 32, "GP": 32, "DP": 16, "HW": 1024, "SLICES": 16}
    product = {"T": 9, "p": 10, "N": 32}
    silu, forward = pixels | {"SILU": True}, dict.fromkeys(("DY", "MEAN", "RSTD", "WEIGHT", "BIAS"))
    versions = [("_sums", silu | forward), ("_sums", silu), ("_groups", whole | {"WEIGHT": None}), ("_groups", whole)]
    versions += [("_apply", silu), ("_back", silu), ("_cosines", product), ("_cosines_back", product)]
    half = {"X", "Y", "DY", "DX", "OUT", "G"}
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    for name, values in versions:
        kernel = getattr(kernels, name)
        types = {"EPS": "fp32", "O": "i32", "I": "i32"}
        kinds = {each: types.get(each) or ("*bf16" if each in half else "*fp32") for each in kernel.arg_names}
        signature = kinds | dict.fromkeys(values, "constexpr")
        multiples = {
            (i,): [["tt.divisibility", 16]]
            for i, each in enumerate(kernel.arg_names)
            if each not in values and each != "EPS"
        }
        source = ASTSource(
            kernel, signature, {(kernel.arg_names.index(each),): v for each, v in values.items()}, multiples
        )
        warps = kernels.WARPS if "SPAN" in values else 4
        ptx = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": warps}).asm["ptx"]
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "kernel.ptx").write_text(ptx)
            command = [assembler, "-arch=sm_90a", "-v", "kernel.ptx", "-o", "kernel.cubin"]
            said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
        registers, stack = re.search(r"Used (\d+) registers", said)[1], re.search(r"(\d+) bytes stack", said)[1]
        spilled = re.search(r"(\d+) bytes spill stores", said)[1]
        print(f"{name:<14} {registers:>3} registers, {stack} bytes of stack, {spilled} spilled", flush=True)


if __name__ == "__main__":
    size = sys.argv[1] if sys.argv[1:] else "small"
    if size == "sm_90":
        compiled()
    elif not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("There is no GPU here: set TRITON_INTERPRET=1.")
    else:
        sys.exit(0 if check(size, "cuda" if torch.cuda.is_available() else "cpu") else 1)
