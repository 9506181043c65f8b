from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tiger.models.tiger.pairs import child_products, pair_products


def drawn(seed: int, rows: int, columns: int, pairs: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, 8, generator=generator).requires_grad_()
    right = torch.randn(columns, 8, generator=generator).requires_grad_()
    cells = torch.randperm(rows * columns, generator=generator)[:pairs]
    row, by_row = (cells // columns).sort()
    return left, right, row, (cells % columns)[by_row], torch.randn(len(cells), generator=generator)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 9), columns=st.integers(1, 9), pairs=st.integers(0, 40))
def test_products_and_gradients_equal_those_of_gathered_rows(seed: int, rows: int, columns: int, pairs: int) -> None:
    """Rows and columns without a pair, all pairs, and no pair at all are among the cases."""
    left, right, row, column, weight = drawn(seed, rows, columns, pairs)
    found = pair_products(left, right, row, column)
    gradients = torch.autograd.grad(found @ weight, (left, right))
    expected = (left[row] * right[column]).sum(-1)
    torch.testing.assert_close(found, expected)
    for gradient, other in zip(gradients, torch.autograd.grad(expected @ weight, (left, right)), strict=True):
        torch.testing.assert_close(gradient, other)


def test_gradients_do_not_depend_on_threads() -> None:
    left, right, row, column, weight = drawn(0, 500, 300, 20_000)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.autograd.grad(pair_products(left, right, row, column) @ weight, (left, right)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_children_equal_those_of_gathered_rows(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, table = torch.randn(3, 5, 8, generator=generator).to(dtype), torch.randn(40, 8, generator=generator)
    children = torch.randint(40, (3, 5, 7), generator=generator)
    expected = (queries.float()[:, :, None] * table[children]).sum(-1)
    torch.testing.assert_close(child_products(queries, table, children), expected)
