"""The compared adapters: identity at the start, live gradients, exact forms, one class like many."""

import pytest
import torch
import torch.nn.functional as F

from funlora_lab import data
from funlora_lab.adapters import METHODS, Adapters, stack
from funlora_lab.errors import LabError
from funlora_lab.frozen import FrozenBase
from funlora_lab.methods import broadcast
from funlora_lab.metrics import numerical_rank
from funlora_lab.network import UNET_FIELDS, build_unet
from funlora_lab.presets import PRESETS
from funlora_lab.store import Store
from funlora_lab.training import Runtime
from funlora_lab.unet import conv_layers
from funlora_lab.work import Work

RANKED = {
    "vanilla-mul": {"extra_rank": (14, 16)},
    "vanilla-add": {"extra_rank": (14, 16)},
    "lora-conv-v1": {"rank": 2},
    "lora-conv-v2": {"rank": 2},
}
CASES = [(name, {}) for name in METHODS if name != "label-embedding"] + list(RANKED.items())
# what waits for one step: the factors whose partner is zero, and power's exponents, since log(1) = 0
PARTNERS = {
    "vanilla-add": {"A"},
    "lora-attention": {"A"},
    "lora-conv-v1": {"A"},
    "lora-conv-v2": {"A"},
    "kml": {"v"},
    "power": {"exponent"},
}
cases = pytest.mark.parametrize(("method", "settings"), CASES)


def small(method: str, **settings) -> Adapters:
    """A method over a small network none of whose weights is zero, as after training."""
    experiment = PRESETS["smoke"].but(method=method, **settings)
    net = build_unet(experiment, 6)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return Adapters(net.eval().requires_grad_(False), experiment)


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(n, generator=generator), torch.randn(n, 1, 8, 8, generator=generator)


def perturbed(rows: dict) -> dict:
    """Rows somewhere away from their start, as after training."""
    generator = torch.Generator().manual_seed(7)
    return {name: value + 0.2 * torch.randn(value.shape, generator=generator) for name, value in rows.items()}


@cases
def test_every_method_starts_as_the_base_and_its_neutral_row_is_the_base(method, settings):
    adapters = small(method, **settings)
    t, x = batch(6)
    with torch.no_grad():
        base = adapters.net(t, x, adapters.mean_embedding().expand(6, -1))
        for rows in ([adapters.start(cls) for cls in (6, 7, 8)], [adapters.neutral()] * 3):
            torch.testing.assert_close(adapters.velocity(stack(rows), 3)(t, x), base, atol=1e-6, rtol=1e-6)


@cases
def test_every_learned_number_has_a_gradient_at_once_or_after_its_partner_left_zero(method, settings):
    adapters = small(method, **settings)
    rows = {name: value.requires_grad_() for name, value in stack([adapters.start(6)]).items()}
    optimizer = torch.optim.Adam(rows.values(), lr=1e-2)
    t, x = batch(8)
    asleep = []
    for _ in range(2):
        optimizer.zero_grad()
        (adapters.velocity(rows, 1)(t, x) - x).square().mean().backward()
        asleep.append({name for name, value in rows.items() if not value.grad.any()})
        optimizer.step()
    expected = PARTNERS.get(method, set()) | ({"A2"} if "extra_rank" in settings else set())
    assert {name.rpartition("/")[2] for name in asleep[0]} == expected
    assert not asleep[1]


@cases
def test_classes_side_by_side_compute_what_each_computes_alone(method, settings):
    adapters = small(method, **settings)
    rows = [perturbed(adapters.start(cls)) for cls in (6, 7, 8)]
    t, x = batch(6)
    with torch.no_grad():
        together = adapters.velocity(stack(rows), 3)(t, x)
        for k, row in enumerate(rows):
            alone = adapters.velocity(stack([row]), 1)(t[k::3], x[k::3])
            torch.testing.assert_close(together[k::3], alone, atol=1e-5, rtol=1e-5)
            assert (alone - adapters.net(t[k::3], x[k::3], adapters.mean_embedding().expand(2, -1))).abs().max() > 1e-3


