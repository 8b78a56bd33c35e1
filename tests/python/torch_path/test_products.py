# SPDX-License-Identifier: Apache-2.0
"""torch's grouped product or a loop: the same numbers, and a choice that gives its reason."""

import pytest
import torch

from penstock._torch_path import products

ENDS = [3, 3, 9]


def operands(dtype=torch.float32, inner=32, outer=16):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, inner, generator=generator, dtype=torch.float64)
    matrices = torch.randn(3, inner, outer, generator=generator, dtype=torch.float64)
    return (
        rows.to(dtype).requires_grad_(),
        matrices.to(dtype).requires_grad_(),
        torch.tensor(ENDS, dtype=torch.int32),
    )


def test_both_forms_agree():
    results = []
    for form in (products.grouped_product, products.loop_product):
        rows, matrices, ends = operands()
        y = form(rows, matrices, ends)[: ENDS[-1]]
        d_rows, d_matrices = torch.autograd.grad(y.square().sum(), (rows, matrices))
        results.append((y, d_rows[: ENDS[-1]], d_matrices))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert not results[0][2][1].any()  # the expert without rows


@pytest.mark.parametrize("transposed", ["inner_major", "outer_major"])
def test_either_order_of_the_axes_is_grouped(transposed):
    rows, matrices, ends = operands(torch.bfloat16)
    if transposed == "outer_major":
        matrices = matrices.detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert products.why_not_grouped(rows, matrices) == ""
    y = products.product(rows, matrices, ends)[: ENDS[-1]]
    want = products.loop_product(rows, matrices, ends)[: ENDS[-1]]
    torch.testing.assert_close(y, want)


@pytest.mark.parametrize("expected", ["no rows", "multiples of 8", "strides", "begin"])
def test_what_is_not_grouped_is_told(expected):
    rows, matrices, ends = operands(torch.bfloat16)
    rows, matrices = rows.detach(), matrices.detach()
    if expected == "no rows":
        rows, ends = rows[:0], ends * 0
    if expected == "multiples of 8":
        matrices = matrices[:, :, :12].contiguous()
    if expected == "strides":
        matrices = torch.nn.functional.pad(matrices, (0, 1))[:, :, :-1]
    if expected == "begin":
        matrices = torch.cat((matrices.new_zeros(4), matrices.flatten()))[4:].view(3, 32, 16)
    assert expected in products.why_not_grouped(rows, matrices)
    assert products.product(rows, matrices, ends).shape == (rows.shape[0], matrices.shape[2])


def test_torch_itself_is_asked_once_for_a_dtype():
    reason = products.why_torch_cannot(torch.float64, "cpu", 0)
    assert torch.__version__ in reason
    rows, matrices, ends = operands(torch.float64)
    assert products.why_not_grouped(rows, matrices) == reason
    assert products.product(rows, matrices, ends).dtype == torch.float64
    with torch.inference_mode():  # asked where no gradient may be
        products._tried.cache_clear()
        assert products.why_torch_cannot(torch.bfloat16, "cpu", 0) == ""
