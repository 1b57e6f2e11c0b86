"""The experiments that have a name, in the words that ``--set`` takes: for a CPU, and those of the paper."""

import shlex
from contextlib import suppress

from funlora_lab.errors import LabError
from funlora_lab.experiment import KINDS, Experiment, override, read_words

PRESETS: dict[str, Experiment] = {}


def _preset(name: str, text: str, like: str | None = None) -> None:
    words = [word for line in text.splitlines() for word in line.partition("#")[0].split()]
    values = PRESETS[like].flat if like else {}
    PRESETS[name] = Experiment.from_flat(values | read_words(words) | {"preset": name})


_preset(
    "digits",
    """
    data=digits split=2-2 valid_fraction=0.15 image_size=8 channels=1
    base_channels=32 multipliers=1,2 res_blocks=1 norm_groups=8
    window=11-23 lora_v1_window=18-20 lora_v2_window=14-20
    base_images=51_200 base_batch=64 base_lr=2e-3 base_schedule=cosine base_ema=0.99
    adapter_images=8_000 adapter_batch=32 adapter_lr=0 adapter_schedule=cosine adapter_ema=0.98
    solver=midpoint steps=4 samples_per_class=150 chunk=150
    classifier=cnn classifier_epochs=15 classifier_batch=50 classifier_lr=0.05 log_every=25
    """,
)
_preset(
    "smoke",
    """
    split=6-2 base_channels=8 norm_groups=2 functions=4
    base_images=640 base_batch=32 adapter_images=128 adapter_batch=16
    steps=2 samples_per_class=20 chunk=20 classifier_epochs=2 log_every=5
    """,
    like="digits",
)
_preset(  # for tables of many runs: half the channels, shorter training
    "digits-small",
    """
    base_channels=16 base_images=38_400 adapter_images=3_200 adapter_batch=16 lanes=8
    samples_per_class=80 chunk=80 classifier_epochs=10
    """,
    like="digits",
)
_preset(
    "cifar10",
    """
    data=cifar10 split=2-2 flip=true image_size=32 channels=3
    base_channels=128 multipliers=1,2,2,2 res_blocks=2 attention=16 norm_groups=32 dropout=0.1
    window=40-54 lora_v1_window=48-50 lora_v2_window=44-50 lora_attention_rank=2
    base_images=5_000_000  # 500 epochs of 10,000 images
    base_batch=128 base_lr=2e-4 base_schedule=constant base_ema=0.9999
    base_warmup=128_000  # 1000 iterations
    base_ema_start=2_000_000  # from epoch 200
    adapter_images=1_500_000  # 300 epochs of 5,000 images
    adapter_batch=64  # two classes share a batch of 128
    adapter_lr=0 adapter_schedule=constant adapter_ema=0.9999
    adapter_ema_start=500_000  # from epoch 100
    solver=dopri5 samples_per_class=5_000 chunk=500
    classifier=resnet18 classifier_epochs=30 classifier_batch=100 classifier_lr=0.1 crop=4 log_every=500
    """,
)
# the supplement's base, first trained on the pictures of COCO without their labels, on as many images as task 1
_preset("cifar10-coco", "pretrain_root=data/coco", like="cifar10")
_preset(  # photographs without a GPU: a quarter of the pixels and of the channels, and far fewer images seen
    "cifar10-tiny",
    """
    image_size=16 base_channels=32 multipliers=1,2,2 res_blocks=1 norm_groups=8 dropout=0
    attention=  # but for the middle's
    window=17-27 lora_v1_window=24-26 lora_v2_window=21-25
    valid_fraction=0.04  # 200 images a class, by whose loss its tables compare
    base_images=80_000  # 8 epochs of 9,600 images
    base_batch=64 base_lr=1e-3 base_schedule=cosine base_ema=0.99 base_ema_start=0
    base_warmup=3_200  # 50 steps
    adapter_images=6_400 adapter_batch=16 adapter_schedule=cosine adapter_ema=0.98 adapter_ema_start=0 lanes=8
    solver=midpoint steps=4 samples_per_class=500 chunk=100
    classifier=cnn classifier_epochs=6 classifier_batch=50 classifier_lr=0.05 crop=2 log_every=25
    """,
    like="cifar10",
)
# Half the channels and a quarter of the images: about 29 PFLOP in all (base 12, adapters 7, samples 3, classifiers 8),
# so about 4 minutes at 120 TFLOP/s, a seventh of an H200's bf16 rate; reckoned, not measured.
_preset(
    "cifar10-quick",
    """
    base_channels=64 precision=bf16
    valid_fraction=0.02  # 100 images a class, by whose loss its tables compare
    base_images=1_200_000  # 122 epochs of 9,800 images
    base_batch=256 base_lr=5e-4 base_schedule=cosine base_ema=0.999 base_ema_start=0
    base_warmup=25_600  # 100 steps
    adapter_images=128_000  # 26 epochs of 4,900 images
    adapter_schedule=cosine adapter_ema=0.995 adapter_ema_start=0
    solver=midpoint steps=8 chunk=1_000  # 16 evaluations of the network
    classifier_epochs=12 classifier_batch=200 log_every=100
    """,
    like="cifar10",
)
_preset(
    "cifar100",
    """
    data=cifar100 split=20-20 samples_per_class=500
    adapter_images=150_000 adapter_ema_start=50_000  # 300 epochs of 500 images
    adapter_batch=6  # twenty classes share a batch of about 128
    """,
    like="cifar10",
)
_preset("cifar100-10", "split=10-10 base_images=2_500_000 base_ema_start=1_000_000 adapter_batch=13", like="cifar100")
_preset(
    "imagenet100",
    """
    data=folder split=20-20 image_size=64 multipliers=1,2,3,4 attention=32,16,8
    window=40-56 lora_v1_window=46-47 lora_v2_window=48-57
    base_images=6_500_000 base_ema_start=2_600_000  # 250 epochs of 26,000 images
    adapter_images=260_000 adapter_ema_start=130_000 adapter_batch=6  # 200 epochs of 1,300 images
    samples_per_class=1_300 chunk=100
    """,
    like="cifar10",
)


