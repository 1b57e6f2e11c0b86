"""Rows over a frozen network: identity at the start, live gradients, merging, K classes side by side."""

import pytest
import torch
from torch.func import functional_call

from funlora_lab.adapters import Adapters, functional_matrix, stack, unstack
from funlora_lab.config import FUNCTIONAL_METHODS
from funlora_lab.errors import LabError
from funlora_lab.flow import flow_loss
from funlora_lab.network import build_unet
from funlora_lab.presets import preset

EXACT = [(method, operation) for method in FUNCTIONAL_METHODS for operation in ("mul", "add", "mul-add")]


@pytest.fixture(scope="module")
def net():
    """A network whose every layer does something (ADM's zero-initialised convolutions are filled)."""
    net = build_unet(preset("smoke"), 6).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        if not parameter.any():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net


def batch(n: int, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    x1, x0 = (torch.randn(n, 1, 8, 8, generator=generator) for _ in range(2))
    return x1, x0, torch.rand(n, generator=generator)


def adapters(net, **changes) -> Adapters:
    return Adapters(net, preset("smoke").but(**changes))


def moved(row, scale=0.3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return {name: value + scale * torch.randn(value.shape, generator=generator) for name, value in row.items()}


def base_velocity(made: Adapters, t, x):
    return made.net(t, x, made.mean_embedding().expand(len(x), -1))


@pytest.mark.parametrize(("method", "operation"), EXACT)
@pytest.mark.parametrize("start", ["identity", "equal"])
def test_every_function_starts_at_the_base(net, method, operation, start):
    made = adapters(net, method=method, operation=operation, start=start)
    x1, _, t = batch(4)
    velocity = made.velocity(stack([made.start(7)]), 1)
    assert torch.allclose(velocity(t, x1), base_velocity(made, t, x1), atol=1e-4)


@pytest.mark.parametrize(("method", "operation"), [*EXACT, ("vanilla-add", "mul")])
@pytest.mark.parametrize("start", ["identity", "literal"])
def test_neutral_row_leaves_the_network_as_it_is(net, method, operation, start):
    made = adapters(net, method=method, operation=operation, start=start)
    x1, _, t = batch(4)
    velocity = made.velocity(stack([made.neutral()]), 1)
    assert torch.allclose(velocity(t, x1), base_velocity(made, t, x1), atol=1e-4)


def test_functional_matrix_is_one_at_the_identity_start(net):
    made = adapters(net, method="funlora")
    for name in made.layers:
        row = {key.split("/")[1]: value for key, value in made.start(7).items() if key.startswith(name + "/")}
        assert torch.allclose(functional_matrix(made.experiment, row), torch.tensor(1.0), atol=1e-6)


@pytest.mark.parametrize("method", FUNCTIONAL_METHODS)
def test_every_learned_number_has_a_gradient_at_the_first_step(net, method):
    made = adapters(net, method=method)
    rows = {name: value.requires_grad_() for name, value in stack([made.start(7)]).items()}
    x1, x0, t = batch(8)
    flow_loss(made.velocity(rows, 1), x1, x0, t).mean().backward()
    dead = [name for name, value in rows.items() if not value.grad.all()]
    # the learned exponents of |AB|^v start at |AB| = 1, where their gradient log|AB| is zero
    allowed = [name for name in rows if name.endswith("exponent")] if method == "power" else []
    assert dead == allowed


def test_literal_start_of_the_cosine_is_far_from_the_base(net):
    made = adapters(net, method="funlora", start="literal")
    x1, _, t = batch(4)
    velocity = made.velocity(stack([made.start(7)]), 1)
    assert (velocity(t, x1) - base_velocity(made, t, x1)).abs().max() > 0.1


@pytest.mark.parametrize(("method", "operation"), [*EXACT, ("vanilla-add", "mul"), ("label-embedding", "mul")])
def test_classes_side_by_side_equal_each_class_alone(net, method, operation):
    made = adapters(net, method=method, operation=operation)
    rows = [moved(made.start(cls), seed=cls) for cls in (6, 7, 8)]
    x1, _, t = batch(12)
    together = made.velocity(stack(rows), 3)(t, x1)
    for k, row in enumerate(rows):
        alone = made.velocity(stack([row]), 1)(t[k::3], x1[k::3])
        assert torch.allclose(together[k::3], alone, atol=1e-4)


def test_merged_weights_are_a_plain_network_and_leave_the_base_untouched(net):
    made = adapters(net)
    row = moved(made.start(7))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x1, _, t = batch(4)
    y = made.mean_embedding().expand(4, -1)
    merged = functional_call(net, made.merged(row), (t, x1, y))
    assert torch.allclose(merged, made.velocity(stack([row]), 1)(t, x1), atol=1e-6)
    assert (merged - base_velocity(made, t, x1)).abs().max() > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_rows_survive_stacking():
    rows = [{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 4.0])}]
    for row, back in zip(rows, unstack(stack(rows), 2), strict=True):
        assert torch.equal(row["a"], back["a"])


def test_learned_label_embedding_starts_at_the_mean_of_task_one_and_is_counted(net):
    frozen, learned = adapters(net), adapters(net, label_embedding="learned")
    assert torch.equal(learned.start(7)["label_emb"], net.label_emb.weight.mean(0))
    assert learned.parameters_per_class == frozen.parameters_per_class + net.embedding


@pytest.mark.parametrize(("ratio", "divisor"), [(1, 1), (2, 2), (4, 4)])
def test_ratio_divides_the_entries_of_the_vectors(net, ratio, divisor):
    made = adapters(net, window="12-22", ratio=ratio)  # layers whose channel counts are multiples of 4
    row = made.start(7)
    for name, layer in made.layers.items():
        assert row[f"{name}/A"].numel() == layer.out_channels // divisor
        assert row[f"{name}/B"].numel() == layer.in_channels // divisor


@pytest.mark.parametrize(("changes", "words"), [({"window": "20-99"}, "0-24"), ({"ratio": 7}, "divisor")])
def test_settings_that_do_not_fit_the_network_are_refused(net, changes, words):
    with pytest.raises(LabError, match=words):
        adapters(net, **changes).start(7)


def test_no_gradient_reaches_the_frozen_network(net):
    made = adapters(net)
    rows = {name: value.requires_grad_() for name, value in stack([made.start(7)]).items()}
    x1, x0, t = batch(4)
    flow_loss(made.velocity(rows, 1), x1, x0, t).mean().backward()
    assert all(parameter.grad is None for parameter in net.parameters())
