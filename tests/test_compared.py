"""The compared adapters have exactly the forms that their docstrings say."""

import pytest
import torch
import torch.nn.functional as F
from test_adapters import batch, perturbed, small

from funlora_lab.adapters import stack
from funlora_lab.adapters.method import broadcast
from funlora_lab.studies.rank import numerical_rank
from funlora_lab.unet import conv_layers


def test_scale_and_shift_act_on_the_input_before_its_zero_padding():
    adapters = small("scale-shift")
    name, layer = next(iter(adapters.layers.items()))
    row = perturbed(adapters.start(6))
    x = torch.randn(2, layer.in_channels, 4, 4)
    moved = row[f"{name}/scale"][:, None, None] * x + row[f"{name}/shift"][:, None, None]
    expected = F.conv2d(moved, layer.weight, layer.bias, padding=1)
    change = {"affine": adapters.affines(stack([row]))[f"{name}.affine"]}
    torch.testing.assert_close(torch.func.functional_call(layer, change, (x,)), expected, atol=1e-5, rtol=1e-5)
    adapters.velocity(stack([row]), 1)(*batch(2))
    assert all(layer.affine is None for layer in conv_layers(adapters.net).values())  # nothing is left behind


@pytest.mark.parametrize(("method", "rank", "bottleneck"), [("lora-conv-v1", 1, 3), ("lora-conv-v2", 2, 2)])
def test_the_bottleneck_of_v1_is_r_k_and_that_of_v2_is_r(method, rank, bottleneck):
    adapters = small(method, rank=rank)
    name, layer = next(iter(adapters.layers.items()))
    O, I, k, _ = layer.weight.shape
    added = adapters.merged(perturbed(adapters.start(6)))[name + ".weight"] - layer.weight
    assert k == 3
    assert numerical_rank(added.reshape(O * k, I * k), 1e-5).item() == bottleneck


def test_kernel_modulation_is_an_outer_product_of_output_channels_and_all_inputs():
    adapters = small("kml")
    row = perturbed(adapters.start(6))
    merged = adapters.merged(row)
    for name, layer in adapters.layers.items():
        modulation = (merged[name + ".weight"].double() / layer.weight - 1).flatten(1)
        assert numerical_rank(modulation, 1e-3).item() == 1
        assert row[name + "/u"].shape == modulation.shape[1:]


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
            assert method == "vanilla-add" or two.bound(name) == numerical_rank(matrix, 1e-3).item()


def test_broadcast_acts_alike_on_every_kernel_position():
    W, matrix = torch.randn(4, 3, 2, 2), torch.randn(5, 4, 3)
    assert (W * broadcast(matrix, W))[2, 1, 0, 1, 0] == W[1, 0, 1, 0] * matrix[2, 1, 0]


def test_gan_memory_starts_at_the_network_to_the_bit_and_every_number_has_a_gradient():
    adapters = small("gan-memory", window="11-24")
    row = {name: value.requires_grad_() for name, value in adapters.start(6).items()}
    assert all(torch.equal(adapters.merged(row)[f"{name}.weight"], one.weight) for name, one in adapters.layers.items())
    assert all(layer.weight.shape[2] == 3 for layer in adapters.layers.values())
    windowed = list(conv_layers(adapters.net).values())[11:25]
    assert len(adapters.layers) == sum(layer.weight.shape[2] == 3 for layer in windowed) < 14
    adapters.velocity(stack([row]), 1)(*batch(4)).square().sum().backward()
    assert all((value.grad != 0).all() for value in row.values())


def test_gan_memory_is_its_published_formula():
    adapters = small("gan-memory")
    row = perturbed(adapters.start(6))
    for name, layer in adapters.layers.items():
        gamma, beta = (row[f"{name}/{key}"][:, :, None, None] for key in ("gamma", "beta"))
        std, mean = layer.weight.std((2, 3), keepdim=True), layer.weight.mean((2, 3), keepdim=True)
        expected = gamma * (layer.weight - mean) / std + beta
        torch.testing.assert_close(adapters.merged(row)[f"{name}.weight"], expected, atol=1e-5, rtol=1e-4)
