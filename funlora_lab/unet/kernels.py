"""Two layers as Triton kernels for a GPU, without atomics, so that their bits repeat: GroupNorm with SiLU, and W0 * F.

``layers.gpu_kernels`` says where they are used; everywhere else plain PyTorch computes the same.
Letters: B images, C channels in G groups of C / G, HW pixels; K classes, O = Cout, I = Cin, T kernel positions, p
functions. Images are channels last: in memory (B, HW, C). So are weights: (O, T, I).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

WARPS = 8
TILE = 4096  # numbers of an image that a program holds at a time


@triton.jit
def _tile(p, C: tl.constexpr, CP: tl.constexpr, HW: tl.constexpr, SPAN: tl.constexpr, P: tl.constexpr):
    """(positions (P, CP) of an image's pixels from the p-th of this program's slice on, which of them there are)."""
    pixels, c = tl.program_id(1) * SPAN + p + tl.arange(0, P), tl.arange(0, CP)
    return pixels[:, None] * C + c[None, :], (pixels < HW)[:, None] & (c < C)[None, :]


@triton.jit
def _per_channel(NUMBERS, b, C: tl.constexpr, CP: tl.constexpr, G: tl.constexpr):
    """The numbers (B, G) of an image's groups, for every channel (CP,)."""
    c = tl.arange(0, CP)
    return tl.load(NUMBERS + b * G + c // (C // G), c < C, other=0.0)


@triton.jit
def _normed(X, DY, at, there, mean, rstd, weight, bias, SILU: tl.constexpr):
    """(h, dz): the normalised x, and the gradient of z = weight h + bias, from that of SiLU(z) or of z."""
    h = (tl.load(X + at, there, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
    dz = tl.load(DY + at, there, other=0.0).to(tl.float32)
    if SILU:
        z = h * weight[None, :] + bias[None, :]
        s = tl.sigmoid(z)
        dz = dz * s * (1 + z * (1 - s))
    return h, dz


@triton.jit
def _sums(X, DY, MEAN, RSTD, WEIGHT, BIAS, PARTS, SILU: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
          G: tl.constexpr, HW: tl.constexpr, SPAN: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """Two sums of every channel over the pixels of one slice of one image.

    Without DY of x - k and (x - k)^2; k is the group's first number in the image, near its mean, so that the variance
    is no difference of large numbers. With DY of dz and dz h.
    """
    b, c = tl.program_id(0).to(tl.int64), tl.arange(0, CP)
    if DY is None:
        k = tl.load(X + b * HW * C + c // (C // G) * (C // G), c < C, other=0.0).to(tl.float32)
    else:
        mean, rstd = _per_channel(MEAN, b, C, CP, G), _per_channel(RSTD, b, C, CP, G)
        weight, bias = tl.load(WEIGHT + c, c < C, other=0.0), tl.load(BIAS + c, c < C, other=0.0)
    a, q = tl.zeros([CP], tl.float32), tl.zeros([CP], tl.float32)
    for p in range(0, SPAN, P):
        at, there = _tile(p, C, CP, HW, SPAN, P)
        if DY is None:
            x = tl.load(X + b * HW * C + at, there, other=0.0).to(tl.float32)
            first = tl.where(there, x - k[None, :], 0.0)
            second = first * first
        else:
            h, first = _normed(X + b * HW * C, DY + b * HW * C, at, there, mean, rstd, weight, bias, SILU)
            second = first * h
        a += tl.sum(first, 0)
        q += tl.sum(second, 0)
    part = PARTS + (b * tl.num_programs(1) + tl.program_id(1)) * 2 * C
    tl.store(part + c, a, c < C)
    tl.store(part + C + c, q, c < C)


@triton.jit
def _groups(X, PARTS, WEIGHT, FIRST, SECOND, EPS, C: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr,
            HW: tl.constexpr, SLICES: tl.constexpr):  # fmt: skip
    """From the sums of an image's channels two numbers a group: its mean and 1 / standard deviation.

    With WEIGHT, on the way back, the means of weight dz and weight dz h.
    """
    b, n = tl.program_id(0).to(tl.int64), HW * (C // G)
    g, d = tl.arange(0, GP)[:, None], tl.arange(0, DP)[None, :]
    c, there = g * (C // G) + d, (g < G) & (d < C // G)
    a, q = tl.zeros([GP, DP], tl.float32), tl.zeros([GP, DP], tl.float32)
    for s in range(SLICES):
        part = PARTS + (b * SLICES + s) * 2 * C
        a += tl.load(part + c, there, other=0.0)
        q += tl.load(part + C + c, there, other=0.0)
    w = 1.0 if WEIGHT is None else tl.load(WEIGHT + c, there, other=0.0)
    g, a, q = tl.arange(0, GP), tl.sum(a * w, 1) / n, tl.sum(q * w, 1) / n
    if WEIGHT is None:
        q = tl.rsqrt(tl.maximum(q - a * a, 0.0) + EPS)
        a += tl.load(X + b * HW * C + g * (C // G), g < G, other=0.0).to(tl.float32)
    tl.store(FIRST + b * G + g, a, g < G)
    tl.store(SECOND + b * G + g, q, g < G)


@triton.jit
def _apply(X, Y, MEAN, RSTD, WEIGHT, BIAS, SILU: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, G: tl.constexpr,
           HW: tl.constexpr, SPAN: tl.constexpr, P: tl.constexpr):  # fmt: skip
    b, c = tl.program_id(0).to(tl.int64), tl.arange(0, CP)
    mean, bias = _per_channel(MEAN, b, C, CP, G), tl.load(BIAS + c, c < C, other=0.0)
    scale = _per_channel(RSTD, b, C, CP, G) * tl.load(WEIGHT + c, c < C, other=0.0)
    for p in range(0, SPAN, P):
        at, there = _tile(p, C, CP, HW, SPAN, P)
        x = tl.load(X + b * HW * C + at, there, other=0.0).to(tl.float32)
        z = (x - mean[None, :]) * scale[None, :] + bias[None, :]
        if SILU:
            z = z * tl.sigmoid(z)
        tl.store(Y + b * HW * C + at, z.to(Y.dtype.element_ty), there)


@triton.jit
def _back(X, DY, DX, MEAN, RSTD, WEIGHT, BIAS, A, Q, SILU: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
          G: tl.constexpr, HW: tl.constexpr, SPAN: tl.constexpr, P: tl.constexpr):  # fmt: skip
    b, c = tl.program_id(0).to(tl.int64), tl.arange(0, CP)
    mean, rstd = _per_channel(MEAN, b, C, CP, G), _per_channel(RSTD, b, C, CP, G)
    weight, bias = tl.load(WEIGHT + c, c < C, other=0.0), tl.load(BIAS + c, c < C, other=0.0)
    a, q = _per_channel(A, b, C, CP, G), _per_channel(Q, b, C, CP, G)
    for p in range(0, SPAN, P):
        at, there = _tile(p, C, CP, HW, SPAN, P)
        h, dz = _normed(X + b * HW * C, DY + b * HW * C, at, there, mean, rstd, weight, bias, SILU)
        dx = rstd[None, :] * (dz * weight[None, :] - a[None, :] - h * q[None, :])
        tl.store(DX + b * HW * C + at, dx.to(DX.dtype.element_ty), there)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool):
        x = x.contiguous(memory_format=torch.channels_last)
        B, C, HW = len(x), x.shape[1], x.shape[2] * x.shape[3]
        CP, slices = triton.next_power_of_2(C), max(1, min(HW // 16, 16))
        P = min(max(1, TILE // CP), triton.next_power_of_2(-(-HW // slices)))  # pixels at a time
        pixels = {"C": C, "CP": CP, "G": groups, "HW": HW, "SPAN": -(-HW // (slices * P)) * P, "P": P}
        whole = {"C": C, "G": groups, "HW": HW, "SLICES": slices}
        whole |= {"GP": triton.next_power_of_2(groups), "DP": triton.next_power_of_2(C // groups)}
        y, parts = torch.empty_like(x), torch.empty(B, slices, 2, C, device=x.device)
        mean, rstd = torch.empty(2, B, groups, device=x.device)
        _sums[(B, slices)](x, *[None] * 5, parts, SILU=silu, **pixels, num_warps=WARPS)
        _groups[(B,)](x, parts, None, mean, rstd, eps, **whole)
        _apply[(B, slices)](x, y, mean, rstd, weight, bias, SILU=silu, **pixels, num_warps=WARPS)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.silu, ctx.pixels, ctx.whole = silu, pixels, whole
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dy, dx = dy.contiguous(memory_format=torch.channels_last), torch.empty_like(x)
        slices, C, groups = (ctx.whole[name] for name in ("SLICES", "C", "G"))
        parts = torch.empty(len(x), slices, 2, C, device=x.device)
        a, q = torch.empty(2, len(x), groups, device=x.device)
        how = {"SILU": ctx.silu, **ctx.pixels, "num_warps": WARPS}
        _sums[(len(x), slices)](x, dy, mean, rstd, weight, bias, parts, **how)
        _groups[(len(x),)](x, parts, weight, a, q, 0.0, **ctx.whole)
        _back[(len(x), slices)](x, dy, dx, mean, rstd, weight, bias, a, q, **how)
        bias_grad, weight_grad = parts.sum((0, 1)) if any(ctx.needs_input_grad[1:3]) else (None, None)
        return dx, weight_grad, bias_grad, None, None, None


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """GroupNorm, and SiLU after it where asked for, of images (B, C, H, W) in any type; sums and weights in fp32."""
    with torch.cuda.device_of(x):
        return _GroupNorm.apply(x, weight, bias, groups, eps, silu)


@triton.jit
def _sincos(x):
    """(sin x, cos x) for |x| < 8192: Cody & Waite's reduction to [-pi/4, pi/4], the polynomials of Cephes."""
    n = tl.floor(x * 0.6366197723675814 + 0.5)
    r = ((x - n * 1.5703125) - n * 4.837512969970703125e-4) - n * 7.54978995489188216e-8
    z = r * r
    s = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * r + r
    c = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    quarter = n.to(tl.int32) & 3
    odd = (quarter & 1) == 1
    sin, cos = tl.where(odd, c, s), tl.where(odd, s, c)
    return tl.where(quarter > 1, -sin, sin), tl.where((quarter == 1) | (quarter == 2), -cos, cos)


@triton.jit
def _cosines(W0, A, B, POND, FREQ, OUT, O, I, T: tl.constexpr, p: tl.constexpr, N: tl.constexpr):
    k, to, ti = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0)
    o, i = to * N + tl.arange(0, N), ti * N + tl.arange(0, N)
    a, b = tl.load(A + k * O + o, o < O, other=0.0), tl.load(B + k * I + i, i < I, other=0.0)
    z, f = a[:, None] * b[None, :], tl.zeros([N, N], tl.float32)
    for j in tl.static_range(p):
        _, cos = _sincos(tl.load(FREQ + k * p + j) * z)
        f += tl.load(POND + k * p + j) * cos
    there = (o < O)[:, None] & (i < I)[None, :]
    for t in tl.static_range(T):
        at = (o[:, None] * T + t) * I + i[None, :]
        w = tl.load(W0 + at, there, other=0.0) * f
        tl.store(OUT + k * O * T * I + at, w.to(OUT.dtype.element_ty), there)


@triton.jit
def _cosines_back(W0, G, A, B, POND, FREQ, DA, DB, DPOND, DFREQ, O, I, T: tl.constexpr, p: tl.constexpr,
                  N: tl.constexpr):  # fmt: skip
    """One tile's part of the gradients of A, B, ponderations and frequencies."""
    k, to, ti = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0)
    o, i = to * N + tl.arange(0, N), ti * N + tl.arange(0, N)
    a, b = tl.load(A + k * O + o, o < O, other=0.0), tl.load(B + k * I + i, i < I, other=0.0)
    there, z = (o < O)[:, None] & (i < I)[None, :], a[:, None] * b[None, :]
    g, dz = tl.zeros([N, N], tl.float32), tl.zeros([N, N], tl.float32)  # the gradients of F and of z = A B
    for t in tl.static_range(T):
        at = (o[:, None] * T + t) * I + i[None, :]
        g += tl.load(W0 + at, there, other=0.0) * tl.load(G + k * O * T * I + at, there, other=0.0).to(tl.float32)
    tile = (k * tl.num_programs(1) + to) * tl.num_programs(0) + ti
    for j in tl.static_range(p):
        pond, freq = tl.load(POND + k * p + j), tl.load(FREQ + k * p + j)
        sin, cos = _sincos(freq * z)
        tl.store(DPOND + tile * p + j, tl.sum(g * cos))
        tl.store(DFREQ + tile * p + j, -pond * tl.sum(g * z * sin))
        dz -= pond * freq * g * sin
    tl.store(DA + (k * tl.num_programs(0) + ti) * O + o, tl.sum(dz * b[None, :], 1), o < O)
    tl.store(DB + (k * tl.num_programs(1) + to) * I + i, tl.sum(dz * a[:, None], 0), i < I)


class _CosineWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype: torch.dtype, W0: Tensor, *numbers: Tensor):
        given = W0.contiguous(memory_format=torch.channels_last), *(each.contiguous() for each in numbers)
        (K, O), (I, p), N = numbers[0].shape, (each.shape[1] for each in numbers[1:3]), 32
        how = {"O": O, "I": I, "T": W0.shape[2] * W0.shape[3], "p": p, "N": N}
        weights = torch.empty(K, O, *W0.shape[2:], I, dtype=dtype, device=W0.device).permute(0, 1, 4, 2, 3)
        _cosines[(-(-I // N), -(-O // N), K)](*given, weights, **how)
        ctx.save_for_backward(*given)
        ctx.how = how
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        W0, A, B, ponderation, frequency = ctx.saved_tensors
        K, O, I, p, N = len(A), *(ctx.how[name] for name in "OIpN")
        rows, columns = -(-O // N), -(-I // N)
        upstream = upstream.permute(0, 1, 3, 4, 2).contiguous()
        sizes = (columns, O), (rows, I), (rows * columns, p), (rows * columns, p)
        grads = [torch.empty(K, *size, device=A.device) for size in sizes]
        _cosines_back[(columns, rows, K)](W0, upstream, A, B, ponderation, frequency, *grads, **ctx.how)
        return None, None, *(grad.sum(1) for grad in grads)


def cosine_weights(W0: Tensor, A: Tensor, B: Tensor, ponderation: Tensor, frequency: Tensor, dtype) -> Tensor:
    """W0 * sum_i ponderation_i cos(frequency_i A B) of K classes, every one channels last: F stays in the registers.

    W0 (O, I, k, k) without gradient; A (K, O), B (K, I), ponderation and frequency (K, p), fp32 -> (K, O, I, k, k).
    """
    with torch.cuda.device_of(W0):
        return _CosineWeights.apply(dtype, W0, A, B, ponderation, frequency)
