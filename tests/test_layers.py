"""Every layer of the U-Net computes what its namesake in PyTorch does, whichever way it takes."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from funlora_lab import layers, winograd
from funlora_lab.layers import FORMS, DoublingConv2d, Dropout, Projection, attended
from funlora_lab.speed import has_bf16


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("k", "stride"), [(3, 1), (1, 1), (3, 2)])
def test_forms_of_the_per_class_convolution_agree(form, k, stride):
    torch.manual_seed(0)
    K, N = 3, 4
    x = torch.randn(N * K, 6, 8, 8, requires_grad=True)
    weight = torch.randn(K, 5, 6, k, k, requires_grad=True)
    bias = torch.randn(5)
    y = FORMS[form](x, weight, bias, stride, k // 2)
    expected = torch.stack(  # image by image, each with its class's kernel
        [F.conv2d(x[i : i + 1], weight[i % K], bias, stride, k // 2)[0] for i in range(N * K)]
    )
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(out.square().sum(), (x, weight)) for out in (y, expected)]
    torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize(("H", "W"), [(4, 3), (8, 8), (16, 5)])
def test_winograd_is_a_padded_convolution_with_its_gradients(H, W):
    torch.manual_seed(0)
    double = {"dtype": torch.float64, "requires_grad": True}
    x, weight, bias = torch.randn(2, 3, H, W, **double), torch.randn(4, 3, 3, 3, **double), torch.randn(4, **double)
    y, expected = winograd.convolved(x, weight, bias), F.conv2d(x, weight, bias, padding=1)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    upstream = torch.randn_like(y)
    grads = [torch.autograd.grad(out, (x, weight, bias), upstream) for out in (y, expected)]
    torch.testing.assert_close(*grads, atol=1e-11, rtol=0)


@pytest.mark.parametrize("only_avx2", [True, False])
@pytest.mark.parametrize(("channels", "size", "stride"), [(128, 16, 1), (128, 16, 2), (128, 18, 1), (64, 16, 1)])
def test_a_large_convolution_keeps_fp32_accuracy_whichever_way_it_goes(only_avx2, channels, size, stride, monkeypatch):
    monkeypatch.setattr(layers, "ONLY_AVX2", only_avx2)
    taken = []
    real = winograd.convolved
    monkeypatch.setattr(winograd, "convolved", lambda *inputs: taken.append(1) or real(*inputs))
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, channels, size, size), torch.randn(128, channels, 3, 3), torch.randn(128)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), stride, 1)
    y = layers.single(x, weight, bias, stride, 1)
    assert (y - exact).norm() < 3e-6 * exact.norm()
    assert bool(taken) == (only_avx2 and (channels, size, stride) == (128, 16, 1))


@pytest.mark.parametrize("size", [3, 8])  # the plain way, and as a transposed convolution
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_doubling_convolution_equals_a_convolution_of_the_doubled_image(size, dtype):
    torch.manual_seed(0)
    layer, x = DoublingConv2d(5, 4, 3, padding=1).double(), torch.randn(6, 5, size, size + 1, dtype=torch.float64)
    kernels = torch.randn(3, 4, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    affine = torch.rand(3, 2, 5, dtype=torch.float64)
    scale, shift = (each.repeat(2, 1)[..., None, None] for each in affine.unbind(1))
    large = F.interpolate(x, scale_factor=2, mode="nearest")
    moved = F.interpolate(scale * x + shift, scale_factor=2, mode="nearest")
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


@pytest.mark.skipif(not has_bf16("cpu"), reason="this processor has no bf16 instructions: bf16 is never used on it")
def test_doubling_convolution_sums_the_kernel_in_fp32_under_autocast():
    torch.manual_seed(0)
    layer, x = DoublingConv2d(64, 8, 3, padding=1), torch.randn(2, 64, 8, 8)
    exact = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), layer.weight, layer.bias, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), layer.weight, layer.bias, padding=1)
        ours = layer(x)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).square().mean() < 1.2 * (plain - exact).square().mean()


@pytest.mark.parametrize("size", [3, 8])  # a matrix product, and in fp32 a convolution
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_projection_equals_a_convolution_of_width_1(dtype, size):
    torch.manual_seed(0)
    layer, x = Projection(6, 5, 1).to(dtype), torch.randn(3, 6, size, size + 1).to(dtype)
    expected = F.conv1d(x.flatten(2).float(), layer.weight.float(), layer.bias.float())
    atol = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(layer(x).flatten(2).float(), expected, atol=atol, rtol=0)


def test_attention_projection_of_several_classes_agrees_with_one_at_a_time():
    torch.manual_seed(0)
    layer, x, weight = Projection(6, 5, 1), torch.randn(8, 6, 2, 5), torch.randn(2, 5, 6, 1)
    y = functional_call(layer, {"weight": weight}, x)
    for k in range(2):
        expected = F.conv1d(x[k::2].flatten(2), weight[k], layer.bias)
        torch.testing.assert_close(y[k::2].flatten(2), expected, atol=1e-5, rtol=1e-5)


def test_unfused_attention_in_bf16_agrees_with_the_fused_one_in_fp32():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 16, 8).bfloat16()
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    torch.testing.assert_close(attended(q, k, v).float(), expected, atol=0.03, rtol=0)  # bf16 keeps 8 bits


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(10, 100_001, requires_grad=True)  # no multiple of the four masks in a random number
    layer = Dropout(p)
    y = layer(x)
    dropped, values = (y == 0).float(), y.detach().unique()
    assert abs(dropped.mean() - p) < 5 * (p * (1 - p) / 1e6) ** 0.5
    assert len(values) == 2
    assert abs(values[1] * (1 - p) - 1) < 1e-4
    for lag in (1, 4):  # neighbours do not know of each other, whichever part of a random number they come from
        together = (dropped[:, lag:] * dropped[:, :-lag]).mean()
        assert abs(together - p * p) < 5 * (p * p * (1 - p * p) / 1e6) ** 0.5
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # the gradient passes the same mask
    assert torch.equal(layer.eval()(x), x)
