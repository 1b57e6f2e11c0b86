"""GUIDE (Cywinski et al. 2024): replayed images of old classes that the classifier almost takes for new ones.

The generator is that of ``dgr-diffusion``, trained once for both; what differs is what the classifier is shown.
"""

from dataclasses import replace

import torch
from torch import Tensor

from funlora_lab.diffusion import Guidance, Sampler
from funlora_lab.systems.denoiser import DiffusionReplay
from funlora_lab.systems.generator import system


def towards_new(logits: Tensor, new: int, scale: float) -> Tensor:
    """scale * log p(c) of every image (B,), with c the likeliest of the last ``new`` outputs of logits (B, K)."""
    likeliest = logits[:, -new:].argmax(1, keepdim=True) + logits.shape[1] - new
    return scale * torch.log_softmax(logits.float(), 1).gather(1, likeliest)[:, 0]


@system("guide", "dgr-diffusion whose replay to the classifier is guided towards the classes being learned")
class Guide(DiffusionReplay):
    scale = 0.5

    def guided(self, new: int) -> Sampler:
        def score(images: Tensor) -> Tensor:
            return towards_new(self.lasting.logits(images), new, self.guidance)

        return replace(self.sampler, guide=Guidance(score, predicted=True))
