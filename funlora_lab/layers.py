"""The U-Net's layers: each computes what its namesake in ``torch.nn`` does, in the way that is fastest on its device.

Letters: B images, C channels, H x W pixels, K classes side by side, I input and O output channels, k kernel size.

A convolution whose weight carries a leading class axis, (K, O, I, k, k), treats its batch as images of K interleaved
classes (image ``i`` belongs to class ``i % K``), each convolved with its own kernel; and a two-dimensional one can
scale and shift its input per class, ``affine`` (K, 2, I), before the zero padding.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funlora_lab import winograd

ONLY_AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"


def single(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """One kernel for all images. x (B, I, H, W), weight (O, I, k, k) -> (B, O, H', W')

    Large ones in fp32 go through ``winograd`` on a CPU whose vectors are those of AVX2: forward and backward, 128
    channels of 32 x 32 (batch 8, one thread) took 69 ms against 89, 512 -> 256 of 16 x 16 137 against 175. Smaller
    images or fewer channels gain nothing; with AVX-512 products are cheaper, and it is not measured.
    """
    same_size = (*weight.shape[2:], stride, padding) == (3, 3, 1, 1)
    large = min(weight.shape[:2]) >= 128 and x.shape[2] >= 16 and x.shape[2] % winograd.ROWS == 0
    if ONLY_AVX2 and same_size and large and in_fp32_on_cpu(x, weight):
        return winograd.convolved(x, weight, bias)
    return F.conv2d(x, weight, bias, stride, padding)


def in_fp32_on_cpu(*tensors: Tensor) -> bool:
    """Whether a CPU will compute with these tensors in fp32, with no autocast to bf16."""
    there = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
    return there and not torch.is_autocast_enabled("cpu")


def grouped(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """K interleaved classes as one grouped convolution. x (N*K, I, H, W), weight (K, O, I, k, k) -> (N*K, O, H', W')"""
    K = weight.shape[0]
    x = x.reshape(x.shape[0] // K, K * x.shape[1], *x.shape[2:])
    y = F.conv2d(x, weight.flatten(0, 1), bias.repeat(K), stride, padding, groups=K)
    return y.reshape(y.shape[0] * K, y.shape[1] // K, *y.shape[2:])


def apart(convolution: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """``convolution(x, weight)`` of each of K interleaved classes in turn."""
    K = weight.shape[0]
    parts = x.reshape(x.shape[0] // K, K, *x.shape[1:]).unbind(1)
    ys = [convolution(part, kernel) for part, kernel in zip(parts, weight, strict=True)]
    return torch.stack(ys, 1).flatten(0, 1)


def one_by_one(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """The same as an ordinary convolution for each class in turn."""
    return apart(lambda part, kernel: single(part, kernel, bias, stride, padding), x, weight)


def unfolded(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """The same as one batched matrix product over the neighbourhoods of all pixels."""
    K, O, _, k, _ = weight.shape
    x = F.pad(x, (padding,) * 4).unfold(2, k, stride).unfold(3, k, stride)  # (N*K, I, H', W', k, k)
    NK, _, H, W = x.shape[:4]
    x = x.reshape(NK // K, K, *x.shape[1:]).permute(1, 0, 3, 4, 2, 5, 6).reshape(K, NK // K * H * W, -1)
    y = torch.bmm(x, weight.flatten(2).transpose(1, 2)) + bias.to(x.dtype)
    return y.reshape(K, NK // K, H, W, O).permute(1, 0, 4, 2, 3).reshape(NK, O, H, W)


FORMS = {"grouped": grouped, "one by one": one_by_one, "unfolded": unfolded}


def best_form(device: torch.device, weight: Tensor) -> str:
    """The fastest form for kernels (K, O, I, k, k) on a device; all give the same numbers but for rounding.

    Measured on a CPU with AVX-512, forward and backward: grouped wins for small kernels (64 channels of 8 x 8 pixels,
    2 x 32 images: 6.1 ms against 6.8 and 20), one by one for large ones (512 -> 256 channels, 20 x 6 images in bf16:
    198 ms against 270 and 422). On CUDA the choice is reasoned and not measured yet: few classes fill the device one
    by one, many small ones only together. ``funlora bench`` shows all three.
    """
    if device.type == "cuda":
        return "one by one" if weight.shape[0] <= 4 else "unfolded"
    return "grouped" if weight[0].numel() < 2**17 else "one by one"


def convolved(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """x (B, I, H, W) with one kernel, weight (O, I, k, k), or one per class, (K, O, I, k, k) -> (B, O, H', W')"""
    if weight.dim() == 4:
        return single(x, weight, bias, stride, padding)
    K = weight.shape[0]
    if x.shape[0] % K:
        raise ValueError(f"a batch of {x.shape[0]} images cannot hold the same number of each of {K} classes")
    if K == 1:
        return single(x, weight[0], bias, stride, padding)
    return FORMS[best_form(x.device, weight)](x, weight, bias, stride, padding)


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` that also runs with one kernel per class, (K, O, I, k, k), in place of its weight.

    ``affine`` (K, 2, I), when ``functional_call`` hands it in, scales and shifts the input of each class; it is no
    part of the layer's own numbers, and cannot be merged into them: a shift does not reach the zeros of the padding.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("affine", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.affine is not None:
            scale, shift = self.affine.repeat(x.shape[0] // self.affine.shape[0], 1, 1)[..., None, None].unbind(1)
            x = scale * x + shift
        return self.convolve(x)

    def convolve(self, x: Tensor) -> Tensor:
        return convolved(x, self.weight, self.bias, self.stride[0], self.padding[0])


def large_on_cpu(x: Tensor) -> bool:
    """Whether images (B, C, H, W) of 8 x 8 pixels or more are on a CPU, where two layers have a faster way for them."""
    return x.device.type == "cpu" and x.shape[2] * x.shape[3] >= 64


MEETS = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])  # (4 of the transposed kernel, 3 of the kernel)


def doubled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The image doubled to its nearest neighbours, then convolved. x (B, I, H, W), (O, I, 3, 3) -> (B, O, 2H, 2W)

    A pixel stands four times in the doubled image. Adding the kernel's entries that meet it before they are multiplied
    leaves 4/9 of the products: a transposed convolution of stride 2 whose kernel, 4 x 4, holds those sums.
    """
    with torch.autocast(x.device.type, enabled=False):  # the sums are rounded once
        sums = weight.flatten(2) @ torch.kron(MEETS, MEETS).T.to(weight)
    return F.conv_transpose2d(x, sums.unflatten(2, (4, 4)).transpose(0, 1), bias, stride=2, padding=1)


