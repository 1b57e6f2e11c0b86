"""The ADM U-Net (Dhariwal & Nichol 2021) as the velocity field v(t, x, y), with ADM's parameter names.

Letters: B images, C channels, H x W pixels, E = 4 * base channels (embedding width).
State dictionaries of ADM's and torchcfm's ``UNetModel`` of the same configuration load with ``strict=True``.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funlora_lab.errors import LabError
from funlora_lab.unet.layers import Conv2d, DoublingConv2d, GroupNorm, NormSiLU, Projection

PARTS = {"input_blocks": "encoder", "middle_block": "middle", "output_blocks": "decoder", "out": "output"}


def zeroed(module: nn.Module) -> nn.Module:
    """ADM starts the last convolution of every block at zero, so that each block starts as its shortcut."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def time_embedding(t: Tensor, width: int) -> Tensor:
    """Cosines and sines of t (B,) at geometric frequencies -> (B, width). t stays in [0, 1], unscaled."""
    half = width // 2
    angles = t[:, None].float() * torch.exp(-math.log(10_000.0) * torch.arange(half, device=t.device) / half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, width % 2))


class Block(nn.Sequential):
    """A sequence of layers that hands the time-and-class embedding to the residual blocks among them."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
        return x


class ResBlock(nn.Module):
    """Two convolutions with the embedding added in between, and a 1 x 1 shortcut where the channels change.

    ``nn.Identity`` stands where ADM has its SiLU, which here is part of the norm, so that parameters keep ADM's names.
    """

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(NormSiLU(groups, inputs), nn.Identity(), Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, outputs))
        last = zeroed(Conv2d(outputs, outputs, 3, padding=1))
        self.out_layers = nn.Sequential(NormSiLU(groups, outputs), nn.Identity(), nn.Dropout(dropout), last)
        self.skip_connection = nn.Identity() if outputs == inputs else Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """Self-attention over pixels, in ADM's first ("legacy") order: heads are split before q, k and v."""

    def __init__(self, channels: int, head_channels: int, groups: int):
        super().__init__()
        if channels % head_channels:
            raise LabError(f"head_channels={head_channels}: accepted is a divisor of the {channels} channels attended.")
        self.heads = channels // head_channels
        self.norm = GroupNorm(groups, channels)
        self.qkv = Projection(channels, 3 * channels, 1)
        self.proj_out = zeroed(Projection(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1)  # channels last, as fused attention reads them
        q, k, v = qkv.reshape(B, H * W, self.heads, 3, C // self.heads).permute(3, 0, 2, 1, 4)  # each (B, heads, HW, .)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H, W, C)
        return x + self.proj_out(h.permute(0, 3, 1, 2))


class UNet(nn.Module):
    """Velocity field v(t, x, y) of flow matching."""

    def __init__(
        self,
        image_size: int,
        channels: int,
        classes: int,
        base_channels: int = 128,
        multipliers: tuple[int, ...] = (1, 2, 2, 2),
        res_blocks: int = 2,
        attention: tuple[int, ...] = (16,),  # the resolutions (pixels a side) at which it is inserted
        head_channels: int = 64,  # channels a head
        norm_groups: int = 32,  # of every GroupNorm: the largest common divisor with its channels is used
        dropout: float = 0.1,
    ):
        super().__init__()
        self.base_channels = base_channels
        self.embedding = E = 4 * base_channels
        self.time_embed = nn.Sequential(nn.Linear(base_channels, E), nn.SiLU(), nn.Linear(E, E))
        labels = torch.empty(classes, E)  # begins as in nn.Embedding, but on the meta device that imports torch.compile
        self.label_emb = nn.Embedding.from_pretrained(labels if labels.is_meta else labels.normal_(), freeze=False)

        def residual(inputs: int, outputs: int, attends: bool) -> list[nn.Module]:
            block = ResBlock(inputs, outputs, E, dropout, norm_groups)
            return [block, Attention(outputs, min(head_channels, outputs), norm_groups)] if attends else [block]

        levels = [(base_channels * factor, image_size // 2**i in attention) for i, factor in enumerate(multipliers)]
        skips = [width := levels[0][0]]
        self.input_blocks = nn.ModuleList([Block(Conv2d(channels, width, 3, padding=1))])
        for level, (outputs, attends) in enumerate(levels, 1):
            for _ in range(res_blocks):
                self.input_blocks.append(Block(*residual(width, outputs, attends)))
                skips.append(width := outputs)
            if level < len(levels):
                self.input_blocks.append(Block(nn.Sequential(OrderedDict(op=Conv2d(width, width, 3, 2, padding=1)))))
                skips.append(width)
        self.middle_block = Block(*residual(width, width, True), *residual(width, width, False))
        self.output_blocks = nn.ModuleList()
        for level, (outputs, attends) in reversed(list(enumerate(levels))):
            for i in range(res_blocks + 1):
                layers = residual(width + skips.pop(), outputs, attends)
                width = outputs
                if level and i == res_blocks:
                    layers.append(nn.Sequential(OrderedDict(conv=DoublingConv2d(width, width, 3, padding=1))))
                self.output_blocks.append(Block(*layers))
        last = zeroed(Conv2d(width, channels, 3, padding=1))
        self.out = nn.Sequential(NormSiLU(norm_groups, width), nn.Identity(), last)

    def forward(self, t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Velocity (B, C, H, W) at time t (B,) or (), image x (B, C, H, W), and y: labels (B,) or embeddings (B, E)."""
        return self.decode(*self.encode(t, x, y))

    def encode(self, t: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """(embedding of time and class (B, E), outputs of all encoder blocks, output of the middle block)."""
        label = y if y.is_floating_point() else self.label_emb(y)
        embedding = self.time_embed(time_embedding(t.expand(x.shape[0]), self.base_channels)) + label
        skips, h = [], x
        for block in self.input_blocks:
            h = block(h, embedding)
            skips.append(h)
        return embedding, skips, self.middle_block(h, embedding)

    def decode(self, embedding: Tensor, skips: list[Tensor], h: Tensor) -> Tensor:
        """Velocity (B, C, H, W) from what ``encode`` returns."""
        for block, skip in zip(self.output_blocks, reversed(skips), strict=True):
            h = block(torch.cat([h, skip], dim=1), embedding)
        return self.out(h)


def conv_layers(net: nn.Module) -> dict[str, nn.Conv2d]:
    """All Conv2d layers by name, in module order: position i is the paper's layer index i (Fig. 3, Table I)."""
    return {name: module for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}


def part_of(name: str) -> str:
    """The part of the U-Net in which a convolution lies, by its name: encoder, middle, decoder or output."""
    return PARTS[name.partition(".")[0]]
