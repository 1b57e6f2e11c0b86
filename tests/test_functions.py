"""The functions of Eq. 8-19 against values worked out by hand, an independent oracle, and their gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from funlora_lab import functions
from funlora_lab.metrics import numerical_rank

P = 10


def vectors(seed: int, K: int = 2, O: int = 12, I: int = 9, p: int = 4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(K, n, generator=generator, dtype=dtype, requires_grad=True) for n in (O, I, p, p)]


def test_shift_of_two_small_vectors_by_hand():
    A, B = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0])
    one = functions.shift(A, B, torch.tensor([1.0]))
    assert torch.equal(one, torch.tensor([[60.0, 30.0], [20.0, 10.0], [40.0, 20.0]]))  # (3 1 2) times (20 10)


def test_frozen_power_by_hand():
    A, B = torch.tensor([2.0, -1.0]), torch.tensor([3.0])
    F = functions.power_frozen(A, B, torch.tensor([1.0, 0.5]))
    assert torch.allclose(F, torch.tensor([[(6 + 0.5 * 36) / 2], [(-3 + 0.5 * 9) / 2]]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_every_function_equals_its_formula_entry_by_entry(seed):
    A, B, ponderation, hyper = vectors(seed, K=1, O=5, I=4, p=3)
    a, b, c, w = (tensor.detach()[0] for tensor in (A, B, ponderation, hyper))

    def oracle(wave):
        return torch.tensor(
            [[sum(c[i].item() * wave(o, j, i) for i in range(3)) / 3 for j in range(len(b))] for o in range(len(a))],
            dtype=torch.float64,
        )

    def product(o, j):
        return a[o].item() * b[j].item()

    expected = {
        "cosine": oracle(lambda o, j, i: math.cos(w[i].item() * product(o, j))),
        "power": oracle(lambda o, j, i: math.copysign(abs(product(o, j)) ** w[i].item(), product(o, j))),
        "power_frozen": oracle(lambda o, j, i: product(o, j) ** (i + 1)),
        "shift": oracle(lambda o, j, i: a[(o - i - 1) % 5].item() * b[(j - i - 1) % 4].item()),
    }
    for name, matrix in expected.items():
        inputs = (A, B, ponderation, hyper) if name in ("cosine", "power") else (A, B, ponderation)
        assert torch.allclose(getattr(functions, name)(*inputs)[0], matrix, rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("name", ["cosine", "power"])
def test_learned_functions_have_exact_gradients(name):
    assert torch.autograd.gradcheck(getattr(functions, name), vectors(3))


@pytest.mark.parametrize("kept", [0, 2**22])
def test_cosine_in_blocks_equals_cosine_at_once(monkeypatch, kept):
    inputs = vectors(5)
    together = functions.cosine(*inputs)
    gradients = torch.autograd.grad(together.square().sum(), inputs)
    monkeypatch.setattr(functions, "WAVES_AT_ONCE", 1)
    monkeypatch.setattr(functions, "WAVES_KEPT", kept)
    alone = functions.cosine(*inputs)
    assert torch.allclose(together, alone)
    for one, other in zip(gradients, torch.autograd.grad(alone.square().sum(), inputs), strict=True):
        assert torch.allclose(one, other)


def test_learned_power_has_a_finite_gradient_at_zero():
    A = torch.zeros(3, requires_grad=True)
    F = functions.power(A, torch.ones(2), torch.ones(2), torch.tensor([0.5, 1.5]))
    F.sum().backward()
    assert torch.isfinite(A.grad).all()


def test_literal_start_of_the_cosine_is_not_the_identity():
    F = functions.cosine(torch.ones(2), torch.ones(2), torch.ones(P), torch.arange(1.0, P + 1))
    assert F[0, 0].item() == pytest.approx(-0.1417, abs=1e-4)


@pytest.mark.parametrize("start", ["identity", "equal"])
def test_other_starts_of_the_cosine_are_the_identity(start):
    ponderation = functions.first_ponderation("cosine", start, P)
    F = functions.cosine(torch.ones(3), torch.ones(2), ponderation, torch.arange(1.0, P + 1))
    assert torch.allclose(F, torch.ones(3, 2), atol=1e-6)


def test_identity_start_has_the_smallest_ponderations():
    identity, equal = (functions.first_ponderation("cosine", start, P) for start in ("identity", "equal"))
    assert identity.norm() < equal.norm()


@pytest.mark.parametrize(("name", "function"), [("shift", "shift"), ("power_frozen", "power"), ("power", "power")])
def test_rank_never_exceeds_its_bound(name, function):
    A, B, ponderation, hyper = (tensor.detach()[0] for tensor in vectors(7, O=32, I=24, p=6))
    inputs = (A, B, ponderation, hyper.abs() + 0.5) if name == "power" else (A, B, ponderation)
    rank = numerical_rank(getattr(functions, name)(*inputs), 1e-12)
    assert rank <= functions.rank_bound(function, 6, 32, 24) == 6


def test_cosine_exceeds_the_number_of_functions():
    A, B, ponderation, hyper = (tensor.detach()[0] for tensor in vectors(7, O=64, I=48, p=6))
    assert numerical_rank(functions.cosine(A, B, ponderation, 3 * hyper)) > 6
