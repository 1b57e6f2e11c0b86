"""Rows over a frozen network: identity at the start, live gradients, merging, K classes side by side, keys."""

import math
from functools import cache

import pytest
import torch
from torch.func import functional_call

from funlora_lab import preset
from funlora_lab.adapters import METHODS, Adapters, numbers_by_layer, stack, unstack
from funlora_lab.data import load, tasks
from funlora_lab.errors import LabError
from funlora_lab.experiment import OPERATIONS
from funlora_lab.flow import flow_loss
from funlora_lab.store import Store
from funlora_lab.systems import AdaptedBase, Context, build_unet
from funlora_lab.training import Runtime

FUNCTIONAL = [name for name, method in METHODS.items() if method.matrix]
EXACT = [(name, {"operation": operation}) for name in FUNCTIONAL for operation in OPERATIONS]
RANKED = [
    ("vanilla-mul", {"extra_rank": (14, 16)}),
    ("vanilla-add", {"extra_rank": (14, 16)}),
    ("lora-conv-v1", {"rank": 2}),
    ("lora-conv-v2", {"rank": 2}),
]
CASES = EXACT + [(name, {}) for name in METHODS if name not in FUNCTIONAL] + RANKED
# what waits for one step: the factors whose partner is zero, and power's exponents, since log(1) = 0
PARTNERS = {
    "vanilla-add": {"A"},
    "lora-attention": {"A"},
    "lora-conv-v1": {"A"},
    "lora-conv-v2": {"A"},
    "kml": {"v"},
    "power": {"exponent", "G.exponent"},
}
PAPERS = sum(math.cos(i) for i in range(1, 5)) / 4  # F of the cosine where all 4 ponderations are 1
cases = pytest.mark.parametrize(("method", "settings"), CASES, ids=str)


@cache
def base():
    """A small network none of whose weights is zero, as after training; nothing changes it."""
    net, generator = build_unet(preset("smoke"), 6), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return net.eval().requires_grad_(False)


def small(method: str = "funlora", **settings) -> Adapters:
    return Adapters(base(), preset("smoke").but(method=method, **settings))


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(n, generator=generator), torch.randn(n, 1, 8, 8, generator=generator)


def perturbed(row: dict) -> dict:
    """A row somewhere away from its start, as after training."""
    generator = torch.Generator().manual_seed(7)
    return {name: value + 0.2 * torch.randn(value.shape, generator=generator) for name, value in row.items()}


def base_velocity(adapters: Adapters, t, x):
    return adapters.net(t, x, adapters.mean_embedding().expand(len(x), -1))


@pytest.mark.parametrize("start", ["identity", "equal", "literal"])
@cases
def test_every_method_starts_as_the_base_and_its_neutral_row_is_the_base(method, settings, start):
    adapters, (t, x) = small(method, start=start, **settings), batch(6)
    bound = 1e-6 if adapters.experiment.operation == "mul" else 1e-5  # F - 1 is a small difference
    with torch.no_grad():
        expected = base_velocity(adapters, t, x)
        starts = [adapters.start(cls) for cls in (6, 7, 8)]
        neutral = [adapters.neutral() | ({"label_emb": adapters.mean_embedding()} if adapters.learns_label else {})] * 3
        for rows in (starts, neutral) if start != "literal" or method not in FUNCTIONAL else (neutral,):
            torch.testing.assert_close(adapters.velocity(stack(rows), 3)(t, x), expected, atol=bound, rtol=bound)


def test_the_literal_start_of_the_cosine_is_far_from_the_base():
    adapters, (t, x) = small(start="literal"), batch(4)
    assert (adapters.velocity(stack([adapters.start(7)]), 1)(t, x) - base_velocity(adapters, t, x)).abs().max() > 0.1


@pytest.mark.parametrize(("start", "F"), [("identity", 1.0), ("equal", 1.0), ("literal", PAPERS)])
def test_F_is_one_at_the_start_unless_it_is_the_papers(start, F):
    adapters = small(start=start)
    for layer, numbers in numbers_by_layer(stack([adapters.start(7)])).items():
        matrix = adapters.matrix(layer, numbers)
        assert matrix.shape == (1, *adapters.layers[layer].weight.shape[:2])
        assert torch.allclose(matrix, torch.tensor(F), atol=1e-6)
    with pytest.raises(LabError, match="kml has no F"):
        small("kml").matrix("", {})