class DoublingConv2d(Conv2d):
    """A 3 x 3 convolution of its input doubled to the nearest neighbours: twice the height and width come out.

    On a CPU all but small images take the sums of ``doubled``: at the CIFAR configuration (16 x 16, 256 channels, batch
    8), forward and backward, 44 ms against 95 in fp32 and 24 against 38 in bf16. On CUDA that is not measured.
    """

    def convolve(self, x: Tensor) -> Tensor:
        if not large_on_cpu(x):
            return super().convolve(F.interpolate(x, scale_factor=2, mode="nearest"))
        if self.weight.dim() == 4:
            return doubled(x, self.weight, self.bias)
        return apart(lambda part, kernel: doubled(part, kernel, self.bias), x, self.weight)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of (B, heads, HW, d), fused but for bf16 on a CPU.

    There the fused kernel multiplies in fp32: 13.2 ms forward and backward against 6.3 at CIFAR size (batch 8).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        return (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Projection(nn.Conv1d):
    """The attention's projections: ADM keeps them as 1-d convolutions of width 1, here they run on images, 1 x 1.

    On a CPU in fp32 oneDNN's convolutions of all but small images are faster than matrix products, channels last: an
    attention of CIFAR size (16 x 16, batch 8) took 21 ms forward and backward against 27. In bf16 products are (9.8 ms
    against 10.0 and 14).
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 4:
            return convolved(x, self.weight[..., None], self.bias, 1, 0)
        if large_on_cpu(x) and x.dtype == torch.float32:
            x = x.contiguous(memory_format=torch.channels_last)
            return F.conv2d(x, self.weight[..., None], self.bias)
        B, C, H, W = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(B * H * W, C)  # in more dimensions PyTorch may repeat W
        return F.linear(pixels, self.weight[..., 0], self.bias).view(B, H, W, -1).permute(0, 3, 1, 2)


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` that keeps bf16 activations in bf16 under autocast; its statistics are fp32 all the same."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Dropout(nn.Dropout):
    """``nn.Dropout`` whose CPU masks take 16 random bits a value: PyTorch's own take a step's twentieth at CIFAR size.

    The rate is thus rounded to a multiple of 2^-16, and the values kept are scaled by exactly the rate used.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        dropped = round(self.p * 2**16)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = bits[: x.numel()].view_as(x) >= dropped - 2**15
        return x * kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))
