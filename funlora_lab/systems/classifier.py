"""The network of a classifier, and the augmentation of what it sees."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funlora_lab.experiment import Experiment
from funlora_lab.seeds import Streams, seeded


def build_classifier(experiment: Experiment, classes: int, *key: str | int) -> nn.Module:
    """A fresh classifier with ``classes`` outputs; its first weights depend on the seed and ``key`` alone."""
    with seeded(experiment.seed, "classifier weights", *key):
        if experiment.classifier.kind == "resnet18":
            from torchvision.models import resnet18

            net = resnet18(num_classes=classes)
            net.conv1 = nn.Conv2d(experiment.channels, 64, 3, padding=1, bias=False)  # small images: no early shrinking
            net.maxpool = nn.Identity()
            return net

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        layers = [*block(experiment.channels, 32), *block(32, 64), nn.MaxPool2d(2), *block(64, 128)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))


def augment(x: Tensor, experiment: Experiment, seed: Tensor) -> Tensor:
    """Random crops (after padding) and random mirroring of images (B, C, H, W) in [-1, 1]."""
    streams = Streams(seed[None])
    B, _, H, W = x.shape
    if experiment.flip:
        mirrored = streams.uniform(B)[0] < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    if pad := experiment.classifier.crop:
        x = F.pad(x, (pad, pad, pad, pad), value=-1.0)
        top, left = (streams.integers(2 * pad + 1, B, 1, 1)[0] for _ in range(2))
        rows = top + torch.arange(H, device=x.device)[None, :, None]
        columns = left + torch.arange(W, device=x.device)[None, None, :]
        images = torch.arange(B, device=x.device)[:, None, None]
        x = x[images, :, rows, columns].permute(0, 3, 1, 2)
    return x
