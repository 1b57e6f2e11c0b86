"""What a run is: one frozen, validated object, and how ``key=value`` words change it.

Every setting has one flat name wherever it is written: on the command line, in ``but(...)``, in a stored run. In the
object the settings of the network and of each training stand in a group: ``adapter_images`` is ``adapter.images``.
Durations are counted in images seen, so they mean the same at any batch size; steps and epochs follow from them.

A setting without a default is said by every preset; a default leaves a feature out, and never changes.
"""

import dataclasses
import difflib
import re
from dataclasses import MISSING, dataclass

from funlora_lab.errors import LabError, place

OPERATIONS = ("mul", "add", "mul-add")
STARTS = ("identity", "equal", "literal", "kaiming")
SCORED = ("every", "last", "none")
PLACES = ("data_root", "pretrain_root", "base_weights", "stable_diffusion")  # settings that name a file or a folder

# the texts of what a user registered under the name of a method: part of what a run of that method is
REGISTERED_TEXTS: dict[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class Network:
    """The ADM U-Net; image size and channels are those of the data."""

    base_channels: int
    multipliers: tuple[int, ...]  # channels of each level, in base channels
    res_blocks: int  # residual blocks a level
    attention: tuple[int, ...] = ()  # resolutions (pixels a side) with attention
    head_channels: int = 64  # channels an attention head
    norm_groups: int  # groups of every GroupNorm
    dropout: float = 0.0  # while the whole network trains; adapters train without


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long, in which batches and at which rate Adam trains."""

    images: int  # images seen; of adapters: by each class
    batch: int  # images a step; of adapters: of each class
    lr: float  # Adam's rate; of adapters 0: the rate that the method owns
    schedule: str  # constant | cosine, after the warm-up
    warmup: int = 0  # images over which the rate rises linearly
    ema: float  # decay of the moving average of the weights
    ema_start: int = 0  # images seen before averaging starts

    @property
    def steps(self) -> int:
        return -(-self.images // self.batch)


@dataclass(frozen=True, kw_only=True)
class ClassifierTraining:
    """The classifier that scores the samples: SGD with Nesterov momentum and a one-cycle rate."""

    kind: str  # cnn: three convolutions | resnet18
    epochs: int
    batch: int
    lr: float  # peak of the one-cycle schedule
    momentum: float = 0.9
    weight_decay: float = 5e-4
    crop: int = 0  # pixels of padding for random crops


@dataclass(frozen=True, kw_only=True)
class PriorSystems:  # what only the systems that the paper compares with read
    diffusion_steps: int = 1000  # T, the times of the noise schedule
    noise_schedule: str = ""  # linear | ho | cosine | stable; empty: the system's own
    denoiser: str = ""  # ddim | ddpm; empty: the system's own
    denoising_steps: int = 0  # of the sampler; 0: the system's own
    guidance: float = 0.0  # scale of the classifier's gradient; 0: the system's own
    replay_every: int = 5  # steps of the classifier between two drawings of replayed images
    replay_per_class: int = 0  # images of a class replayed to the generator; 0: samples_per_class
    replay_budget: str = "seen"  # images a task trains on: adapter_images for every class seen | for the new ones alone
    later_rate: float = 0.1  # the lasting classifier's rate after task 1, as a share of that at task 1
    head_hidden: int = 0  # width of the head of jdcl; 0: its own
    local_start: str = "previous"  # previous | scratch: where jdcl's network of the new classes starts
    stable_diffusion: str = ""  # folder with the weights of Stable Diffusion 1.x
    prompt: str = "a photo of a {}"  # with the class's name
    prompt_guidance: float = 7.5  # scale of classifier-free guidance
    stable_size: int = 256  # pixels a side of its images


GROUPS = {"network": "", "base": "base_", "adapter": "adapter_", "classifier": "classifier_", "prior": ""}  # prefixes
UNPREFIXED = {"classifier_kind": "classifier", "classifier_crop": "crop"}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Every setting of a run. Raises LabError naming the first setting whose value is not accepted, and what is."""

    preset: str

    data: str  # a data source of `funlora list`
    data_root: str = ""  # where the data set lies; empty: FUNLORA_DATA, else ./data
    pretrain_root: str = ""  # folder of unlabelled pictures on which the base is trained first; empty: none
    pretrain_images: int = 0  # images seen there; 0: as many as base_images
    base_weights: str = ""  # file of U-Net weights from which task 1 starts; with base_images=0 they are the base
    split: str  # classes of task 1, classes of every later task
    class_order: str = "natural"  # natural | shuffled-SEED | class indices joined by commas
    valid_fraction: float = 0.0  # share of the training images held out for every choice and for flow_loss
    flip: bool = False  # mirror training images at random
    image_size: int  # pixels a side
    channels: int  # colour channels
    network: Network

    method: str = "funlora"  # a method or system of `funlora list`
    operation: str = "mul"  # mul: W*F | add: W+F | mul-add: W*F+G
    start: str = "identity"  # identity | equal | literal | kaiming: first numbers (adapters/functions.py)
    functions: int = 10  # p, the number of functions summed in Eq. 8
    ratio: int = 1  # r: A and B have Cout/r and Cin/r entries
    window: str  # first-last index of the adapted convolutions
    lora_v1_window: str  # the same for lora-conv-v1 and kml, which learn about k*k times as much a layer
    lora_v2_window: str  # the same for lora-conv-v2, which learns k times as much a layer
    rank: int = 1  # of the vanilla methods and lora-conv-v1, -v2
    extra_rank: tuple[int, ...] = ()  # indices of the convolutions given one rank more (vanilla methods only)
    lora_attention_rank: int = 5  # of lora-attention
    label_embedding: str = "mean"  # of a new class: mean of task 1's, frozen | learned
    seed: int = 0
    precision: str = "fp32"  # fp32 | bf16 (autocast, where the device has it; weights and solver state stay fp32)

    base: Training  # of the whole network on task 1, and of every system that trains it further
    grad_clip: float = 1.0  # largest gradient norm of the whole network; adapters are never clipped
    adapter: Training
    lanes: int = 0  # classes trained side by side; 0: all new classes of a task; more: classes of later tasks too

    solver: str  # a solver of `funlora list`
    steps: int = 4  # of a fixed-grid solver
    tolerance: float = 1e-5  # absolute and relative, of dopri5 and dopri5-each
    samples_per_class: int  # synthetic images a class for the classifier
    chunk: int  # images integrated together; part of what fixes every bit of an image

    classifier: ClassifierTraining
    prior: PriorSystems = PriorSystems()
    score_after: str = "every"  # tasks after which a classifier is trained and scored: every | last | none
    log_every: int  # steps between two lines of the log

    def __post_init__(self):
        values = self.flat

        def check(ok: bool, name: str, accepted: str):
            if not ok:
                raise LabError(f"{name}={shown(values[name])}: accepted is {accepted}.")

        for name, (_, field) in FLAT.items():
            value, (_, accepted, kinds) = values[name], KINDS.get(field.type, KINDS[tuple])
            check(isinstance(value, kinds) and isinstance(value, bool) == (field.type is bool), name, accepted)
            check(not isinstance(value, float) or abs(value) < float("inf"), name, "a finite number")
        for name, accepted in CHOICES.items():
            check(values[name] in accepted, name, "one of " + ", ".join(accepted))
        for accepted, (ok, names) in RANGES.items():
            for name in names.split():
                check(ok(values[name]), name, accepted)
        levels, size = self.network.multipliers, self.image_size
        check(bool(levels) and min(levels) >= 1, "multipliers", "whole numbers from 1 up, as 1,2,2,2")
        shrink = 2 ** (len(levels) - 1)
        check(size % shrink == 0, "image_size", f"a multiple of {shrink} with {len(levels)} levels")
        check(self.base.images > 0 or bool(self.base_weights), "base_images", "a whole number from 1 up")
        check(bool(self.pretrain_root) or not self.pretrain_images, "pretrain_images", "0 without pretrain_root")
        check(not (self.pretrain_root and self.base_weights), "base_weights", "nothing beside pretrain_root")
        check(self.classifier.crop < size, "crop", "fewer pixels than image_size")
        check(self.start != "kaiming" or self.operation != "mul", "start", "another one with operation=mul")
        for name in ("window", "lora_v1_window", "lora_v2_window"):
            first, last = map(int, values[name].split("-"))
            check(first <= last, name, "two layer indices, the first not above the last")

    @property
    def flat(self) -> dict:
        """Every setting by its flat name."""
        return {name: getattr(getattr(self, group) if group else self, f.name) for name, (group, f) in FLAT.items()}

    @classmethod
    def from_flat(cls, values: dict) -> "Experiment":
        """The experiment of flat settings, those with a default optional; raises LabError naming what is wrong."""
        groups: dict[str, dict] = {group: {} for group in ("", *GROUPS)}
        for name, value in values.items():
            if name not in FLAT:
                raise LabError(unknown(name))
            group, field = FLAT[name]
            value = str(place(value)) if name in PLACES and isinstance(value, str) and value else value
            groups[group][field.name] = tuple(value) if isinstance(value, list) else value
        missing = [name for name, (_, f) in FLAT.items() if f.default is MISSING and name not in values]
        if missing:
            raise LabError(f"The setting {missing[0]} is missing.")
        top = groups.pop("")
        return cls(**top, **{name: KIND_OF_GROUP[name](**settings) for name, settings in groups.items()})

    @property
    def identity(self) -> dict:
        """What names a run: the settings without a default or unlike it, and the text of a method of the user's own."""
        own = REGISTERED_TEXTS.get(self.method)
        named = {name: value for name, value in self.flat.items() if value != FLAT[name][1].default}
        return named | ({"text": own} if own else {})

    def unlike(self, other: "Experiment") -> dict:
        """The settings, by flat name, whose values differ from another experiment's."""
        theirs = other.flat
        return {name: value for name, value in self.flat.items() if value != theirs[name]}

    def but(self, **changes) -> "Experiment":
        """A copy with some settings changed, by their flat names, validated again."""
        return Experiment.from_flat(self.flat | changes)


def _flat_names() -> dict[str, tuple[str, dataclasses.Field]]:
    names = {}
    for field in dataclasses.fields(Experiment):
        for inner in dataclasses.fields(field.type) if field.name in GROUPS else ():
            name = GROUPS[field.name] + inner.name
            names[UNPREFIXED.get(name, name)] = (field.name, inner)
        if field.name not in GROUPS:
            names[field.name] = ("", field)
    return names


KIND_OF_GROUP = {field.name: field.type for field in dataclasses.fields(Experiment) if field.name in GROUPS}
FLAT = _flat_names()  # flat name -> (group or "", field)

KINDS = {  # type of a setting -> (how a word is read, what is accepted, types of its values)
    int: (lambda word: int(word.replace("_", "")), "a whole number", int),
    float: (float, "a number", (int, float)),
    bool: (lambda word: {"true": True, "false": False}[word.lower()], "true or false", bool),
    str: (str, "text", str),
    tuple: (lambda word: tuple(int(x) for x in word.split(",") if x), "whole numbers such as 1,2,2", tuple),
}
CHOICES = {
    "operation": OPERATIONS,
    "start": STARTS,
    "label_embedding": ("mean", "learned"),
    "precision": ("fp32", "bf16"),
    "base_schedule": ("constant", "cosine"),
    "adapter_schedule": ("constant", "cosine"),
    "classifier": ("cnn", "resnet18"),
    "score_after": SCORED,
    "replay_budget": ("seen", "new"),
    "local_start": ("previous", "scratch"),
}
RANGES = {  # what is accepted -> (the test of it, the settings)
    "a whole number from 1 up": (
        lambda value: value >= 1,
        "image_size channels base_channels res_blocks head_channels norm_groups functions ratio rank "
        "lora_attention_rank base_batch adapter_images adapter_batch steps samples_per_class chunk classifier_epochs "
        "classifier_batch log_every diffusion_steps replay_every stable_size",
    ),
    "a whole number from 0 up": (
        lambda value: value >= 0,
        "seed base_images base_warmup base_ema_start adapter_warmup adapter_ema_start lanes crop pretrain_images "
        "replay_per_class denoising_steps head_hidden",
    ),
    "a number from 0 up to, not including, 1": (
        lambda value: 0 <= value < 1,
        "valid_fraction dropout base_ema adapter_ema classifier_momentum",
    ),
    "a number above 0": (lambda value: value > 0, "base_lr tolerance classifier_lr grad_clip later_rate"),
    "a number from 0 up": (lambda value: value >= 0, "adapter_lr classifier_weight_decay guidance prompt_guidance"),
    "two whole numbers such as 2-2": (re.compile(r"[1-9]\d*-[1-9]\d*").fullmatch, "split"),
    "two layer indices such as 40-54": (re.compile(r"\d+-\d+").fullmatch, "window lora_v1_window lora_v2_window"),
    "natural, shuffled-SEED or class indices such as 3,0,1,2": (
        re.compile(r"natural|shuffled-\d+|\d+(,\d+)+").fullmatch,
        "class_order",
    ),
}


def shown(value) -> str:
    """A setting's value as the word that ``override`` reads back."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def unknown(name: str) -> str:
    """The sentence that refuses a setting nobody knows."""
    near = difflib.get_close_matches(name, FLAT, n=3, cutoff=0.4) or [known for known in FLAT if name in known][:3]
    hint = f"did you mean {', '.join(near)}?" if near else "`funlora list` shows all settings."
    return f"Unknown setting '{name}': {hint}"


def read_words(words: list[str]) -> dict:
    """``key=value`` words -> settings by flat name; raises LabError naming the first that cannot be read."""
    values = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise LabError(f"'{word}' is not a setting: write it as key=value, for example seed=1.")
        if name not in FLAT or name == "preset":
            raise LabError(unknown(name))
        read, accepted, _ = KINDS.get(FLAT[name][1].type, KINDS[tuple])
        try:
            values[name] = read(value)
        except (ValueError, KeyError):
            raise LabError(f"{name}={value}: accepted is {accepted}.") from None
    return values


def override(experiment: Experiment, words: list[str]) -> Experiment:
    """An experiment with ``key=value`` words applied, all at once; LabError names the first that is not accepted."""
    return experiment.but(**read_words(words))
