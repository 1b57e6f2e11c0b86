"""The backbone is the paper's to the digit, and every way of running it computes the same function."""

import warnings

import pytest
import torch

from funlora_lab import speed
from funlora_lab.adapters import Adapters, stack
from funlora_lab.contenders import PerImage, torchcfm_unet
from funlora_lab.functions import scaled
from funlora_lab.network import build_unet
from funlora_lab.presets import PRESETS, preset
from funlora_lab.unet import conv_layers

CPU = torch.device("cpu")
# sums of Cin + Cout over windows of the CIFAR network (Table I)
WINDOWS = {
    "0-64": 34_054,
    "5-54": 29_440,
    "15-44": 18_432,
    "15-54": 24_832,
    "25-44": 13_312,
    "25-54": 19_712,
    "35-54": 13_056,
    "40-54": 9_728,
    "45-54": 6_400,
    "40-49": 6_656,
    "45-49": 3_328,
}


def on_meta(name):
    with torch.device("meta"):
        return build_unet(preset(name), 1)


def awake(net):
    """The network with its zero-initialised layers filled, so that every layer matters for the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return net.eval()


def batch(experiment, B, classes=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, experiment.channels, experiment.image_size, experiment.image_size, generator=generator)
    return torch.rand(B, generator=generator), x, torch.arange(B) % classes


@pytest.mark.parametrize(
    ("name", "layers", "parameters"), [("cifar10", 65, 35_746_307), ("imagenet100", 67, 89_535_619)]
)
def test_layers_and_parameters_are_the_papers(name, layers, parameters):
    net = on_meta(name)
    assert len(conv_layers(net)) == layers
    total = sum(value.numel() for value in net.parameters())
    assert total - net.label_emb.weight.numel() == parameters
    assert net.label_emb.weight.shape[1] == 512


def test_layer_order_gives_the_sums_of_table_1():
    sums = [sum(layer.weight.shape[:2]) for layer in conv_layers(on_meta("cifar10")).values()]
    for window, expected in WINDOWS.items():
        first, last = map(int, window.split("-"))
        assert sum(sums[first : last + 1]) == expected, window
    imagenet = [sum(layer.weight.shape[:2]) for layer in conv_layers(on_meta("imagenet100")).values()]
    assert sum(imagenet[40:57]) == 13_312


@pytest.mark.parametrize("name", ["cifar10", "imagenet100"])
def test_torchcfm_state_loads_and_computes_the_same(name):
    pytest.importorskip("torchcfm")
    theirs = awake(torchcfm_unet(preset(name), 2, CPU))
    ours = build_unet(preset(name), 2).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    t, x, y = batch(preset(name), 1)
    with torch.no_grad():
        expected = theirs(t, x, y)
        torch.testing.assert_close(ours(t, x, y), expected, atol=1e-5, rtol=1e-5)
    assert expected.abs().max() > 1e-3


def test_classes_side_by_side_equal_each_alone_and_kernels_of_its_own_for_every_image():
    e = PRESETS["smoke"].but(adapter_batch=4)
    net = awake(build_unet(e, 2)).requires_grad_(False)
    adapters = Adapters(net, e)
    torch.manual_seed(0)
    rows = [{k: v + 0.1 * torch.randn_like(v) for k, v in adapters.start(cls).items()} for cls in (2, 3)]
    t, x, _ = batch(e, 8)
    together = adapters.velocity(stack(rows), 2)(t, x)
    torch.testing.assert_close(PerImage(net, e).velocity(stack(rows), 2)(t, x), together, atol=1e-5, rtol=1e-5)
    for k, row in enumerate(rows):
        alone = adapters.velocity(stack([row]), 1)(t[k::2], x[k::2])
        torch.testing.assert_close(alone, together[k::2], atol=1e-5, rtol=1e-5)


def test_no_graph_before_the_first_adapted_layer_and_none_for_frozen_weights():
    e = PRESETS["smoke"]
    net = awake(build_unet(e, 2)).requires_grad_(False)
    adapters = Adapters(net, e)
    seen = {}
    for name, layer in conv_layers(net).items():
        layer.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: inputs[0].requires_grad}))
    rows = {k: v.requires_grad_() for k, v in stack([adapters.start(2), adapters.start(3)]).items()}
    t, x, _ = batch(e, 4)
    adapters.velocity(rows, 2)(t, x).square().mean().backward()
    first = next(iter(adapters.layers))
    before = list(conv_layers(net))[: list(conv_layers(net)).index(first)]
    assert before
    assert not any(seen[name] for name in [*before, first])
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(value.grad is not None for value in rows.values())


def test_scaled_weights_are_rounded_once_under_autocast():
    torch.manual_seed(0)
    W0, F = torch.randn(4, 3, 3, 3), torch.randn(2, 4, 3, requires_grad=True)
    exact = W0 * F[..., None, None]
    with torch.autocast("cpu", torch.bfloat16):
        weights = scaled(W0, F)
    assert torch.equal(weights, exact.bfloat16())
    (got,) = torch.autograd.grad(weights.float().sum(), F)
    torch.testing.assert_close(got, W0.sum((2, 3)).expand(2, -1, -1))
    torch.testing.assert_close(scaled(W0, F), exact)
    assert torch.autograd.gradcheck(lambda F: scaled(W0.double(), F), F.detach().double().requires_grad_())


def test_bf16_is_close_to_fp32():
    e = PRESETS["smoke"]
    net = awake(build_unet(e, 2))
    t, x, y = batch(e, 4)
    with torch.no_grad():
        exact = net(t, x, y)
        with torch.autocast("cpu", torch.bfloat16):
            rough = net(t, x, y)
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).square().mean() < 1e-3 * exact.square().mean()


def test_bf16_computes_in_fp32_where_the_processor_has_no_instructions_for_it_and_says_so(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    speed._say_that_bf16_is_missing.cache_clear()
    e = PRESETS["smoke"]
    net = awake(build_unet(e, 2))
    expected = net(*batch(e, 4))
    with pytest.warns(UserWarning, match="precision=bf16 computes in fp32"):
        assert speed.arithmetic("bf16", CPU) == "fp32"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it says so once
        with speed.autocast("bf16", CPU):
            assert torch.equal(net(*batch(e, 4)), expected)
    assert speed.arithmetic("bf16", torch.device("cuda")) == "bf16"


def test_what_cannot_be_compiled_runs_uncompiled_and_says_why(monkeypatch):
    def broken(function, **settings):
        def call(*args):
            raise RuntimeError("no compiler here\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    e = PRESETS["smoke"]
    net = awake(build_unet(e, 2))
    expected = net(*batch(e, 4))
    speed.prepared(net, CPU, "on")
    with pytest.warns(UserWarning, match="because compiling failed: no compiler here$"):
        assert torch.equal(net(*batch(e, 4)), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it says so once
        assert torch.equal(net(*batch(e, 4)), expected)


def test_compile_takes_four_words():
    with pytest.raises(speed.LabError, match="compile=always: accepted is one of auto, off, on, graphs"):
        speed.prepared(torch.nn.Linear(1, 1), CPU, "always")
