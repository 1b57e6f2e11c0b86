"""The adapters that the paper compares with, each conditioned on the class: one row of numbers a class.

Letters: K classes, O = Cout, I = Cin, k kernel side, r rank. The paper names these methods in one sentence each
(Sec. 5.2); what it leaves open is chosen so that its numbers of parameters come out, and said below.

All start at the identity. A low-rank product starts with its second factor at zero, so at the first step only that
factor has a gradient; the other has one from the second step on.
"""

import torch
from torch import Tensor, nn

from funlora_lab.config import Experiment
from funlora_lab.functions import product
from funlora_lab.methods import Method, Row, broadcast, kaiming, products, vanishing_pair, window
from funlora_lab.unet import UNet


def _vanilla_add() -> Method:
    """W0 + A B, the same matrix at every kernel position, with A Kaiming normal and B zero (Sec. 5.2).

    The paper's numbers of Table II are those of rank 1 with 1,536 numbers more; which layers have rank 2 it does not
    say, so ``extra_rank`` names them (48 and 50, say, or any others that add 1,536).
    """

    def start(layer, experiment, generator):
        pairs = ("" if i == 1 else str(i) for i in range(1, experiment.rank + 1))
        return {
            name: value for end in pairs for name, value in vanishing_pair(layer, experiment, generator, end).items()
        }

    def weight(W0, numbers, experiment):
        return W0 + broadcast(products(numbers, experiment.ratio), W0)

    return Method(
        about="W + AB in the window's convolutions",
        settings=("method", "ratio", "window", "rank", "extra_rank", "label_embedding"),
        layers=window,
        start=start,
        neutral=lambda layer, experiment: start(layer, experiment, None),
        weight=weight,
    )


def _scale_shift() -> Method:
    """The input channels of the window's convolutions scaled and shifted: W * pad(scale x + shift), 2 I a layer.

    From SSF (Lian et al. 2022, the paper's [120]), which scales and shifts the *output* of every operation and starts
    from normal numbers around 1 and 0. Here it is the input, since 2 * sum(Cin) is the paper's number, and the start
    is exactly 1 and 0. The weights stay the base's; the shift, coming before the zero padding, could not be in them.
    """

    def start(layer, experiment, generator=None):
        I = layer.weight.shape[1]
        return {"scale": torch.ones(I), "shift": torch.zeros(I)}

    return Method(
        about="scale and shift of the inputs of the window's convolutions",
        settings=("method", "window", "label_embedding"),
        layers=window,
        start=start,
        neutral=start,
        affine=lambda numbers: torch.stack([numbers["scale"], numbers["shift"]], 1),
    )


def _attention_projections(net: UNet, experiment: Experiment) -> dict[str, nn.Module]:
    """Every attention block's joint projection to queries, keys and values, and its output projection."""
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Conv1d)}


def _low_rank(about: str, settings: tuple[str, ...], layers, shapes) -> Method:
    """W0 + B A, reshaped to W0, with A Kaiming normal and B zero; ``shapes(layer, experiment)`` -> those of B and A.

    As in loralib but for two things: A is Kaiming normal, as the paper says, not Kaiming uniform with a = sqrt(5); and
    nothing scales the product (loralib's alpha / r is 1).
    """

    def start(layer, experiment, generator):
        B, A = shapes(layer, experiment)
        return {"B": torch.zeros(B), "A": torch.zeros(A) if generator is None else kaiming(*A, generator=generator)}

    def weight(W0, numbers, experiment):
        return W0 + (numbers["B"] @ numbers["A"]).reshape(-1, *W0.shape)

    return Method(
        about=about,
        settings=("method", *settings, "label_embedding"),
        layers=layers,
        start=start,
        neutral=lambda layer, experiment: start(layer, experiment, None),
        weight=weight,
    )


def _lora_attention() -> Method:
    """LoRA of rank ``lora_attention_rank`` on qkv and output projection of every attention block: 6 O r a block.

    One A serves queries, keys and values (rank r for the joint projection): the paper's number for rank 2. loralib's
    merged layer gives each of the three its own pair and leaves the keys out.
    """

    def shapes(layer, experiment):
        O, I = layer.weight.shape[:2]
        return (O, experiment.lora_attention_rank), (experiment.lora_attention_rank, I)

    return _low_rank(
        "W + BA in the qkv and output projections of every attention block",
        ("lora_attention_rank",),
        _attention_projections,
        shapes,
    )


def _lora_conv_v1() -> Method:
    """loralib's LoRA of a convolution: B (O k, r k) A (r k, I k), reshaped as memory lies; r k^2 (I + O) a layer.

    The paper's numbers are those of three convolutions of one output block (CIFAR, rank 1) and of layers 46-47
    (ImageNet100); other windows give them too, and the paper does not say which it took.
    """

    def shapes(layer, experiment):
        (O, I, k), r = layer.weight.shape[:3], experiment.rank
        return (O * k, r * k), (r * k, I * k)

    return _low_rank("W + BA, bottleneck r k, in a few convolutions", ("lora_v1_window", "rank"), window, shapes)


def _lora_conv_v2() -> Method:
    """The same with the bottleneck r in place of r k: B (O k, r) A (r, I k); r k (I + O) a layer.

    The paper calls it the form of AdAM (Zhao et al. 2022), whose own code multiplies instead: that is ``kml``. Which
    layers it took is not said; 44-50 (CIFAR) and 48-57 (ImageNet100) give its numbers.
    """

    def shapes(layer, experiment):
        (O, I, k), r = layer.weight.shape[:3], experiment.rank
        return (O * k, r), (r, I * k)

    return _low_rank("W + BA, bottleneck r, in a few convolutions", ("lora_v2_window", "rank"), window, shapes)


def _kml() -> Method:
    """AdAM's kernel modulation (Zhao et al. 2022): W0 * (1 + v u), v (O) and u (I k k); O + I k^2 a layer.

    AdAM starts both vectors at normal noise of 1e-7, also modulates biases and style layers, and fine-tunes or
    modulates each kernel by its Fisher information. Here v starts Kaiming normal and u zero (exactly the identity,
    live gradient), all kernels of the window are modulated, and biases stay. The paper has no row for it.
    """

    def start(layer, experiment, generator):
        O, numbers = layer.weight.shape[0], layer.weight[0].numel()
        v = torch.zeros(O) if generator is None else kaiming(O, 1, generator=generator)[:, 0]
        return {"v": v, "u": torch.zeros(numbers)}

    def weight(W0: Tensor, numbers: Row, experiment: Experiment) -> Tensor:
        return W0 * (1 + product(numbers["v"], numbers["u"]).reshape(-1, *W0.shape))

    return Method(
        about="W * (1 + vu) over channels and kernel positions, in a few convolutions",
        settings=("method", "lora_v1_window", "label_embedding"),
        layers=window,
        start=start,
        neutral=lambda layer, experiment: start(layer, experiment, None),
        weight=weight,
    )


def _label_embedding() -> Method:
    """Vanilla conditioning only: no layer changes, the new class's label embedding alone is learned."""
    return Method(
        about="the label embedding alone",
        settings=("method",),
        layers=lambda net, experiment: {},
        start=lambda *_: {},
        neutral=lambda *_: {},
    )


RIVALS: dict[str, Method] = {
    "vanilla-add": _vanilla_add(),
    "scale-shift": _scale_shift(),
    "lora-attention": _lora_attention(),
    "lora-conv-v1": _lora_conv_v1(),
    "lora-conv-v2": _lora_conv_v2(),
    "kml": _kml(),
    "label-embedding": _label_embedding(),
}
