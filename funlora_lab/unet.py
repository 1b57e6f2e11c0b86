"""The ADM U-Net (Dhariwal & Nichol 2021) as the velocity field v(t, x, y), with ADM's parameter names.

Letters: B images, C channels, H x W pixels, E = 4 * base channels (embedding width), K classes side by side.

State dictionaries of ADM's and torchcfm's ``UNetModel`` of the same configuration load with ``strict=True``.
Two additions: a convolution whose weight carries a leading class axis, (K, Cout, Cin, k, k), treats its batch as
images of K interleaved classes (image ``i`` belongs to class ``i % K``), each convolved with its own kernel; and a
two-dimensional one can scale and shift its input per class, ``affine`` (K, 2, Cin), before the zero padding.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funlora_lab.errors import LabError


def grouped(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """K interleaved classes as one grouped convolution. x (N*K, I, H, W), weight (K, O, I, k, k) -> (N*K, O, H', W')"""
    K = weight.shape[0]
    x = x.reshape(x.shape[0] // K, K * x.shape[1], *x.shape[2:])
    y = F.conv2d(x, weight.flatten(0, 1), bias.repeat(K), stride, padding, groups=K)
    return y.reshape(y.shape[0] * K, y.shape[1] // K, *y.shape[2:])


def one_by_one(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """The same as an ordinary convolution for each class in turn."""
    K = weight.shape[0]
    parts = x.reshape(x.shape[0] // K, K, *x.shape[1:]).unbind(1)
    ys = [F.conv2d(part, kernel, bias, stride, padding) for part, kernel in zip(parts, weight, strict=True)]
    return torch.stack(ys, 1).flatten(0, 1)


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
        return F.conv2d(x, weight, bias, stride, padding)
    K = weight.shape[0]
    if x.shape[0] % K:
        raise ValueError(f"a batch of {x.shape[0]} images cannot hold the same number of each of {K} classes")
    if K == 1:
        return F.conv2d(x, weight[0], bias, stride, padding)
    return FORMS[best_form(x.device, weight)](x, weight, bias, stride, padding)


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` that also runs with one kernel per class, (K, Cout, Cin, k, k), in place of its weight.

    ``affine`` (K, 2, Cin), when ``functional_call`` hands it in, scales and shifts the input of each class; it is no
    part of the layer's own numbers, and cannot be merged into them: a shift does not reach the zeros of the padding.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("affine", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.affine is not None:
            scale, shift = self.affine.repeat(x.shape[0] // self.affine.shape[0], 1, 1)[..., None, None].unbind(1)
            x = scale * x + shift
        return convolved(x, self.weight, self.bias, self.stride[0], self.padding[0])


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of (B, heads, HW, d), fused but for bf16 on a CPU.

    There the fused kernel multiplies in fp32: 13.2 ms forward and backward against 6.3 at CIFAR size (batch 8).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        return (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Projection(nn.Conv1d):
    """The attention's projections: ADM keeps them as 1-d convolutions of width 1, here they run on images, 1 x 1."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 3:
            B, C, H, W = x.shape
            pixels = x.permute(0, 2, 3, 1).reshape(B * H * W, C)  # in more dimensions PyTorch may repeat W
            return F.linear(pixels, self.weight[..., 0], self.bias).view(B, H, W, -1).permute(0, 3, 1, 2)
        return convolved(x, self.weight[..., None], self.bias, 1, 0)


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