def preset(name: str) -> Experiment:
    """The preset of that name; raises LabError listing the presets."""
    if name not in PRESETS:
        raise LabError(f"Unknown preset '{name}': accepted are {', '.join(PRESETS)}.")
    return PRESETS[name]


def words(settings: str | list[str]) -> list[str]:
    """The parameter ``settings`` of a notebook as ``key=value`` words: a list, or one text quoted as in a shell."""
    with suppress(TypeError, ValueError):
        found = shlex.split(settings) if isinstance(settings, str) else list(settings)
        if all(isinstance(word, str) for word in found):
            return found
    raise LabError(f"settings={settings}: accepted are key=value words, quoted as in a shell, or a list of them.")


def check_parameter(name: str, value, kind: type) -> None:
    """Raise LabError unless a notebook's parameter is of its kind; a number is above 0, a seed 0 or more."""
    least = "" if kind in (str, bool) else " from 0 up" if name == "seed" else " above 0"
    right = isinstance(value, KINDS[kind][2]) and isinstance(value, bool) == (kind is bool)
    if not right or (least and not (0 <= value if name == "seed" else 0 < value < float("inf"))):
        raise LabError(f"{name}={value}: accepted is {KINDS[kind][1]}{least}.")


def check_parameters(variables: dict) -> None:
    """Raise LabError unless every annotated parameter of a notebook (``globals()``) is of the kind annotated.

    papermill takes whatever a person writes; ``settings`` may be a list.
    """
    for name, kind in variables["__annotations__"].items():
        words(variables[name]) if name == "settings" else check_parameter(name, variables[name], kind)
    preset(variables["preset"])


def configured(name: str, settings: str | list[str] = "", **changes) -> Experiment:
    """A preset with the ``settings`` of a notebook and further changes by flat name."""
    return override(preset(name), words(settings)).but(**changes)
