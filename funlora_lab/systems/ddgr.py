"""DDGR (Gao & Liu 2023): the previous classifier guides what the generator replays, and the replay trains both anew.

Deviations from its public code: the larger variance instead of a learned one; 1000 times instead of 4000 (and 50 steps
instead of 250 for small images); a classifier from scratch instead of an AlexNet trained on ImageNet;
``replay_per_class`` images a class instead of 20; and neither the exchange of red and blue nor the JPEG files of its
replayed images.
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from funlora_lab.data import to_floats
from funlora_lab.seeds import Shuffle
from funlora_lab.systems.denoiser import DiffusionReplay, Replay
from funlora_lab.systems.generator import Source, system


@system("ddgr", "diffusion replay guided by the previous classifier; the same images train classifier and generator")
class Ddgr(DiffusionReplay):
    schedule, denoiser, steps_by_size, scale = "cosine", "ddpm", (50, 250), 1.0

    def replayed(self, cls: int) -> Source:
        source, position, guiding, scale = self.source(cls), self.labels.index(cls), self.guiding, self.guidance

        def score(noisy: Tensor) -> Tensor:
            return scale * torch.log_softmax(guiding.logits(noisy).float(), 1)[:, position]

        return source._replace(key=f"{source.key}:{guiding.key}:{scale:g}", solver=replace(self.sampler, score=score))

    def replay(self, task: int, batch: int) -> Replay:
        """Half of every batch from a fixed set: the images that the generator is trained on afterwards."""
        e, device = self.context.experiment, self.context.runtime.device
        self.guiding = copy.copy(self.lasting)  # as it is before it learns the task
        self.guiding.net = copy.deepcopy(self.lasting.net)
        parts, given = self.draw({cls: self.replayed(cls) for cls in self.labels})
        pixels, half = torch.cat([part.pixels for part in parts]).to(device), batch // 2
        shuffle = Shuffle(len(pixels), e.seed, "replay", task)

        def drawn(step: int) -> tuple[Tensor, Tensor]:
            order = shuffle.batch(step, half).to(device)
            return to_floats(pixels[order]), order // given["count"]  # they lie class after class

        return Replay({"samples": given["replayed"], "images": given["count"]}, half, 1, drawn)
