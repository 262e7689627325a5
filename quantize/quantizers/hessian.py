"""The Hessian of a layer's inputs is factored in place, so that K² numbers are held only once.

It may lie in the machine's memory while everything else is on a device, which then holds a few of its rows or columns
at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantize.errors import QuantizeError

PANEL = 256  # columns that go through BLAS together
ROWS = 8 * PANEL  # rows that are sent to a device at a time


def panels(columns: int, width: int = PANEL) -> Iterator[slice]:
    """Yield slices of neighbouring columns, in order."""
    return (slice(start, min(start + width, columns)) for start in range(0, columns, width))


def permute(H: Tensor, order: Tensor) -> None:
    """Replace H [K, K] by H[order][:, order], in place."""
    for panel in panels(len(H)):
        H[:, panel] = H[:, panel].index_select(0, order)
    for panel in panels(len(H)):
        H[panel] = H[panel].index_select(1, order)


def fill_upper(H: Tensor) -> None:
    """Replace the part above the diagonal by the part below it, in place."""
    for panel in panels(len(H)):
        H[: panel.start, panel] = H[panel, : panel.start].T
        H[panel, panel] = H[panel, panel].tril() + H[panel, panel].tril(-1).T


def factor(H: Tensor, damp: float, device: torch.device) -> Tensor:
    """Damp H [K, K] and overwrite the part above its diagonal with A, where H = (A + I) diag(d) (A + I)ᵀ.

    The damping starts at `damp` of the mean diagonal and grows tenfold until the factors exist; it stays in H.

    Returns:
        d [K] > 0 on the device, which multiplies.

    Raises:
        QuantizeError: a damping of a hundred times the mean diagonal, or of `damp` if that is more, is not enough.
    """
    diagonal, most = H.diagonal().clone(), max(100, damp)
    while damp <= most:
        H.diagonal().copy_(diagonal + damp * diagonal.mean())
        d = factor_damped(H, device)
        if d is not None:
            return d
        fill_upper(H)
        damp *= 10
    raise QuantizeError(
        "the Hessian of the inputs is not positive definite: the calibration activations are not finite"
    )


def factor_damped(H: Tensor, device: torch.device) -> Tensor | None:
    """Factor H without further damping, from the last columns to the first; None if H is not positive definite.

    Each panel is a product of the columns after it; the rest within the panel is factored in float64.
    """
    d = torch.empty(len(H), dtype=H.dtype, device=device)
    for panel in reversed(list(panels(len(H)))):
        start, stop = panel.start, panel.stop
        right = (H[panel, stop:].to(device) * d[stop:]).T
        pairs = ((H[rows, panel].to(device), H[rows, stop:].to(device)) for rows in panels(stop, ROWS))
        S = torch.cat([torch.addmm(own, others, right, alpha=-1) for own, others in pairs])
        L, failed = torch.linalg.cholesky_ex(S[start:].double().flip(0, 1))
        if failed:
            return None
        U = L.flip(0, 1)  # upper triangular, U Uᵀ = S
        root = U.diagonal()
        d[panel], unit = root.square().to(d), (U / root).to(H.dtype)
        H[:start, panel] = unit_solve(unit, S[:start]) / d[panel]
        H[panel, panel] = unit.triu(1) + H[panel, panel].to(device).tril()
    return d


def unit_solve(A: Tensor, M: Tensor) -> Tensor:
    """Return X with X (A + I)ᵀ = M; of A [K, K] only the part above the diagonal is read."""
    solved: Tensor = torch.linalg.solve_triangular(A.T, M, upper=False, left=False, unitriangular=True)
    return solved


def solve(H: Tensor, d: Tensor, M: Tensor) -> Tensor:
    """Return M H⁻¹ [N, K], for H as `factor` left it; M is overwritten."""
    parts = list(panels(len(H)))
    for part in reversed(parts):
        A, behind = H[part, part.start :].to(M.device), slice(part.stop, None)
        width = A.shape[0]
        M[:, part] = unit_solve(A[:, :width], M[:, part].addmm_(M[:, behind], A[:, width:].T, alpha=-1))
    M /= d
    for part in parts:
        A = H[: part.stop, part].to(M.device)
        rest = M[:, part].addmm_(M[:, : part.start], A[: part.start], alpha=-1)
        M[:, part] = torch.linalg.solve_triangular(A[part.start :], rest, upper=True, left=False, unitriangular=True)
    return M


def times(W: Tensor, D: Tensor) -> Tensor:
    """Return W D [N, K], of W [N, K] and D [K, K], on the device of W."""
    product = torch.empty_like(W)
    for part in panels(len(D)):
        product[:, part] = W @ D[:, part].to(W.device)
    return product
