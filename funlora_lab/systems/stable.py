"""Stable Diffusion 1.x from a local folder, with a LoRA a task and a prompt a class: like DiffClass, but not DiffClass.

DiffClass (Meng et al. 2024) is unpublished as code. Missing here are its synthetic images of the classes being learned
and its adaptation between the domains of real new, synthetic old and synthetic new images. Weights are read from
safetensors files alone, and nothing is downloaded: the folder is what ``save_pretrained`` of a pipeline writes.
"""

import hashlib
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from funlora_lab.data import to_floats
from funlora_lab.errors import LabError
from funlora_lab.flow import Velocity, noise
from funlora_lab.seeds import Shuffle, seeded, stream
from funlora_lab.store import Artefact, key_of, parse_tensors
from funlora_lab.systems.generator import Generator, Source, system
from funlora_lab.training import Inputs, Plan, Trainer, autocast

PARTS = ("unet", "vae", "text_encoder")
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]  # the layers with a LoRA
TOGETHER = 16  # images drawn at once


@system("stable-diffusion", "Stable Diffusion 1.x from a folder, a LoRA a task: like DiffClass, with parts missing")
class StableDiffusion(Generator):
    rate = 1e-4  # Adam's, where adapter_lr is 0

    folder = property(lambda self: Path(self.context.experiment.prior.stable_diffusion))

    def files(self, part: str, ending: str = "safetensors") -> list[Path]:
        return sorted((self.folder / part).glob(f"*.{ending}"))

    def refusal(self, why: str) -> LabError:
        accepted = "accepted is a folder with the weights of Stable Diffusion 1.x as safetensors files"
        return LabError(f"stable_diffusion={self.context.experiment.prior.stable_diffusion}: {why}{accepted}.")

    def check(self) -> None:
        if not self.context.experiment.prior.stable_diffusion:
            raise self.refusal("")
        if missing := [name for name in ("diffusers", "peft", "transformers") if not find_spec(name)]:
            raise LabError(f"stable-diffusion needs {missing[0]}: pip install 'funlora-lab[diffclass]'.")
        if not (self.folder / "model_index.json").is_file():
            raise self.refusal("it has no model_index.json; " if self.folder.is_dir() else "there is no such folder; ")
        if lacking := [part for part in PARTS if not self.files(part)]:
            pickled = " but pickled ones (.bin), which are never loaded" * bool(self.files(lacking[0], "bin"))
            raise self.refusal(f"{lacking[0]} has no safetensors files{pickled}; ")

    @cached_property
    def pipe(self):
        """diffusers' pipeline, frozen, with one LoRA whose numbers are exchanged from task to task."""
        from diffusers import DDIMScheduler, StableDiffusionPipeline
        from peft import LoraConfig

        given = {"local_files_only": True, "use_safetensors": True, "safety_checker": None, "feature_extractor": None}
        try:
            pipe = StableDiffusionPipeline.from_pretrained(self.folder, requires_safety_checker=False, **given)
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as reason:
            raise self.refusal(f"diffusers cannot load it ({str(reason).strip().splitlines()[0]}); ") from None
        stored = {name for path in self.files("unet") for name in parse_tensors(path)[0]}
        if lacking := pipe.unet.state_dict().keys() - stored:  # diffusers would make them up
            raise self.refusal(f"{len(lacking)} weights of its unet are missing; ")
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        for part in PARTS:
            getattr(pipe, part).requires_grad_(False)
        rank = self.context.experiment.lora_attention_rank
        lora = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=TARGETS)
        with seeded(self.context.experiment.seed, "lora"):
            pipe.unet.add_adapter(lora)
        return pipe.to(self.context.runtime.device)

    # the parameters of the LoRA, by name
    numbers = cached_property(lambda self: {k: v for k, v in self.pipe.unet.named_parameters() if v.requires_grad})

    @cached_property
    def weights_key(self) -> str:
        paths = sorted(path for part in PARTS for path in self.files(part))
        return key_of({"files": [hashlib.file_digest(path.open("rb"), "sha256").hexdigest() for path in paths]})

    def prompt(self, cls: int) -> str:
        return self.context.experiment.prior.prompt.format(self.context.dataset.classes[cls].replace("_", " "))

    @torch.no_grad()
    def embedding(self, cls: int) -> Tensor:
        """Of a class's prompt (1, tokens, width)."""
        return self.pipe.encode_prompt(self.prompt(cls), self.context.runtime.device, 1, False)[0]

    def learn(self, task: int) -> None:
        context, e, new = self.context, self.context.experiment, self.context.tasks[task]
        given = {"weights": self.weights_key, "rank": e.lora_attention_rank, "size": e.prior.stable_size}
        given |= {"training": vars(e.adapter) | {"lr": e.adapter.lr or self.rate}, "classes": new}
        artefact = context.store.artefact("adapter", prompts=[self.prompt(c) for c in new], **context.inputs, **given)
        if task == 0:
            self.first = {name: value.detach().clone() for name, value in self.numbers.items()}
        self.rows |= dict.fromkeys(new, context.tensors(artefact, lambda: self.trainer(artefact, task).finish()))
        self.keys |= dict.fromkeys(new, artefact.key)
        frozen = {name: value for name, value in self.pipe.unet.state_dict().items() if "lora_" not in name}
        self.net, self.key = SimpleNamespace(state_dict=lambda: frozen), self.weights_key

    def trainer(self, artefact: Artefact, task: int) -> Trainer:
        from diffusers import DDPMScheduler

        e, device, pipe = self.context.experiment, self.context.runtime.device, self.pipe
        pipe.unet.load_state_dict(self.first, strict=False)
        new, real = self.context.tasks[task], self.context.dataset.train.of(self.context.tasks[task])
        pixels, labels = real.on(device, new)
        prompts, B = torch.cat([self.embedding(cls) for cls in new]), e.adapter.batch
        shuffle, schedule = Shuffle(len(real), e.seed, "lora", task), DDPMScheduler.from_config(pipe.scheduler.config)

        def inputs_at(step: int) -> Inputs:
            return {"order": shuffle.batch(step, B), "step": torch.tensor(step)}

        def losses_of(inputs: Inputs) -> Tensor:
            order, generator = inputs["order"], stream(e.seed, "lora", task, inputs["step"].item())
            mirrored = (torch.rand(B, generator=generator) < 0.5 * e.flip)[:, None, None, None].to(device)
            x = to_floats(pixels[order]).expand(-1, 3, -1, -1)
            x = F.interpolate(torch.where(mirrored, x.flip(3), x), (e.prior.stable_size,) * 2, mode="bicubic")
            with autocast(e.precision, device):
                with torch.no_grad():
                    latents = pipe.vae.encode(x.clamp(-1, 1)).latent_dist.mean * pipe.vae.config.scaling_factor
                added = torch.randn(latents.shape, generator=generator).to(device)
                t = torch.randint(schedule.config.num_train_timesteps, (B,), generator=generator).to(device)
                noisy = schedule.add_noise(latents.float(), added, t)
                predicted = pipe.unet(noisy, t, encoder_hidden_states=prompts[labels[order]]).sample
            return (predicted.float() - added).square().mean()[None]

        rate, steps = e.adapter.lr or self.rate, -(-e.adapter.images * len(new) // B)
        plan, label = Plan.of(e.adapter, rate, steps, e.log_every), {"stage": f"lora-{task + 1}"}
        training = (plan, torch.optim.Adam(self.numbers.values(), rate), self.numbers, inputs_at, losses_of)
        return Trainer(artefact, *training, self.context.runtime, [label])

    def source(self, cls: int) -> Source:
        e, own, unet = self.context.experiment, self.context.experiment.prior, self.pipe.unet
        steps, channels, size = own.denoising_steps or 50, unet.config.in_channels, own.stable_size
        given = {"num_inference_steps": steps, "guidance_scale": own.prompt_guidance, "height": size, "width": size}

        def velocity() -> Velocity:
            """What the certificate looks at: the U-Net on images in place of latents, with channels of zeros."""
            unet.load_state_dict(self.rows[cls], strict=False)
            text, more = self.embedding(cls), (0, 0, 0, 0, 0, channels - e.channels)
            return lambda t, x: unet(F.pad(x, more), 1000 * t, text.expand(len(x), -1, -1)).sample[:, : e.channels]

        def chunk(i: int) -> tuple[Tensor, int]:
            unet.load_state_dict(self.rows[cls], strict=False)
            side, parts = size // self.pipe.vae_scale_factor, []
            for latents in noise(e.seed, cls, i, (e.chunk, channels, side, side)).split(TOGETHER):
                latents, text = latents.to(self.context.runtime.device), [self.prompt(cls)] * len(latents)
                images = self.pipe(text, latents=latents, output_type="pt", **given).images.float()
                parts.append(F.interpolate(images, (e.image_size,) * 2, mode="bicubic", antialias=True))
            images = 2 * torch.cat(parts) - 1
            evaluations = steps * (2 if own.prompt_guidance > 1 else 1)  # with the prompt and without
            return images.mean(1, keepdim=True) if e.channels == 1 else images, evaluations

        return Source(key_of(given | {"lora": self.keys[cls], "prompt": self.prompt(cls)}), velocity, chunk=chunk)

    @property
    def parameters_per_class(self) -> int:
        return sum(value.numel() for value in self.numbers.values()) // len(self.context.tasks[-1])
