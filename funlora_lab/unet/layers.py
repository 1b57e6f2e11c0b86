"""The U-Net's layers: each computes what its namesake in ``torch.nn`` does, also with a kernel for each of K classes.

A weight with a leading class axis, (K, O, I, k, k), takes its batch as images of K interleaved classes (image ``i``
belongs to class ``i % K``), each convolved with its own kernel.
Letters: B images, C channels, H x W pixels, K classes side by side, I input and O output channels, k kernel size.
"""

import math
import os
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE = 4096  # pixels of a class from which one convolution keeps a GPU busy; below, one product of all classes does


def gpu_kernels(x: Tensor) -> ModuleType | None:
    """The kernels of our own, for a tensor on a GPU; None elsewhere and where FUNLORA_WITHOUT names them."""
    if not x.is_cuda or "kernels" in os.environ.get("FUNLORA_WITHOUT", "").split(","):
        return None
    try:
        from funlora_lab.unet import kernels
    except ImportError:  # Triton comes with PyTorch for CUDA
        return None
    return kernels


def grouped(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """One grouped convolution. x (N*K, I, H, W), weight (K, O, I, k, k) -> (N*K, O, H', W')"""
    K = len(weight)
    x = x.unflatten(0, (-1, K)).flatten(1, 2)
    y = F.conv2d(x, weight.flatten(0, 1), bias.repeat(K), stride, padding, groups=K)
    return y.unflatten(1, (K, -1)).flatten(0, 1)


def one_by_one(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, convolution=F.conv2d) -> Tensor:
    """The same as an ordinary convolution for each class in turn."""
    pairs = zip(x.unflatten(0, (-1, len(weight))).unbind(1), weight, strict=True)
    each = [convolution(images, kernel, bias, stride, padding) for images, kernel in pairs]
    if each[0].stride(1) == 1:  # channels last, and so is what comes back
        return torch.stack([y.permute(0, 2, 3, 1) for y in each], 1).flatten(0, 1).permute(0, 3, 1, 2)
    return torch.stack(each, 1).flatten(0, 1)


def unfolded(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """The same as one batched matrix product over the neighbourhoods of all pixels."""
    K, k = len(weight), weight.shape[-1]
    x = F.pad(x, (padding,) * 4).unfold(2, k, stride).unfold(3, k, stride).unflatten(0, (-1, K))
    x = x.permute(1, 0, 3, 4, 2, 5, 6)  # (K, N, H', W', I, k, k)
    y = torch.bmm(x.flatten(4).flatten(1, 3), weight.flatten(2).transpose(1, 2)) + bias.to(x.dtype)
    return y.unflatten(1, x.shape[1:4]).transpose(0, 1).flatten(0, 1).permute(0, 3, 1, 2)


FORMS = {"grouped": grouped, "one by one": one_by_one, "unfolded": unfolded}
KERNEL_SUMS = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])  # which of 3 entries each of 4 is the sum of


def form_for(device_type: str, rows: int, numbers: int) -> str:
    """The form for classes of so many pixels, whose kernels have so many numbers each."""
    if device_type == "cuda":  # reckoned, not measured: unfolding takes k k times the images' memory, so only of few
        return "one by one" if rows >= LARGE else "unfolded"
    # 6.1 ms against 6.8 and 20 (unfolded) for 64 channels, 270 against 198 and 422 for 512
    return "grouped" if numbers < 2**17 else "one by one"


def convolved(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """x (B, I, H, W) with one kernel, weight (O, I, k, k), or one per class, (K, O, I, k, k) -> (B, O, H', W')"""
    K = len(weight) if weight.dim() == 5 else 1
    if len(x) % K:
        raise ValueError(f"a batch of {len(x)} images cannot hold the same number of each of {K} classes")
    if K == 1:
        return F.conv2d(x, weight.reshape(weight.shape[-4:]), bias, stride, padding)
    form = form_for(x.device.type, len(x) // K * x.shape[2] * x.shape[3], weight[0].numel())
    return FORMS[form](x, weight, bias, stride, padding)


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` that also takes a kernel per class, and an ``affine`` (K, 2, I): scale and shift of its input."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("affine", None, persistent=False)  # its shift does not reach the zeros of the padding

    def forward(self, x: Tensor) -> Tensor:
        if self.affine is not None:
            scale, shift = self.affine.repeat(x.shape[0] // self.affine.shape[0], 1, 1)[..., None, None].unbind(1)
            x = scale * x + shift
        return self.convolve(x)

    def convolve(self, x: Tensor) -> Tensor:
        return convolved(x, self.weight, self.bias, self.stride[0], self.padding[0])


def doubled(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """The image doubled to its nearest neighbours, then convolved. x (B, I, H, W), (O, I, 3, 3) -> (B, O, 2H, 2W)"""
    with torch.autocast(x.device.type, enabled=False):  # a kernel of the sums of entries that meet one pixel
        sums = weight.flatten(2) @ torch.kron(KERNEL_SUMS, KERNEL_SUMS).T.to(weight)
    return F.conv_transpose2d(x, sums.unflatten(2, (4, 4)).transpose(0, 1), bias, stride, padding)


class DoublingConv2d(Conv2d):
    """A 3 x 3 convolution of its input doubled to the nearest neighbours: (B, I, H, W) -> (B, O, 2H, 2W)."""

    def convolve(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.shape[2] * x.shape[3] < 64:  # 64 pixels: ``doubled`` took 44 ms, this way 95
            return super().convolve(F.interpolate(x, scale_factor=2, mode="nearest"))
        if self.weight.dim() == 5:
            return one_by_one(x, self.weight, self.bias, 2, 1, doubled)
        return doubled(x, self.weight, self.bias, 2, 1)


class Projection(nn.Conv1d):
    """The attention's projections: ADM keeps them as 1-d convolutions of width 1, here they run on images, 1 x 1."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 4:
            return convolved(x, self.weight[..., None], self.bias, 1, 0)
        pixels = x.permute(0, 2, 3, 1)
        y = F.linear(pixels.flatten(0, 2), self.weight[..., 0], self.bias)  # in more dimensions PyTorch may repeat W
        return y.unflatten(0, pixels.shape[:3]).permute(0, 3, 1, 2)


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` of gcd(groups, channels) groups that keeps bf16 activations in bf16; its statistics are fp32."""

    def __init__(self, groups: int, channels: int, silu: bool = False):
        super().__init__(math.gcd(groups, channels), channels)
        self.silu = silu  # whether SiLU follows, on a GPU in the same pass

    def forward(self, x: Tensor) -> Tensor:
        if kernels := gpu_kernels(x):
            return kernels.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, self.silu)
        with torch.autocast(x.device.type, enabled=False):
            y = F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return F.silu(y) if self.silu else y


NormSiLU = partial(GroupNorm, silu=True)