def test_scale_and_shift_act_on_the_input_before_its_zero_padding():
    adapters = small("scale-shift")
    name, layer = next(iter(adapters.layers.items()))
    row = perturbed(adapters.start(6))
    changes = adapters.affines(stack([row]))
    x = torch.randn(2, layer.in_channels, 4, 4)
    moved = row[f"{name}/scale"][:, None, None] * x + row[f"{name}/shift"][:, None, None]
    expected = F.conv2d(moved, layer.weight, layer.bias, padding=1)
    own = {key.removeprefix(name + "."): value for key, value in changes.items() if key.startswith(name + ".")}
    torch.testing.assert_close(torch.func.functional_call(layer, own, (x,)), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(LabError, match="padding"):
        adapters.merged(row)


def test_scale_and_shift_leave_nothing_behind_in_the_network():
    adapters = small("scale-shift")
    before = {name: value.clone() for name, value in adapters.net.state_dict().items()}
    adapters.velocity(stack([perturbed(adapters.start(6))]), 1)(*batch(2))
    after = adapters.net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(layer.affine is None for layer in conv_layers(adapters.net).values())


@pytest.mark.parametrize(("method", "rank", "bottleneck"), [("lora-conv-v1", 1, 3), ("lora-conv-v2", 2, 2)])
def test_the_bottleneck_of_v1_is_r_k_and_that_of_v2_is_r(method, rank, bottleneck):
    adapters = small(method, rank=rank)
    added = adapters.merged(perturbed(adapters.start(6)))
    name, layer = next(iter(adapters.layers.items()))
    O, I, k, _ = layer.weight.shape
    assert k == 3
    difference = (added[name + ".weight"] - layer.weight).reshape(O * k, I * k)
    assert numerical_rank(difference, 1e-5).item() == bottleneck


def test_kernel_modulation_is_an_outer_product_of_output_channels_and_all_inputs():
    adapters = small("kml")
    merged = adapters.merged(perturbed(adapters.start(6)))
    for name, layer in adapters.layers.items():
        modulation = (merged[name + ".weight"].double() / layer.weight - 1).flatten(1)
        assert numerical_rank(modulation, 1e-3).item() == 1
        assert adapters.method.start(layer, adapters.experiment, torch.Generator())["u"].shape == modulation.shape[1:]


@pytest.mark.parametrize("method", ["vanilla-mul", "vanilla-add"])
def test_extra_rank_gives_the_named_layers_one_rank_more_and_counts_it(method):
    one, two = small(method), small(method, extra_rank=(14, 16))
    layers = conv_layers(one.net)
    more = sum(sum(layer.weight.shape[:2]) for i, layer in enumerate(layers.values()) if i in (14, 16))
    assert two.parameters_per_class == one.parameters_per_class + more
    merged = two.merged(perturbed(two.start(6)))
    for i, (name, layer) in enumerate(layers.items()):
        if name in two.layers:
            W, start = merged[name + ".weight"].double(), layer.weight.double()
            matrix = (W / start if method == "vanilla-mul" else W - start)[..., 0, 0]
            assert numerical_rank(matrix, 1e-3).item() == (2 if i in (14, 16) else 1)


def test_broadcast_acts_alike_on_every_kernel_position():
    W = torch.randn(4, 3, 2, 2)
    matrix = torch.randn(5, 4, 3)
    assert (W * broadcast(matrix, W))[2, 1, 0, 1, 0] == W[1, 0, 1, 0] * matrix[2, 1, 0]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"method": "vanilla-mul", "extra_rank": (3,)}, "extra_rank=3"),
        ({"method": "vanilla-mul", "extra_rank": (99,)}, "extra_rank=99"),
        ({"method": "lora-conv-v1", "lora_v1_window": "20-90"}, "lora_v1_window=20-90"),
        ({"method": "lora-conv-v2", "ratio": 2}, "ratio=2"),
        ({"method": "funlora", "rank": 2}, "rank=2"),
        ({"method": "kml", "extra_rank": (14,)}, "extra_rank=14"),
        ({"method": "lora-attention", "lora_attention_rank": 0}, "lora_attention_rank=0"),
        ({"method": "lora-conv-v1", "lora_v1_window": "20-18"}, "lora_v1_window=20-18"),
    ],
)
def test_a_setting_a_method_cannot_take_is_refused_by_name(settings, field):
    with pytest.raises(LabError) as refusal:
        Adapters(build_unet(PRESETS["smoke"], 6), PRESETS["smoke"].but(**settings))
    assert str(refusal.value).startswith(field + ": accepted ")


def test_an_adapter_is_known_by_the_settings_of_its_method_alone(tmp_path):
    def key(**settings) -> str:
        experiment = PRESETS["smoke"].but(**settings)
        dataset = data.load(experiment)
        work = Work(experiment, dataset, data.tasks(experiment, 10), Store(tmp_path), Runtime())
        return FrozenBase(work).stage(7).key

    attention = {"method": "lora-attention"}
    assert key(**attention) == key(**attention, window="12-20") == key(**attention, functions=7)
    assert key(**attention) != key(**attention, lora_attention_rank=3)
    assert key(method="vanilla-mul") != key(method="vanilla-mul", extra_rank=(14,))
    assert key(method="funlora") == key(method="funlora", lora_attention_rank=3)
    assert key(method="funlora") != key(method="funlora", window="12-20")


def test_the_base_is_known_by_the_settings_of_the_network_alone():
    assert set(PRESETS["smoke"].select(*UNET_FIELDS)) == set(UNET_FIELDS)
