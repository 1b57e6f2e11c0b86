"""What a run is: one flat, frozen, validated object, and how ``key=value`` words change it.

Durations are counted in images seen, so they mean the same at any batch size; steps and epochs follow from them.
"""

import dataclasses
import difflib
import re
from dataclasses import dataclass

from funlora_lab.errors import LabError

FUNCTIONS = ("product", "shift", "power", "cosine")
OPERATIONS = ("mul", "add", "mul-add")
STARTS = ("identity", "equal", "literal")
SOLVERS = ("euler", "midpoint", "rk4", "dopri5", "dopri5-each")
SCORED = ("every", "last", "none")

# name -> (function, hyperparameters learned, adapter learning rate at which it did best on held-out digits)
FUNCTIONAL_METHODS = {
    "funlora": ("cosine", True, 3e-2),
    "cosine-frozen": ("cosine", False, 3e-2),
    "power": ("power", True, 1.5e-2),
    "power-frozen": ("power", False, 1.5e-2),
    "shift": ("shift", False, 1e-1),
    "vanilla-mul": ("product", False, 1e-1),
}
# every other method that learns a class as a separate row of numbers -> its adapter learning rate, found likewise (the
# compared ones: best of a coarse grid on one base at half the images, so within a factor of two or three)
OTHER_ADAPTERS = {
    "vanilla-add": 1e-2,
    "scale-shift": 1e-1,
    "lora-attention": 3e-2,
    "lora-conv-v1": 3e-2,
    "lora-conv-v2": 3e-2,
    "kml": 2e-1,
    "label-embedding": 3e-2,
}
# methods that train the whole network, or no generator at all
WHOLE_NETWORK = ("fine-tune", "self-replay", "generative-multitask", "classifier-multitask")
METHODS = (*FUNCTIONAL_METHODS, *OTHER_ADAPTERS, *WHOLE_NETWORK)
VANILLA = ("vanilla-add", "vanilla-mul")  # F = AB, and its rank may be chosen layer by layer


