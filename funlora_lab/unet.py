"""The ADM U-Net (Dhariwal & Nichol 2021) as the velocity field v(t, x, y), with ADM's parameter names.

Letters: B images, C channels, H x W pixels, E = 4 * base channels (embedding width), K classes side by side.

State dictionaries of ADM's and torchcfm's ``UNetModel`` of the same configuration load with ``strict=True``.
Its layers also run with a kernel for each of several classes, and with inputs scaled and shifted (layers.py).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funlora_lab.errors import LabError
from funlora_lab.layers import Conv2d, DoublingConv2d, Dropout, GroupNorm, Projection, attended


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
        self.conv = DoublingConv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


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
