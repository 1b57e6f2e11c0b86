"""The U-Net is the paper's to the digit, each layer computes what its namesake does, and every way to run it agrees."""

import contextlib
import math
import os
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from funlora_lab.adapters import Adapters, stack
from funlora_lab.adapters.functions import scaled
from funlora_lab.errors import LabError
from funlora_lab.presets import preset
from funlora_lab.systems import build_unet
from funlora_lab.training import device
from funlora_lab.unet import UNet, conv_layers, part_of
from funlora_lab.unet.layers import FORMS, DoublingConv2d, Projection, form_for

CPU = torch.device("cpu")
KEYWORDS = "image_size channels base_channels multipliers res_blocks attention head_channels norm_groups dropout"
SMALL = dict(zip(KEYWORDS.split(), (16, 3, 32, (1, 2), 1, (8,), 32, 16, 0.0), strict=True))
PARTS = ["encoder", "middle", "decoder", "output"]
# windows of the CIFAR network and the sums of their Cin + Cout (Table I)
WINDOWS = "0-64 5-54 15-44 15-54 25-44 25-54 35-54 40-54 45-54 40-49 45-49"
SUMS = "34054 29440 18432 24832 13312 19712 13056 9728 6400 6656 3328"


def settings_of(name):
    """The keywords of a preset's U-Net, but for the number of classes."""
    return {key: preset(name).flat[key] for key in SMALL}


def on_meta(name):
    with torch.device("meta"):
        return UNet(classes=1, **settings_of(name))


def smoke_net(**changes):
    """(smoke experiment, its network of two classes with no layer at zero)."""
    e = preset("smoke").but(**changes)
    return e, awake(build_unet(e, 2))


def awake(net):
    """The network with its zero-initialised layers filled, so that every layer matters for the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return net.eval()


def batch(settings, B):
    """t (B,), x (B, C, H, W) and labels 0, 1, 0, 1, ... of images for a network of these keywords."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, settings["channels"], *[settings["image_size"]] * 2, generator=generator)
    return torch.rand(B, generator=generator), x, torch.arange(B) % 2