@dataclass(frozen=True)
class Experiment:
    """Every setting of a run. ``override`` changes it from ``key=value`` words; a bad value names field and choices."""

    preset: str = "digits"

    # data
    data: str = "digits"  # digits | cifar10 | cifar100 | folder
    data_root: str = ""  # where the data set lies; empty: FUNLORA_DATA, else ./data
    pretrain_root: str = ""  # folder of unlabelled pictures on which the base is trained first; empty: none
    pretrain_images: int = 0  # images seen there; 0: as many as base_images
    split: str = "2-2"  # classes of task 1, classes of every later task
    class_order: str = "natural"  # natural | shuffled-SEED | class indices joined by commas
    valid_fraction: float = 0.15  # share of the training images held out for every choice and for flow_loss
    flip: bool = False  # mirror training images at random
    image_size: int = 8  # pixels a side
    channels: int = 1  # colour channels

    # backbone (ADM U-Net)
    base_channels: int = 32
    multipliers: tuple[int, ...] = (1, 2)  # channels of each level, in base channels
    res_blocks: int = 1  # residual blocks a level
    attention: tuple[int, ...] = ()  # resolutions (pixels a side) with attention
    head_channels: int = 64  # channels an attention head
    norm_groups: int = 8  # groups of every GroupNorm
    dropout: float = 0.0  # while the whole network trains; adapters train without

    # method
    method: str = "funlora"
    operation: str = "mul"  # mul: W*F | add: W+F | mul-add: W*F+G
    start: str = "identity"  # identity | equal | literal: first ponderations (see functions.py)
    functions: int = 10  # p, the number of functions summed in Eq. 8
    ratio: int = 1  # r: A and B have Cout/r and Cin/r entries
    window: str = "11-23"  # first-last index of the adapted convolutions
    lora_v1_window: str = "18-20"  # the same for lora-conv-v1 and kml, which learn about k*k times as much a layer
    lora_v2_window: str = "14-20"  # the same for lora-conv-v2, which learns k times as much a layer
    rank: int = 1  # of the vanilla methods and lora-conv-v1, -v2
    extra_rank: tuple[int, ...] = ()  # indices of the convolutions given one rank more (vanilla methods only)
    lora_attention_rank: int = 5  # of lora-attention
    label_embedding: str = "mean"  # of a new class: mean of task 1's, frozen | learned
    seed: int = 0

    # training of the base on task 1 (and of any method that trains the whole network)
    precision: str = "fp32"  # fp32 | bf16 (autocast, where the device has it; weights and solver state stay fp32)
    base_images: int = 51_200  # images seen
    base_batch: int = 64  # images a step
    base_lr: float = 2e-3  # Adam
    base_schedule: str = "cosine"  # constant | cosine, after the warm-up
    base_warmup: int = 0  # images over which the rate rises linearly
    base_ema: float = 0.99  # decay of the moving average of the weights
    base_ema_start: int = 0  # images seen before averaging starts
    grad_clip: float = 1.0  # largest gradient norm of the whole network; adapters are never clipped

    # training of the adapter of one class
    adapter_images: int = 8_000  # images seen, per class
    adapter_batch: int = 32  # images a step, per class
    adapter_lr: float = 0.0  # Adam; 0: the rate listed for the method
    adapter_schedule: str = "cosine"
    adapter_warmup: int = 0
    adapter_ema: float = 0.98
    adapter_ema_start: int = 0
    lanes: int = 0  # classes trained side by side; 0: all new classes of a task; more: classes of later tasks too

    # sampling
    solver: str = "midpoint"  # euler | midpoint | rk4 (fixed grid) | dopri5 | dopri5-each (adaptive)
    steps: int = 4  # of a fixed-grid solver
    tolerance: float = 1e-5  # absolute and relative, of dopri5 and dopri5-each
    samples_per_class: int = 150  # synthetic images a class for the classifier
    chunk: int = 150  # images integrated together; part of what fixes every bit of an image

    # classifier
    classifier: str = "cnn"  # cnn: three convolutions | resnet18
    classifier_epochs: int = 15
    classifier_batch: int = 50
    classifier_lr: float = 0.05  # peak of the one-cycle schedule
    classifier_momentum: float = 0.9
    classifier_weight_decay: float = 5e-4
    crop: int = 0  # pixels of padding for random crops

    score_after: str = "every"  # tasks after which a classifier is trained and scored: every | last | none
    log_every: int = 25  # steps between two lines of the log

    def __post_init__(self):
        def check(ok: bool, field: str, accepted: str):
            if not ok:
                raise LabError(f"{field}={_shown(getattr(self, field))}: accepted is {accepted}.")

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float):
                check(value == value and abs(value) != float("inf"), field.name, "a finite number")
        choices = {
            "data": ("digits", "cifar10", "cifar100", "folder"),
            "method": METHODS,
            "operation": OPERATIONS,
            "start": STARTS,
            "label_embedding": ("mean", "learned"),
            "precision": ("fp32", "bf16"),
            "base_schedule": ("constant", "cosine"),
            "adapter_schedule": ("constant", "cosine"),
            "solver": SOLVERS,
            "classifier": ("cnn", "resnet18"),
            "score_after": SCORED,
        }
        for field, accepted in choices.items():
            check(getattr(self, field) in accepted, field, "one of " + ", ".join(accepted))
        at_least_one = (
            "image_size channels base_channels res_blocks head_channels norm_groups functions ratio rank "
            "lora_attention_rank base_images base_batch adapter_images adapter_batch steps samples_per_class chunk "
            "classifier_epochs classifier_batch log_every"
        )
        for field in at_least_one.split():
            check(getattr(self, field) >= 1, field, "a whole number from 1 up")
        not_negative = "seed base_warmup base_ema_start adapter_warmup adapter_ema_start lanes crop pretrain_images"
        for field in not_negative.split():
            check(getattr(self, field) >= 0, field, "a whole number from 0 up")
        for field in ("valid_fraction", "dropout", "base_ema", "adapter_ema", "classifier_momentum"):
            check(0 <= getattr(self, field) < 1, field, "a number from 0 up to, not including, 1")
        for field in ("base_lr", "tolerance", "classifier_lr", "grad_clip"):
            check(getattr(self, field) > 0, field, "a number above 0")
        for field in ("adapter_lr", "classifier_weight_decay"):
            check(getattr(self, field) >= 0, field, "a number from 0 up")
        check(
            bool(self.multipliers) and min(self.multipliers) >= 1, "multipliers", "whole numbers from 1 up, as 1,2,2,2"
        )
        shrink = 2 ** (len(self.multipliers) - 1)
        check(
            self.image_size % shrink == 0, "image_size", f"a multiple of {shrink} with {len(self.multipliers)} levels"
        )
        check(bool(self.pretrain_root) or not self.pretrain_images, "pretrain_images", "0 without pretrain_root")
        check(self.crop < self.image_size, "crop", "fewer pixels than image_size")
        check(re.fullmatch(r"[1-9]\d*-[1-9]\d*", self.split) is not None, "split", "two whole numbers such as 2-2")
        check(
            re.fullmatch(r"natural|shuffled-\d+|\d+(,\d+)+", self.class_order) is not None,
            "class_order",
            "natural, shuffled-SEED or class indices such as 3,0,1,2",
        )
        for field in ("window", "lora_v1_window", "lora_v2_window"):
            two = re.fullmatch(r"(\d+)-(\d+)", getattr(self, field))
            check(two is not None, field, "two layer indices such as 40-54")
            check(int(two[1]) <= int(two[2]), field, "two layer indices, the first not above the last")
        special = self.operation != "mul" and self.method not in FUNCTIONAL_METHODS
        check(not special, "operation", f"mul for the method {self.method}")
        whole = self.method in FUNCTIONAL_METHODS or self.method in VANILLA
        check(self.ratio == 1 or whole, "ratio", f"1 for the method {self.method}")
        ranked = self.method in (*VANILLA, "lora-conv-v1", "lora-conv-v2")
        check(self.rank == 1 or ranked, "rank", f"1 for the method {self.method}")
        check(not self.extra_rank or self.method in VANILLA, "extra_rank", f"nothing for the method {self.method}")

    @property
    def window_field(self) -> str:
        """The setting that names the adapted convolutions of this method."""
        own = {"lora-conv-v1": "lora_v1_window", "kml": "lora_v1_window", "lora-conv-v2": "lora_v2_window"}
        return own.get(self.method, "window")

    @property
    def window_range(self) -> tuple[int, int]:
        """First and last index of the adapted convolutions, both included."""
        first, last = getattr(self, self.window_field).split("-")
        return int(first), int(last)

    @property
    def adapter_rate(self) -> float:
        """Adam's learning rate for adapters: the setting, or the one listed for the method."""
        if self.adapter_lr:
            return self.adapter_lr
        return OTHER_ADAPTERS.get(self.method) or FUNCTIONAL_METHODS[self.method][2]

    @property
    def base_steps(self) -> int:
        return -(-self.base_images // self.base_batch)

    @property
    def adapter_steps(self) -> int:
        return -(-self.adapter_images // self.adapter_batch)

    @property
    def pretrain_steps(self) -> int:
        return -(-(self.pretrain_images or self.base_images) // self.base_batch)

    @property
    def identity(self) -> dict:
        """The settings that differ from their defaults: what names a run's folder, whatever settings come later."""
        return self.unlike(Experiment())

    def unlike(self, other: "Experiment") -> dict:
        """The settings whose values differ from another experiment's."""
        theirs = dataclasses.asdict(other)
        return {name: value for name, value in dataclasses.asdict(self).items() if value != theirs[name]}

    def but(self, **changes) -> "Experiment":
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def select(self, *prefixes: str) -> dict:
        """The fields whose names start with one of ``prefixes``: what an artefact depends on."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k.startswith(prefixes)}


def _shown(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _parse(field: dataclasses.Field, word: str):
    kinds = {
        "int": (lambda w: int(w.replace("_", "")), "a whole number"),
        "float": (float, "a number"),
        "bool": (lambda w: {"true": True, "false": False}[w.lower()], "true or false"),
        "str": (str, "text"),
        "tuple[int, ...]": (lambda w: tuple(int(x) for x in w.split(",") if x), "whole numbers such as 1,2,2"),
    }
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    parse, accepted = kinds["tuple[int, ...]" if "tuple" in str(field.type) else kind]
    try:
        return parse(word)
    except (ValueError, KeyError):
        raise LabError(f"{field.name}={word}: accepted is {accepted}.") from None


def override(experiment: Experiment, words: list[str]) -> Experiment:
    """Apply ``key=value`` words, all at once; raises LabError naming the first unknown key or bad value."""
    fields = {field.name: field for field in dataclasses.fields(Experiment) if field.name != "preset"}
    changes = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise LabError(f"'{word}' is not a setting: write it as key=value, for example seed=1.")
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=3, cutoff=0.4) or [k for k in fields if key in k][:3]
            hint = f"did you mean {', '.join(near)}?" if near else "`funlora list` shows all settings."
            raise LabError(f"Unknown setting '{key}': {hint}")
        changes[key] = _parse(fields[key], value)
    return experiment.but(**changes)
