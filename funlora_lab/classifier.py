"""The classifiers that score a generator: trained on its samples alone, tested on real images.

Letters: B images, C channels, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from funlora_lab.config import Experiment
from funlora_lab.data import Images, to_floats
from funlora_lab.streams import seeded, stream


def build(experiment: Experiment, classes: int, *key: str | int) -> nn.Module:
    """A fresh classifier with ``classes`` outputs; its first weights depend on the seed and ``key`` alone."""
    with seeded(experiment.seed, "classifier weights", *key):
        if experiment.classifier == "resnet18":
            net = resnet18(num_classes=classes)
            net.conv1 = nn.Conv2d(experiment.channels, 64, 3, padding=1, bias=False)  # small images: no early shrinking
            net.maxpool = nn.Identity()
            return net

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        return nn.Sequential(
            *block(experiment.channels, 32),
            *block(32, 64),
            nn.MaxPool2d(2),
            *block(64, 128),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(128, classes),
        )


def augment(pixels: Tensor, experiment: Experiment, generator: torch.Generator) -> Tensor:
    """Random crops (after padding) and random mirroring of uint8 images (B, C, H, W) -> floats of the same shape."""
    x = to_floats(pixels)
    B, _, H, W = x.shape
    if experiment.flip:
        mirrored = torch.rand(B, generator=generator, device=x.device) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    if experiment.crop:
        pad = experiment.crop
        x = F.pad(x, (pad, pad, pad, pad), value=-1.0)
        top = torch.randint(0, 2 * pad + 1, (B, 1, 1), generator=generator, device=x.device)
        left = torch.randint(0, 2 * pad + 1, (B, 1, 1), generator=generator, device=x.device)
        rows = top + torch.arange(H, device=x.device)[None, :, None]
        columns = left + torch.arange(W, device=x.device)[None, None, :]
        images = torch.arange(B, device=x.device)[:, None, None]
        x = x[images, :, rows, columns].permute(0, 3, 1, 2)
    return x


def classifier_loss(net: nn.Module, experiment: Experiment, images: Images, order: Tensor, step: int, *key) -> Tensor:
    """Mean cross-entropy of one augmented batch; ``images.labels`` are positions among the classifier's outputs."""
    generator = stream(experiment.seed, "augment", *key, step, device=images.pixels.device)
    x = augment(images.pixels[order], experiment, generator)
    return F.cross_entropy(net(x), images.labels[order])


@torch.no_grad()
def predict(net: nn.Module, pixels: Tensor, batch: int = 500) -> Tensor:
    """The most likely output of each uint8 image (N, C, H, W) -> (N,), on the CPU."""
    net.eval()
    device = next(net.parameters()).device
    parts = [net(to_floats(part.to(device))).argmax(1).cpu() for part in pixels.split(batch)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)


@torch.no_grad()
def features(net: nn.Module, pixels: Tensor, batch: int = 500) -> Tensor:
    """What the last linear layer sees of each uint8 image (N, C, H, W) -> (N, D) in float64, on the CPU."""
    net.eval()
    device = next(net.parameters()).device
    last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    seen: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].double().cpu()))
    try:
        for part in pixels.split(batch):
            net(to_floats(part.to(device)))
    finally:
        hook.remove()
    return torch.cat(seen)
