"""Stable Diffusion from a folder: a tiny one of random weights is adapted, stored, read back and drawn from."""

import json
import shutil

import pytest
import torch

from funlora_lab import continual, open_run, preset
from funlora_lab.errors import LabError, Stopped
from funlora_lab.training import Runtime

METHOD = {"method": "stable-diffusion"}


@pytest.fixture(scope="module")
def extra():
    for name in ("diffusers", "peft", "transformers"):
        pytest.importorskip(name, reason="needs the extra diffclass: pip install 'funlora-lab[diffclass]'")


@pytest.fixture(scope="module")
def folder(extra, tmp_path_factory):
    """A pipeline of 1.x's classes, of 16-pixel images, saved as ``save_pretrained`` does."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    path = tmp_path_factory.mktemp("tiny")
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    down, up = ["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2
    blocks = {"block_out_channels": (32, 64), "norm_num_groups": 8}
    text = CLIPTextConfig(vocab_size=74, hidden_size=32, intermediate_size=37, num_hidden_layers=2,
                          num_attention_heads=4, bos_token_id=72, eos_token_id=73, pad_token_id=73)  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(down_block_types=down, up_block_types=up, latent_channels=4, sample_size=16, **blocks),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"), model_max_length=77),
        unet=UNet2DConditionModel(
            sample_size=8, layers_per_block=1, cross_attention_dim=32, attention_head_dim=8, **blocks,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        scheduler=DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(path / "weights")
    return path / "weights"


@pytest.fixture(scope="module")
def experiment(folder):
    small = {"split": "5-5", "adapter_images": 8, "adapter_batch": 4, "samples_per_class": 2, "chunk": 2}
    short = {"denoising_steps": 2, "stable_size": 16, "lora_attention_rank": 2, "classifier_epochs": 1}
    return preset("smoke").but(**METHOD, stable_diffusion=str(folder), **small, **short)


def test_it_is_adapted_stored_read_back_and_drawn_from(experiment, tmp_path, numbers):
    run = open_run(experiment, "cpu", home=tmp_path)
    first, second = run.row(0), run.row(9)
    assert first.keys() == second.keys()
    moved = [(first[name] - second[name]).abs().max().item() for name in first]
    assert max(moved) > 0
    before = numbers(tmp_path)
    images = run.samples(9)
    assert images.shape == (2, 1, 8, 8)
    for path in tmp_path.glob("artefacts/samples-*/*.safetensors"):
        path.unlink()
    again = open_run(experiment, "cpu", home=tmp_path)
    assert torch.equal(images, again.samples(9))  # another pipeline, read from the folder, with the stored numbers
    assert not torch.equal(images, again.samples(8))
    assert numbers(tmp_path).items() <= before.items()
    assert run.results["LA"] is not None
    backbones = [event["backbone"]["sha256"] for event in run.events if event["event"] == "certificate"]
    assert len(set(backbones)) == 1


def test_a_training_broken_off_ends_the_same(experiment, tmp_path, numbers):
    open_run(experiment, "cpu", home=tmp_path / "whole")
    left = iter(range(100))
    stop = Runtime(stop=lambda: "enough" if next(left) >= 40 else None)
    with pytest.raises(Stopped):
        continual.run(experiment, runtime=stop, home=tmp_path / "parts")
    continual.run(experiment, home=tmp_path / "parts")
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")


def test_without_a_folder_the_sentence_says_what_is_accepted():
    with pytest.raises(LabError, match=r"^stable_diffusion=: accepted is a folder with the weights"):
        continual.run(preset("smoke").but(**METHOD))


def test_folders_that_hold_something_else_are_refused_and_nothing_is_unpickled(folder, tmp_path):
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    for path in pickled.glob("unet/*.safetensors"):
        path.unlink()
    (pickled / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"cos\nabort\n(tR.")
    (tmp_path / "empty").mkdir()
    foreign = shutil.copytree(folder, tmp_path / "foreign")
    shutil.copy(next((folder / "vae").glob("*.safetensors")), next((foreign / "unet").glob("*.safetensors")))
    said = {
        tmp_path / "nothing": "there is no such folder",
        tmp_path / "empty": "it has no model_index.json",
        pickled: "unet has no safetensors files but pickled ones \\(.bin\\), which are never loaded",
        foreign: "weights of its unet are missing",
    }
    for path, words in said.items():
        with pytest.raises(LabError, match=words):
            continual.run(preset("smoke").but(**METHOD, stable_diffusion=str(path)), home=tmp_path / "home")
