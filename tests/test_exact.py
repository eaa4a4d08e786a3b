"""The products that float64 results are judged by."""

import numpy as np
import pytest
import torch

from pykernels.testing.exact import ExactProducts, matmul


@pytest.mark.parametrize("sizes", [(3, 1028, 5), (17, 64, 9), (1, 1, 1), (2, 0, 3)])
def test_nearly_every_bit_is_right(sizes):
    """Against long double, also where the terms of a sum are of very different size."""
    m, k, n = sizes
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(m, k, dtype=torch.float64, generator=generator)
    b = torch.randn(k, n, dtype=torch.float64, generator=generator)
    a, b = a * torch.randn(m, k, generator=generator).exp(), b / 3
    wide = a.numpy().astype(np.longdouble) @ b.numpy().astype(np.longdouble)
    error = np.abs(matmul(a, b).numpy() - wide)
    assert (error <= 2 * np.spacing(np.abs(wide.astype(np.float64)))).all()


def test_what_is_not_finite_spreads():
    a = torch.tensor([[1.0, torch.inf], [2.0, 3.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, torch.nan], [2.0, 1.0]], dtype=torch.float64)
    assert torch.equal(matmul(a, b).isnan(), (a @ b).isnan())
    assert torch.equal(matmul(a, b).isinf(), (a @ b).isinf())


def test_autograd_runs_on_them():
    a, b = (torch.randn(6, 700, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with ExactProducts():
        product = a @ b.T
        (grad,) = torch.autograd.grad(product, a, torch.ones_like(product))
    assert torch.equal(product, matmul(a, b.T).detach())
    torch.testing.assert_close(grad, torch.ones(6, 6, dtype=torch.float64) @ b.detach())