@cases
def test_every_learned_number_has_a_gradient_at_once_or_after_its_partner_left_zero(method, settings):
    adapters, (t, x), asleep = small(method, **settings), batch(8), []
    rows = {name: value.requires_grad_() for name, value in stack([adapters.start(6)]).items()}
    optimizer = torch.optim.Adam(rows.values(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        flow_loss(adapters.velocity(rows, 1), x, x.flip(0), t).mean().backward()
        asleep.append({name.rpartition("/")[2] for name, value in rows.items() if not value.grad.all()})
        optimizer.step()
    present = {name.rpartition("/")[2] for name in rows}
    assert asleep[0] == present & (PARTNERS.get(method, set()) | {"A2"})
    assert not asleep[1]
    assert all(parameter.grad is None for parameter in adapters.net.parameters())


@pytest.mark.parametrize(("operation", "added"), [("add", ""), ("mul-add", "G.")])
def test_from_the_papers_start_what_is_added_can_learn_its_ponderations_alone(operation, added):
    """A Kaiming, B zero (Sec. 5.2): A B = 0, so every cosine is 1 and its slope 0, at step 0 and after it."""
    adapters, (t, x) = small(operation=operation, start="kaiming"), batch(8)
    rows = {name: value.requires_grad_() for name, value in stack([adapters.start(6)]).items()}
    optimizer = torch.optim.Adam(rows.values(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        flow_loss(adapters.velocity(rows, 1), x, x.flip(0), t).mean().backward()
        largest = {}
        for name, value in rows.items():
            number = name.rpartition("/")[2]
            largest[number] = max(largest.get(number, 0), value.grad.abs().max().item())
        dead = {added + number for number in ("A", "B", "frequency")}
        assert {number for number, gradient in largest.items() if gradient == 0} == dead
        optimizer.step()
    with torch.no_grad():
        neutral = adapters.velocity(stack([adapters.neutral()]), 1)(t, x)
    torch.testing.assert_close(neutral, base_velocity(adapters, t, x), atol=1e-5, rtol=1e-5)
    with pytest.raises(LabError, match="start=kaiming: accepted is another one with operation=mul"):
        small(start="kaiming")


@cases
def test_classes_side_by_side_compute_what_each_computes_alone(method, settings):
    adapters, (t, x) = small(method, **settings), batch(6)
    rows = [perturbed(adapters.start(cls)) for cls in (6, 7, 8)]
    with torch.no_grad():
        together = adapters.velocity(stack(rows), 3)(t, x)
        for k, row in enumerate(rows):
            alone = adapters.velocity(stack([row]), 1)(t[k::3], x[k::3])
            torch.testing.assert_close(together[k::3], alone, atol=1e-5, rtol=1e-5)
            assert (alone - base_velocity(adapters, t[k::3], x[k::3])).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["funlora", "lora-conv-v1", "scale-shift"])
def test_merged_weights_are_a_plain_network_and_leave_the_base_untouched(method):
    adapters, (t, x) = small(method), batch(4)
    row, before = perturbed(adapters.start(7)), {n: value.clone() for n, value in adapters.net.state_dict().items()}
    velocity = adapters.velocity(stack([row]), 1)(t, x)
    assert (velocity - base_velocity(adapters, t, x)).abs().max() > 1e-3
    if method == "scale-shift":  # which no weights can hold
        with pytest.raises(LabError, match="padding"):
            adapters.merged(row)
    else:
        y = adapters.mean_embedding().expand(4, -1)
        assert torch.allclose(functional_call(adapters.net, adapters.merged(row), (t, x, y)), velocity, atol=1e-6)
    after = adapters.net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_rows_survive_stacking():
    rows = [{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 4.0])}]
    for row, back in zip(rows, unstack(stack(rows), 2), strict=True):
        assert torch.equal(row["a"], back["a"])


def test_learned_label_embedding_starts_at_the_mean_of_task_one_and_is_counted():
    frozen, learned = small(), small(label_embedding="learned")
    assert torch.equal(learned.start(7)["label_emb"], base().label_emb.weight.mean(0))
    assert learned.parameters_per_class == frozen.parameters_per_class + base().embedding


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_ratio_divides_the_entries_of_the_vectors(ratio):
    adapters = small(window="12-22", ratio=ratio)  # layers whose channel counts are multiples of 4
    row = adapters.start(7)
    for name, layer in adapters.layers.items():
        assert row[f"{name}/A"].numel() == layer.out_channels // ratio
        assert row[f"{name}/B"].numel() == layer.in_channels // ratio


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("funlora", "window", "20-99"),
        ("funlora", "ratio", 7),
        ("vanilla-mul", "extra_rank", (3,)),
        ("vanilla-mul", "extra_rank", (99,)),
        ("lora-conv-v1", "lora_v1_window", "20-90"),
        ("lora-conv-v2", "ratio", 2),
        ("funlora", "rank", 2),
        ("vanilla-add", "operation", "add"),
        ("kml", "extra_rank", (14,)),
        ("lora-attention", "lora_attention_rank", 0),
        ("lora-conv-v1", "lora_v1_window", "20-18"),
    ],
)
def test_a_setting_a_method_cannot_take_is_refused_by_name(method, name, value):
    with pytest.raises(LabError) as refusal:
        small(method, **{name: value}).start(7)
    word = value[0] if isinstance(value, tuple) else value
    assert str(refusal.value).startswith(f"{name}={word}: accepted ")


KEYS = [  # settings, the same but for one more, whether the adapter's and the base's keys stay
    ({"method": "lora-attention"}, {"window": "12-20"}, True, True),
    ({"method": "lora-attention"}, {"functions": 7}, True, True),
    ({"method": "lora-attention"}, {"lora_attention_rank": 3}, False, True),
    ({"method": "vanilla-mul"}, {"extra_rank": (14,)}, False, True),
    ({}, {"lora_attention_rank": 3}, True, True),
    ({}, {"window": "12-20"}, False, True),
    ({}, {"adapter_images": 64, "method": "kml"}, False, True),
    ({}, {"solver": "euler", "chunk": 5, "classifier_epochs": 1, "split": "6-4", "lanes": 1}, True, True),
    ({}, {"dropout": 0.1}, False, False),
    ({}, {"base_lr": 0.1}, False, False),
    ({}, {"seed": 1}, False, False),
]


@pytest.mark.parametrize(("given", "more", "same_adapter", "same_base"), KEYS)
def test_an_adapter_is_known_by_the_settings_of_its_method_and_the_base_by_those_of_the_network(
    given, more, same_adapter, same_base, tmp_path
):
    def keys(**settings) -> tuple[str, str]:
        experiment = preset("smoke").but(**settings)
        system = AdaptedBase(Context(experiment, load_once(), tasks(experiment, 10), Store(tmp_path), Runtime()))
        system.key = system.artefact("base", list(range(6)), experiment.base.steps).key
        return system.artefact_of(7).key, system.key

    (adapter, network), (other_adapter, other_network) = keys(**given), keys(**given | more)
    assert (adapter == other_adapter, network == other_network) == (same_adapter, same_base)


@cache
def load_once():
    return load(preset("smoke"))
