"""The adapters that the paper compares with, each conditioned on the class: one row of numbers a class.

Letters: K classes, O = Cout, I = Cin, k kernel side, r rank. The paper names these methods in one sentence each (Sec.
5.2); what it leaves open is chosen so that its numbers of parameters come out, and said below. All start at the
identity. The rates are the best of a coarse grid on one base at half the images, so within a factor of two or three.
"""

import torch
from torch import nn

from funlora_lab.adapters.functional import functional
from funlora_lab.adapters.functions import product
from funlora_lab.adapters.method import Method, broadcast, kaiming, register, sizes, vectors, window

PAIRS = ("rank", "extra_rank")  # how many pairs A B, A2 B2, ... a layer has in the vanilla methods


def _ends(settings) -> list[str]:
    return ["", *map(str, range(2, settings.rank + 1))]


def _vanishing(layer, settings, generator=None, first=1):
    """The pairs from the ``first`` on: A Kaiming normal, B zero, so B alone has a gradient at first (Sec. 3.1.1)."""
    (outputs, inputs), row = sizes(layer, settings), {}
    for end in _ends(settings)[first - 1 :]:
        row |= {"A" + end: kaiming(generator, outputs, 1)[:, 0], "B" + end: torch.zeros(inputs)}
    return row


def _sum(numbers, settings):
    """A B + A2 B2 + ... (K, O, I)."""
    first, *others = [product(*vectors(numbers, settings, end)) for end in _ends(settings)]
    return sum(others, first)


def _vanilla_mul() -> Method:
    """W0 * A B, with A = B = 1 the identity; further pairs start at a product of zero."""

    def further(layer, settings, generator, start):
        return _vanishing(layer, settings, generator, first=2)

    def bound(settings, O, I):
        return min(settings.rank, O // settings.ratio, I // settings.ratio)

    return functional("vanilla-mul", "W * AB in the window's convolutions", 1e-1, PAIRS, further, _sum, bound)


def _vanilla_add() -> Method:
    """W0 + A B, the same matrix at every kernel position.

    The numbers of Table II are those of rank 1 and 1,536 more: the paper does not say which layers have rank 2, so
    ``extra_rank`` names them (48 and 50, say).
    """

    def weight(W0, numbers, settings):
        return W0 + broadcast(_sum(numbers, settings), W0)

    about, settings = "W + AB in the window's convolutions", ("ratio", "window", *PAIRS)
    return Method("vanilla-add", about, 1e-2, settings, window(), _vanishing, _vanishing, weight)


def _scale_shift() -> Method:
    """W * pad(scale x + shift): every input channel scaled and shifted, 2 I a layer.

    SSF (Lian et al. 2022, the paper's [120]) scales and shifts the *output* of every operation, from normal numbers
    around 1 and 0; here it is the input, since 2 * sum(Cin) is the paper's number, from exactly 1 and 0. The zero
    padding comes after the shift, which therefore could not be in the weights.
    """

    def start(layer, settings, generator=None):
        I = layer.weight.shape[1]
        return {"scale": torch.ones(I), "shift": torch.zeros(I)}

    def affine(numbers):
        return torch.stack([numbers["scale"], numbers["shift"]], 1)

    about = "scale and shift of the inputs of the window's convolutions"
    return Method("scale-shift", about, 1e-1, ("window",), window(), start, start, affine=affine)


def _lora(name, about, settings, layers, bottleneck) -> Method:
    """W0 + B A, reshaped as memory lies: B (O k, b) zero, A (b, I k) Kaiming normal; b k (O + I) a layer.

    b = bottleneck(settings, k): r k in loralib's convolution (v1), r in what the paper calls the form of AdAM (v2),
    though AdAM's code multiplies (``kml``), r in the projections of attention, where k = 1.

    loralib's A is Kaiming uniform with a = sqrt(5), the paper's normal; its factor alpha / r is 1 here; its merged
    attention layer has a pair each for queries and values and none for keys, but the paper's number for rank 2 is that
    of one A for all three. Which convolutions the paper took it does not say. Its numbers are those of three of one
    output block (CIFAR, rank 1) and 46-47 (ImageNet100) for v1, of 44-50 and 48-57 for v2, and of other windows too.
    """

    def start(layer, settings, generator=None):
        O, I, k = layer.weight.shape[:3]
        b = bottleneck(settings, k)
        return {"B": torch.zeros(O * k, b), "A": kaiming(generator, b, I * k)}

    def weight(W0, numbers, settings):
        return W0 + (numbers["B"] @ numbers["A"]).reshape(-1, *W0.shape)

    return Method(name, about, 3e-2, settings, layers, start, start, weight)


def _lora_attention() -> Method:
    def projections(net, settings):
        return {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Conv1d)}

    rank = "lora_attention_rank"
    about = "W + BA in the qkv and output projections of every attention block"
    return _lora("lora-attention", about, (rank,), projections, lambda settings, k: getattr(settings, rank))