def torchcfm_unet(settings):
    """torchcfm's ``UNetModel`` of two classes by the keywords of ours, no layer at zero."""
    s = settings
    net = pytest.importorskip("torchcfm.models.unet.unet").UNetModel(
        image_size=s["image_size"],
        in_channels=s["channels"],
        model_channels=s["base_channels"],
        out_channels=s["channels"],
        num_res_blocks=s["res_blocks"],
        attention_resolutions=tuple(s["image_size"] // size for size in s["attention"]),
        dropout=s["dropout"],
        channel_mult=s["multipliers"],
        num_classes=2,
        num_head_channels=min(s["head_channels"], s["base_channels"]),
    )
    for module in net.modules():
        if isinstance(module, nn.GroupNorm):  # it always has 32 groups
            module.num_groups = math.gcd(s["norm_groups"], module.num_channels)
    return awake(net)


def assert_same_function(ours, theirs, settings):
    inputs = batch(settings, 1)
    with torch.no_grad():
        expected = theirs(*inputs)
        torch.testing.assert_close(ours.eval()(*inputs), expected, atol=1e-5, rtol=1e-5)
    assert expected.abs().max() > 1e-3


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
    for window, expected in zip(WINDOWS.split(), SUMS.split(), strict=True):
        first, last = map(int, window.split("-"))
        assert sum(sums[first : last + 1]) == int(expected), window
    imagenet = [sum(layer.weight.shape[:2]) for layer in conv_layers(on_meta("imagenet100")).values()]
    assert sum(imagenet[40:57]) == 13_312


@pytest.mark.parametrize("name", ["cifar10", "imagenet100"])
def test_torchcfm_computes_the_same_at_the_papers_sizes(name):
    settings = settings_of(name)
    theirs, ours = torchcfm_unet(settings), UNet(classes=2, **settings)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_function(ours, theirs, settings)


def test_parts_follow_the_order_of_the_layers_and_meet_in_encode_and_decode():
    net = awake(UNet(classes=2, **SMALL))
    parts = [part_of(name) for name in conv_layers(net)]
    assert parts == sorted(parts, key=PARTS.index)
    assert set(parts) == set(PARTS)
    t, x, y = batch(SMALL, 2)
    embedding, skips, h = net.encode(t, x, y)
    assert embedding.shape == (2, 128)
    assert [len(skips), *h.shape] == [len(net.input_blocks), 2, 64, 8, 8]
    assert torch.equal(net.decode(embedding, skips, h), net(t, x, y))
    assert torch.equal(net(t, x, net.label_emb(y)), net(t, x, y))


def test_heads_that_do_not_divide_the_channels_end_in_a_sentence():
    with pytest.raises(LabError, match=r"^head_channels=7: accepted is a divisor of .*\.$"):
        UNet(classes=1, **SMALL | {"head_channels": 7})


def test_classes_side_by_side_equal_each_alone_and_kernels_of_its_own_for_every_image():
    e, net = smoke_net(adapter_batch=4)
    adapters = Adapters(net.requires_grad_(False), e)
    torch.manual_seed(0)
    rows = [{k: v + 0.1 * torch.randn_like(v) for k, v in adapters.start(cls).items()} for cls in (2, 3)]
    t, x, _ = batch(e.flat, 8)
    together = adapters.velocity(stack(rows), 2)(t, x)
    torch.testing.assert_close(adapters.velocity(stack(rows * 4), 8)(t, x), together, atol=1e-5, rtol=1e-5)
    for k, row in enumerate(rows):
        alone = adapters.velocity(stack([row]), 1)(t[k::2], x[k::2])
        torch.testing.assert_close(alone, together[k::2], atol=1e-5, rtol=1e-5)


def test_no_graph_before_the_first_adapted_layer_and_none_for_frozen_weights():
    e, net = smoke_net()
    adapters = Adapters(net.requires_grad_(False), e)
    seen = {}
    for name, layer in conv_layers(net).items():
        layer.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: inputs[0].requires_grad}))
    rows = {k: v.requires_grad_() for k, v in stack([adapters.start(2), adapters.start(3)]).items()}
    t, x, _ = batch(e.flat, 4)
    adapters.velocity(rows, 2)(t, x).square().mean().backward()
    first = next(iter(adapters.layers))
    before = list(conv_layers(net))[: list(conv_layers(net)).index(first)]
    assert before
    assert not any(seen[name] for name in [*before, first])
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(value.grad is not None for value in rows.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("k", "stride"), [(3, 1), (1, 1), (3, 2)])
def test_forms_of_the_per_class_convolution_agree(form, k, stride):
    torch.manual_seed(0)
    K, N = 3, 4
    x, weight = torch.randn(N * K, 6, 8, 8, requires_grad=True), torch.randn(K, 5, 6, k, k, requires_grad=True)
    bias = torch.randn(5)
    y = FORMS[form](x, weight, bias, stride, k // 2)
    images = x.split(1)  # each with its class's kernel
    expected = torch.cat([F.conv2d(image, weight[i % K], bias, stride, k // 2) for i, image in enumerate(images)])
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(out.square().sum(), (x, weight)) for out in (y, expected)]
    torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("size", [3, 8])  # the plain way, and as a transposed convolution
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_doubling_convolution_equals_a_convolution_of_the_doubled_image(size, dtype):
    torch.manual_seed(0)
    layer, x = DoublingConv2d(5, 4, 3, padding=1).double(), torch.randn(6, 5, size, size + 1, dtype=torch.float64)
    kernels = torch.randn(3, 4, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    affine = torch.rand(3, 2, 5, dtype=torch.float64)
    scale, shift = (each.repeat(2, 1)[..., None, None] for each in affine.unbind(1))
    large, moved = (F.interpolate(image, scale_factor=2, mode="nearest") for image in (x, scale * x + shift))
    one = F.conv2d(large, layer.weight, layer.bias, padding=1)
    many = torch.cat([F.conv2d(moved[i : i + 1], kernels[i % 3], layer.bias, padding=1) for i in range(6)])
    close = {"atol": 1e-10, "rtol": 0} if dtype == torch.float64 else {"atol": 0.1, "rtol": 0.02}
    grads = torch.autograd.grad(one.square().sum() + many.square().sum(), (layer.weight, layer.bias, kernels))

    layer.to(dtype)
    low = kernels.detach().to(dtype).requires_grad_()
    mine = layer(x.to(dtype))
    ours = functional_call(layer, {"weight": low, "affine": affine.to(dtype)}, x.to(dtype))
    torch.testing.assert_close(mine.double(), one, **close)
    torch.testing.assert_close(ours.double(), many, **close)
    if dtype == torch.float64:
        got = torch.autograd.grad(mine.square().sum() + ours.square().sum(), (layer.weight, layer.bias, low))
        torch.testing.assert_close(got, grads, atol=1e-8, rtol=0)


def test_doubling_convolution_sums_the_kernel_in_fp32_under_autocast():
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bf16 instructions: bf16 is never used on it")
    torch.manual_seed(0)
    layer, x = DoublingConv2d(64, 8, 3, padding=1), torch.randn(2, 64, 8, 8)
    large = F.interpolate(x, scale_factor=2, mode="nearest")
    exact = F.conv2d(large, layer.weight, layer.bias, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.conv2d(large, layer.weight, layer.bias, padding=1)
        ours = layer(x)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).square().mean() < 1.2 * (plain - exact).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_projection_equals_a_convolution_of_width_1_for_one_class_and_for_several(dtype):
    torch.manual_seed(0)
    layer, x, weight = Projection(6, 5, 1).to(dtype), torch.randn(8, 6, 8, 9).to(dtype), torch.randn(2, 5, 6, 1)
    y, ys = layer(x), functional_call(layer, {"weight": weight.to(dtype)}, x)
    close = {"atol": 1e-5, "rtol": 0} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    for mine, images, kernel in ((y, x, layer.weight), (ys[::2], x[::2], weight[0]), (ys[1::2], x[1::2], weight[1])):
        expected = F.conv1d(images.flatten(2).float(), kernel.to(dtype).float(), layer.bias.float())
        torch.testing.assert_close(mine.flatten(2).float(), expected, **close)


def test_bf16_is_close_to_fp32():
    net, inputs = awake(UNet(classes=2, **SMALL)), batch(SMALL, 4)
    with torch.no_grad():
        exact = net(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            rough = net(*inputs)
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).square().mean() < 1e-3 * exact.square().mean()


def test_bf16_computes_in_fp32_where_the_processor_has_no_instructions_for_it_and_says_so_once(monkeypatch):
    anew = cache(device.arithmetic.__wrapped__)  # as in a process that has not said it yet
    monkeypatch.setattr(device, "arithmetic", anew)
    monkeypatch.setattr(device, "has_bf16", lambda device_type: device_type != "cpu")
    net, inputs = awake(UNet(classes=2, **SMALL)), batch(SMALL, 4)
    expected = net(*inputs)
    with pytest.warns(UserWarning, match="precision=bf16 computes in fp32"):
        assert device.arithmetic("bf16", CPU) == "fp32"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with device.autocast("bf16", CPU):
            assert torch.equal(net(*inputs), expected)
    assert device.arithmetic("bf16", torch.device("cuda")) == "bf16"


def test_weights_rounded_at_once_give_the_bits_of_autocast(monkeypatch):
    """As on a GPU: every weight of a convolution or product is cast once a step, its gradient back, all together."""
    monkeypatch.setattr(device, "has_bf16", lambda device_type: True)
    small = SMALL | {"image_size": 8}  # doubled as on a GPU
    net, (t, x, y) = awake(UNet(classes=2, **small)), batch(small, 4)
    assert not device.rounded(net, "bf16", CPU)
    gpu, found = torch.device("cuda"), []
    assert not device.rounded(net, "fp32", gpu)
    for weights in ({}, device.rounded(net, "bf16", gpu)):
        with torch.autocast("cpu", torch.bfloat16):
            v = functional_call(net, weights, (t, x, y))
        found.append([v, *torch.autograd.grad(v.float().square().sum(), list(net.parameters()))])
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_block_of_computing_on_a_gpu_is_deterministic_without_cudnn_s_attention_and_exact_without_tf32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda gpu: contextlib.nullcontext())
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def switches():
        attention = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
        return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32, *attention

    before, gpu = switches(), torch.device("cuda")
    for without, exact, expected in (("", False, True), ("determinism", False, False), ("determinism", True, True)):
        monkeypatch.setenv("FUNLORA_WITHOUT", without)
        with device.computing(gpu, exact):
            assert switches() == (expected, not exact, False, False)
        assert switches() == before
    assert before[1:] == (True, True, True), "what PyTorch does by itself"


def test_classes_side_by_side_on_a_gpu_are_unfolded_only_where_they_are_small():
    """Eight classes of 64 images of CIFAR10, unfolded, did not fit 80 GB: k k times every adapted layer's images."""
    forms = {(N, side): form_for("cuda", N * side**2, 512 * 256 * 9) for N in (6, 64) for side in (8, 16, 32)}
    assert forms == dict.fromkeys(forms, "one by one") | dict.fromkeys([(6, 8), (6, 16)], "unfolded")
    for K, N in ((20, 6), (8, 64), (20, 63), (20, 1)):
        for side in (4, 8, 16, 32):
            if form_for("cuda", N * side**2, 512 * 256 * 9) == "unfolded":
                assert K * N * side**2 * 512 * 9 * 2 < 2**30  # bytes of one layer's neighbourhoods in bf16


@pytest.mark.parametrize("form", FORMS.values())
def test_classes_side_by_side_stay_channels_last(form):
    x = torch.randn(6, 4, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    W0, F = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last), torch.randn(3, 8, 4, 1, 1)
    weight, bias = scaled(W0, F), torch.zeros(8)
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in weight)
    assert torch.equal(weight, scaled(W0.contiguous(), F))
    y = form(x, weight, bias, 1, 1)
    expected = torch.cat([nn.functional.conv2d(x[i : i + 1], weight[i % 3], bias, 1, 1) for i in range(6)])
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    if form is not FORMS["grouped"]:
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_the_kernels_of_a_gpu_agree_with_float64_in_triton_s_interpreter():
    pytest.importorskip("triton")
    script = Path(__file__).with_name("kernels.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, script, "small"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == 4
