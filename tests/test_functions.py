"""The functions of Eq. 8-19 against values worked out by hand, an independent oracle and their gradients; ranks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from funlora_lab.adapters import METHODS, Settings, functions
from funlora_lab.errors import LabError
from funlora_lab.studies.rank import effective_rank, importance, numerical_rank

P = 10
ONES, RAMP = torch.ones(P), torch.arange(1.0, P + 1)


def vectors(seed: int, K: int = 2, O: int = 12, I: int = 9, p: int = 4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(K, n, generator=generator, dtype=torch.float64, requires_grad=True) for n in (O, I, p, p)]


def test_shift_of_two_small_vectors_by_hand():
    one = functions.shift(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0]), torch.tensor([1.0]))
    assert torch.equal(one, torch.tensor([[60.0, 30.0], [20.0, 10.0], [40.0, 20.0]]))  # (3 1 2) times (20 10)


def test_frozen_power_by_hand():
    F = functions.power_frozen(torch.tensor([2.0, -1.0]), torch.tensor([3.0]), torch.tensor([1.0, 0.5]))
    assert torch.allclose(F, torch.tensor([[(6 + 0.5 * 36) / 2], [(-3 + 0.5 * 9) / 2]]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_every_function_equals_its_formula_entry_by_entry(seed):
    A, B, ponderation, other = vectors(seed, K=1, O=5, I=4, p=3)
    a, b, c, w = (tensor[0].tolist() for tensor in (A, B, ponderation, other))

    def oracle(f):
        table = [[sum(c[i] * f(o, j, i) for i in range(3)) / 3 for j in range(4)] for o in range(5)]
        return torch.tensor(table, dtype=torch.float64)

    expected = {
        "cosine": oracle(lambda o, j, i: math.cos(w[i] * a[o] * b[j])),
        "cosine_frozen": oracle(lambda o, j, i: math.cos((i + 1) * a[o] * b[j])),
        "power": oracle(lambda o, j, i: math.copysign(abs(a[o] * b[j]) ** w[i], a[o] * b[j])),
        "power_frozen": oracle(lambda o, j, i: (a[o] * b[j]) ** (i + 1)),
        "shift": oracle(lambda o, j, i: a[(o - i - 1) % 5] * b[(j - i - 1) % 4]),
    }
    for name, matrix in expected.items():
        more = (other,) if name in ("cosine", "power") else ()
        computed = getattr(functions, name)(A, B, ponderation, *more)[0]
        assert torch.allclose(computed, matrix, rtol=1e-9, atol=1e-9), name


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
    functions.power(A, torch.ones(2), torch.ones(2), torch.tensor([0.5, 1.5])).sum().backward()
    assert torch.isfinite(A.grad).all()


def test_literal_start_of_the_cosine_is_not_the_identity_and_the_others_are():
    first = {start: functions.first_ponderation(functions.cosine, start, P, RAMP) for start in ("identity", "equal")}
    F = {start: functions.cosine(torch.ones(3), torch.ones(2), value, RAMP) for start, value in first.items()}
    assert torch.allclose(F["identity"], torch.tensor(1.0), atol=1e-6)
    assert torch.allclose(F["equal"], torch.tensor(1.0), atol=1e-6)
    assert first["identity"].norm() < first["equal"].norm()  # it has the smallest ponderations
    assert torch.equal(functions.first_ponderation(functions.cosine, "literal", P, RAMP), ONES)
    literal = functions.cosine(torch.ones(2), torch.ones(2), ONES, RAMP)
    assert literal[0, 0].item() == pytest.approx(-0.1417, abs=1e-4)


@pytest.mark.parametrize("start", ["identity", "equal"])
def test_a_function_that_no_ponderation_takes_to_one_is_refused(start):
    with pytest.raises(LabError, match=rf"^start={start}: .* accepted is literal\.$"):
        functions.first_ponderation(lambda A, B, c: functions.power_frozen(A - 1, B, c), start, P)


@pytest.mark.parametrize(
    ("method", "ratio", "bound"),
    [(method, 1, 6) for method in ("shift", "power-frozen", "power")]
    + [("shift", 8, 6), ("power-frozen", 8, 3), ("power", 8, 3), ("funlora", 8, 3), ("cosine-frozen", 8, 3)]
    + [("vanilla-mul", 1, 1), ("funlora", 1, 24)],
)
def test_rank_never_exceeds_its_bound(method, ratio, bound):
    A, B, ponderation, other = (tensor.detach() for tensor in vectors(7, O=32 // ratio, I=24 // ratio, p=6))
    other = other.abs() + 0.5 if method == "power" else 3 * other
    numbers = {"A": A, "B": B, "ponderation": ponderation, "exponent": other, "frequency": other}
    given = Settings(functions=6, ratio=ratio, rank=1)
    rank = numerical_rank(METHODS[method].matrix(numbers, given), 1e-12)
    assert rank.max() <= METHODS[method].bound(given, 32, 24) == bound
    if method == "funlora" and ratio == 1:
        assert rank.min() > 6  # the cosine exceeds the number of functions


def test_importance_is_the_mean_distance_from_one():
    assert importance(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0, 0.4])) == pytest.approx(0.7)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_ranks_of_a_matrix_of_known_rank(rank):
    generator = torch.Generator().manual_seed(rank)
    left, right = torch.randn(20, rank, generator=generator), torch.randn(rank, 16, generator=generator)
    assert numerical_rank(left @ right) == rank
    assert effective_rank(torch.eye(9)[:rank]).item() == pytest.approx(rank)
