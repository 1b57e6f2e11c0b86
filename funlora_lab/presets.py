"""The experiments that have a name: digits and small photographs for a CPU, the data sets and budgets of the paper."""

from funlora_lab.config import Experiment
from funlora_lab.errors import LabError

_DIGITS = Experiment()

_CIFAR10 = Experiment(
    preset="cifar10",
    data="cifar10",
    split="2-2",
    valid_fraction=0.0,
    flip=True,
    image_size=32,
    channels=3,
    base_channels=128,
    multipliers=(1, 2, 2, 2),
    res_blocks=2,
    attention=(16,),
    norm_groups=32,
    dropout=0.1,
    window="40-54",
    lora_v1_window="48-50",
    lora_v2_window="44-50",
    lora_attention_rank=2,
    base_images=5_000_000,  # 500 epochs of 10,000 images
    base_batch=128,
    base_lr=2e-4,
    base_schedule="constant",
    base_warmup=128_000,  # 1000 iterations
    base_ema=0.9999,
    base_ema_start=2_000_000,  # from epoch 200
    adapter_images=1_500_000,  # 300 epochs of 5,000 images
    adapter_batch=64,  # two classes share a batch of 128
    adapter_schedule="constant",
    adapter_ema=0.9999,
    adapter_ema_start=500_000,  # from epoch 100
    solver="dopri5",
    samples_per_class=5_000,
    chunk=500,
    classifier="resnet18",
    classifier_epochs=30,
    classifier_batch=100,
    classifier_lr=0.1,
    crop=4,
    log_every=500,
)
_CIFAR100 = _CIFAR10.but(
    preset="cifar100",
    data="cifar100",
    split="20-20",
    adapter_images=150_000,  # 300 epochs of 500 images
    adapter_batch=6,  # twenty classes share a batch of about 128
    adapter_ema_start=50_000,
    samples_per_class=500,
)

PRESETS = {
    "smoke": _DIGITS.but(
        preset="smoke",
        split="6-2",
        base_channels=8,
        norm_groups=2,
        window="11-23",
        functions=4,
        base_images=640,
        base_batch=32,
        adapter_images=128,
        adapter_batch=16,
        steps=2,
        samples_per_class=20,
        chunk=20,
        classifier_epochs=2,
        log_every=5,
    ),
    "digits": _DIGITS,
    "digits-small": _DIGITS.but(  # for tables of many runs: half the channels, shorter training
        preset="digits-small",
        base_channels=16,
        base_images=38_400,
        adapter_images=3_200,
        adapter_batch=16,
        lanes=8,
        samples_per_class=80,
        chunk=80,
        classifier_epochs=10,
    ),
    "cifar10": _CIFAR10,
    # Photographs without a GPU: a quarter of the pixels and of the channels, and far fewer images seen.
    "cifar10-tiny": _CIFAR10.but(
        preset="cifar10-tiny",
        image_size=16,
        base_channels=32,
        multipliers=(1, 2, 2),
        res_blocks=1,
        attention=(),  # but for the middle's
        norm_groups=8,
        dropout=0.0,
        window="17-27",
        lora_v1_window="24-26",
        lora_v2_window="21-25",
        valid_fraction=0.04,  # 200 images a class, by whose loss its tables compare
        base_images=80_000,  # 8 epochs of 9,600 images
        base_batch=64,
        base_lr=1e-3,
        base_schedule="cosine",
        base_warmup=3_200,  # 50 steps
        base_ema=0.99,
        base_ema_start=0,
        adapter_images=6_400,
        adapter_batch=16,
        adapter_schedule="cosine",
        adapter_ema=0.98,
        adapter_ema_start=0,
        lanes=8,
        solver="midpoint",
        steps=4,
        samples_per_class=500,
        chunk=100,
        classifier="cnn",
        classifier_epochs=6,
        classifier_batch=50,
        classifier_lr=0.05,
        crop=2,
        log_every=25,
    ),
    # Half the channels and a quarter of the images: about 29 PFLOP in all (base 12, adapters 7, samples 3, classifiers
    # 8), so 5 to 8 minutes at 70 to 100 TFLOP/s, a tenth of an H200's bf16 rate; an estimate, until it is measured.
    "cifar10-quick": _CIFAR10.but(
        preset="cifar10-quick",
        base_channels=64,
        precision="bf16",
        valid_fraction=0.02,  # 100 images a class, by whose loss its tables compare
        base_images=1_200_000,  # 122 epochs of 9,800 images
        base_batch=256,
        base_lr=5e-4,
        base_schedule="cosine",
        base_warmup=25_600,  # 100 steps
        base_ema=0.999,
        base_ema_start=0,
        adapter_images=128_000,  # 26 epochs of 4,900 images
        adapter_schedule="cosine",
        adapter_ema=0.995,
        adapter_ema_start=0,
        solver="midpoint",
        steps=8,  # 16 evaluations of the network
        chunk=1_000,
        classifier_epochs=12,
        classifier_batch=200,
        log_every=100,
    ),
    "cifar100": _CIFAR100,
    "cifar100-10": _CIFAR100.but(
        preset="cifar100-10", split="10-10", base_images=2_500_000, base_ema_start=1_000_000, adapter_batch=13
    ),
    "imagenet100": _CIFAR10.but(
        preset="imagenet100",
        data="folder",
        split="20-20",
        image_size=64,
        multipliers=(1, 2, 3, 4),
        attention=(32, 16, 8),
        window="40-56",
        lora_v1_window="46-47",
        lora_v2_window="48-57",
        base_images=6_500_000,  # 250 epochs of 26,000 images
        base_ema_start=2_600_000,
        adapter_images=260_000,  # 200 epochs of 1,300 images
        adapter_batch=6,
        adapter_ema_start=130_000,
        samples_per_class=1_300,
        chunk=100,
    ),
}


def preset(name: str) -> Experiment:
    """The preset of that name; raises LabError listing the presets."""
    if name not in PRESETS:
        raise LabError(f"Unknown preset '{name}': accepted are {', '.join(PRESETS)}.")
    return PRESETS[name]