def _lora_conv_v1() -> Method:
    about, name = "W + BA, bottleneck r k, in a few convolutions", "lora_v1_window"
    return _lora("lora-conv-v1", about, (name, "rank"), window(name), lambda settings, k: settings.rank * k)


def _lora_conv_v2() -> Method:
    about, name = "W + BA, bottleneck r, in a few convolutions", "lora_v2_window"
    return _lora("lora-conv-v2", about, (name, "rank"), window(name), lambda settings, k: settings.rank)


def _kml() -> Method:
    """AdAM's kernel modulation (Zhao et al. 2022): W0 * (1 + v u), v (O) and u (I k k); O + I k^2 a layer.

    AdAM starts both at normal noise of 1e-7, has biases and style layers modulated too, and each kernel fine-tuned or
    modulated by its Fisher information. Here v starts Kaiming normal and u zero (exactly the identity, live gradient),
    all kernels of the window are modulated, and biases stay. The paper has no row for it.
    """

    def start(layer, settings, generator=None):
        return {"v": kaiming(generator, len(layer.weight), 1)[:, 0], "u": torch.zeros(layer.weight[0].numel())}

    def weight(W0, numbers, settings):
        return W0 * (1 + product(numbers["v"], numbers["u"]).reshape(-1, *W0.shape))

    about, name = "W * (1 + vu) over channels and kernel positions, in a few convolutions", "lora_v1_window"
    return Method("kml", about, 2e-1, (name,), window(name), start, start, weight)


def _label_embedding() -> Method:
    """Vanilla conditioning: no layer changes, the label embedding alone is learned."""

    def nothing(*_):
        return {}

    about = "the label embedding alone"
    return Method("label-embedding", about, 3e-2, (), nothing, nothing, nothing, learns_label=True)


def _gan_memory() -> Method:
    """GAN memory's style modulation (Cong et al. 2020): gamma * (W0 - mean) / std + beta for every little kernel.

    Mean and standard deviation are those of each k x k kernel, gamma and beta (O, I) start at them, and what is
    computed is W0 + (gamma - std) (W0 - mean) / std + (beta - mean), so that the start is W0 to the bit: F as large as
    it gets, 2 O I a layer, of which FunLoRA's is a compression. Theirs are a GAN's, one set a task, with biases, a
    modulated discriminator and later a compression by SVD; here they are one a class, biases and 1 x 1 kernels stay.
    The paper has no row for it. The rate is the best of 1e-3, 2e-3, 3e-3, 1e-2, 3e-2 by the held-out flow loss.
    """

    def kernels(net, settings):
        return {name: layer for name, layer in window()(net, settings).items() if layer.weight.shape[2] > 1}

    def moments(W):
        std, mean = torch.std_mean(W, (2, 3), keepdim=True)
        return std.clamp(min=1e-12), mean  # of a convolution that starts at zero, say

    def start(layer, settings, generator=None):
        W = layer.weight.detach()
        std, mean = moments(torch.zeros(W.shape) if W.is_meta else W)  # a network without memory is only counted
        return {"gamma": std[..., 0, 0].clone(), "beta": mean[..., 0, 0].clone()}

    def weight(W0, numbers, settings):
        std, mean = moments(W0)
        gamma, beta = (broadcast(numbers[name], W0) for name in ("gamma", "beta"))
        return W0 + (gamma - std) * ((W0 - mean) / std) + (beta - mean)

    about = "gamma norm(W) + beta for every kernel of the window's convolutions"
    return Method("gan-memory", about, 2e-3, ("window",), kernels, start, start, weight)


_LORAS = (_lora_attention, _lora_conv_v1, _lora_conv_v2)
for _make in (_vanilla_mul, _vanilla_add, _scale_shift, *_LORAS, _kml, _gan_memory, _label_embedding):
    register(_make())
