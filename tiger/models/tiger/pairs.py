"""Dot products of chosen pairs of rows of two matrices: what a softmax over the children of trie nodes needs.

Gathering both rows of every pair costs many times the products themselves. On a CPU they are sampled products of
matrices instead (`torch.sparse.sampled_addmm`), which read the rows where they lie: 28 times faster at 1,600 queries
with 256 children each (LOG.md, 2026-11-29).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

with warnings.catch_warnings():  # PyTorch says once per process that the CSR layout is in beta state
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))


def pair_products(rows: Tensor, table: Tensor, row_of_pair: Tensor, column_of_pair: Tensor) -> Tensor:
    """Return rows[row_of_pair] . table[column_of_pair], float32 [R], with gradients of both matrices.

    Every pair occurs once.

    Args:
        rows: floating-point [T, M].
        table: floating-point [U, M].
        row_of_pair: int64 [R], ascending.
        column_of_pair: int64 [R].
    """
    if rows.device.type != "cpu":
        return (rows[row_of_pair] * table[column_of_pair]).sum(-1).float()
    products: Tensor = _PairProducts.apply(rows.float(), table.float(), row_of_pair, column_of_pair)
    return products


def child_products(queries: Tensor, table: Tensor, children: Tensor) -> Tensor:
    """Return the products of each query with the vectors of its children, float32 [B, Q, W], without gradients.

    Args:
        queries: floating-point [B, Q, M].
        table: float32 [nodes, M].
        children: int64 [B, Q, W] rows of the table.
    """
    if queries.device.type != "cpu":
        return torch.einsum("bqm,bqwm->bqw", queries, table[children].to(queries.dtype)).float()
    begins = torch.arange(0, children.numel() + 1, children.shape[-1])
    return _sampled(queries.flatten(0, 1).float(), table, begins, children.flatten()).view(children.shape)


class _PairProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, table: Tensor, row_of_pair: Tensor, column_of_pair: Tensor) -> Tensor:
        begins = _begins(row_of_pair, len(rows))
        ctx.save_for_backward(rows, table, row_of_pair, column_of_pair, begins)
        return _sampled(rows, table, begins, column_of_pair)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, table, row_of_pair, column_of_pair, begins = ctx.saved_tensors
        (gradient,) = gradients
        of_rows = of_table = None
        if not len(gradient):
            return torch.zeros_like(rows), torch.zeros_like(table), None, None
        if ctx.needs_input_grad[0]:
            of_rows = _weighted_sums(begins, column_of_pair, gradient, table)
        if ctx.needs_input_grad[1]:  # rows of the transposed matrix: no sum depends on threads
            order = column_of_pair.argsort(stable=True)
            ends = _begins(column_of_pair, len(table))
            of_table = _weighted_sums(ends, row_of_pair[order], gradient[order], rows)
        return of_rows, of_table, None, None


def _begins(index: Tensor, size: int) -> Tensor:
    """Return where the entries of each index begin once they are sorted, int64 [size + 1]."""
    return F.pad(torch.bincount(index, minlength=size).cumsum(0), (1, 0))


def _weighted_sums(begins: Tensor, columns: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """Return sparse rows times a table: row i sums weights x table[columns] from begins[i] to begins[i + 1].

    A fifth of the time of a product of `torch.sparse_csr_tensor` with 384-dimensional rows (LOG.md, 2026-11-29).
    """
    sums: Tensor = F.embedding_bag(
        columns, table, begins, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
    return sums


def _sampled(rows: Tensor, table: Tensor, begins: Tensor, columns: Tensor) -> Tensor:
    if not len(columns):
        return rows.new_zeros(0)
    shape, values = (len(begins) - 1, len(table)), rows.new_zeros(len(columns))
    pattern = torch.sparse_csr_tensor(begins, columns, values, shape, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, rows.contiguous(), table.T, beta=0.0, out=pattern).values()
