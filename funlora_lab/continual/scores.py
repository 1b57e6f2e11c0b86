"""What a run reports: accuracies over tasks, the recognition of samples, the loss on held-out images."""

from statistics import mean

import torch
from torch import Tensor, nn

from funlora_lab.continual.classifier import predict
from funlora_lab.data import to_floats
from funlora_lab.flow import flow_loss
from funlora_lab.seeds import stream
from funlora_lab.systems import Context, Source
from funlora_lab.training import computing


def average_accuracies(matrix: list[list[float] | None]) -> list[float | None]:
    """A_k = mean over j <= k of a_{k,j} = ``matrix[k][j]`` (Eq. 22) for every k; None where nothing was scored."""
    return [row and mean(row) for row in matrix]


def last_and_incremental(matrix: list[list[float] | None]) -> tuple[float | None, float | None]:
    """(LA = A_T, AIA = mean_k A_k) of Eq. 22-23, in [0, 1]; None unless the last task, or every task, was scored."""
    averages = average_accuracies(matrix)
    return averages[-1], None if None in averages else mean(averages)


def accuracy_per_task(predicted: Tensor, true: Tensor, tasks: list[list[int]]) -> list[float]:
    """a_{k,j} of Eq. 22: accuracy on the test images of each task's classes, among all classes seen."""
    correct = predicted == true
    return [correct[torch.isin(true, torch.tensor(task))].float().mean().item() for task in tasks]


def recognition(judge: nn.Module, order: list[int], samples: Tensor, cls: int) -> float:
    """Share of a class's samples that the classifier trained on real images takes for that class."""
    device = next(judge.parameters()).device
    return (torch.tensor(order)[predict(judge, samples, device)] == cls).float().mean().item()


@torch.no_grad()
def held_out_loss(context: Context, source: Source, cls: int, draws: int = 8) -> float | None:
    """Flow-matching loss on the held-out images of a class, with ``draws`` fixed noises and times an image.

    In every draw one image falls into each slice of [0, 1]; from draw to draw the slices move on, so that an image
    meets times of the whole interval. None when no images are held out, and of a network that is no velocity.
    """
    x1 = to_floats(context.dataset.valid.of(cls).pixels)
    n = len(x1)
    if not n or source.solver or source.chunk:
        return None
    device, velocity, losses = context.runtime.device, source.velocity(), []
    for k in range(draws):
        generator = stream(0, "held out", cls, k)
        x0 = torch.randn(x1.shape, generator=generator)
        t = (torch.rand(n, generator=generator) + torch.arange(n).roll(k * n // draws)) / n
        with computing(device):
            losses.append(flow_loss(velocity, x1.to(device), x0.to(device), t.to(device)).mean().item())
    return mean(losses)