def zeroed(module: nn.Module) -> nn.Module:
    """ADM starts the last convolution of every block at zero, so that each block starts as its shortcut."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def time_embedding(t: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Cosines and sines of t (B,) at geometric frequencies -> (B, width). t stays in [0, 1], unscaled."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, width % 2))


class Stage(nn.Sequential):
    """A sequence of layers that hands the time-and-class embedding to the residual blocks among them."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3 x 3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Downsample(nn.Module):
    """A 3 x 3 convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """Two convolutions with the embedding added in between, and a 1 x 1 shortcut where the channels change."""

    def __init__(self, channels: int, out_channels: int, embedding: int, dropout: float, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(math.gcd(groups, channels), channels),
            nn.SiLU(),
            Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm(math.gcd(groups, out_channels), out_channels),
            nn.SiLU(),
            Dropout(dropout),
            zeroed(Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = out_channels == channels
        self.skip_connection = nn.Identity() if same else Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """Self-attention over pixels, in ADM's first ("legacy") order: heads are split before q, k and v."""

    def __init__(self, channels: int, head_channels: int, groups: int):
        super().__init__()
        if channels % head_channels:
            raise LabError(
                f"head_channels={head_channels}: accepted is a divisor of {channels}, an attention's channels."
            )
        self.heads = channels // head_channels
        self.norm = GroupNorm(math.gcd(groups, channels), channels)
        self.qkv = Projection(channels, 3 * channels, 1)
        self.proj_out = zeroed(Projection(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1)  # channels last, as fused attention reads them
        q, k, v = qkv.reshape(B, H * W, self.heads, 3, -1).permute(3, 0, 2, 1, 4)  # (B, heads, HW, C / heads)
        h = attended(q, k, v).transpose(1, 2).reshape(B, H, W, C)
        return x + self.proj_out(h.permute(0, 3, 1, 2))


class UNet(nn.Module):
    """Velocity field v(t, x, y) of flow matching.

    ``attention`` lists the resolutions (pixels a side) at which attention is inserted; ``head_channels`` the channels
    a head; ``norm_groups`` the groups of every GroupNorm (the largest common divisor with the channels is used).
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        classes: int,
        base_channels: int = 128,
        multipliers: tuple[int, ...] = (1, 2, 2, 2),
        res_blocks: int = 2,
        attention: tuple[int, ...] = (16,),
        head_channels: int = 64,
        norm_groups: int = 32,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.base_channels = base_channels
        self.embedding = E = 4 * base_channels
        self.time_embed = nn.Sequential(nn.Linear(base_channels, E), nn.SiLU(), nn.Linear(E, E))
        self.label_emb = nn.Embedding(classes, E)

        def block(inputs: int, outputs: int, resolution: int) -> list[nn.Module]:
            layers: list[nn.Module] = [ResBlock(inputs, outputs, E, dropout, norm_groups)]
            if resolution in attention:
                layers.append(Attention(outputs, min(head_channels, outputs), norm_groups))
            return layers

        now = base_channels * multipliers[0]
        size = image_size
        skips = [now]
        self.input_blocks = nn.ModuleList([Stage(Conv2d(channels, now, 3, padding=1))])
        for level, multiplier in enumerate(multipliers):
            for _ in range(res_blocks):
                self.input_blocks.append(Stage(*block(now, base_channels * multiplier, size)))
                now = base_channels * multiplier
                skips.append(now)
            if level < len(multipliers) - 1:
                self.input_blocks.append(Stage(Downsample(now)))
                skips.append(now)
                size //= 2

        self.middle_block = Stage(
            ResBlock(now, now, E, dropout, norm_groups),
            Attention(now, min(head_channels, now), norm_groups),
            ResBlock(now, now, E, dropout, norm_groups),
        )

        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for i in range(res_blocks + 1):
                layers = block(now + skips.pop(), base_channels * multiplier, size)
                now = base_channels * multiplier
                if level and i == res_blocks:
                    layers.append(Upsample(now))
                    size *= 2
                self.output_blocks.append(Stage(*layers))

        self.out = nn.Sequential(
            GroupNorm(math.gcd(norm_groups, now), now),
            nn.SiLU(),
            zeroed(Conv2d(now, channels, 3, padding=1)),
        )

    def forward(self, t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Velocity (B, C, H, W) at time t (B,) or (), image x (B, C, H, W), class y.

        ``y`` holds labels (B,) of classes in the network's own embedding, or embedding vectors (B, E) for classes
        that the network has never seen.
        """
        t = t.expand(x.shape[0])
        label = y if y.is_floating_point() else self.label_emb(y)
        emb = self.time_embed(time_embedding(t, self.base_channels)) + label
        skips = []
        h = x
        for stage in self.input_blocks:
            h = stage(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h)


def conv_layers(net: nn.Module) -> dict[str, nn.Conv2d]:
    """All Conv2d layers by name, in module order: position i is the paper's layer index i (Fig. 3, Table I)."""
    return {name: module for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
