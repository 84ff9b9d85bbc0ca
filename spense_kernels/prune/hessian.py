# SPDX-License-Identifier: Apache-2.0
"""Second moments of a layer's inputs, and the factor that the sweep needs.

H = sum_t w_t x_t x_t^T in float32. Leading batch dimensions are allowed everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spense_kernels.errors import PruneError

_BATCHED = 1024  # columns of the largest H that are factorised several at a time
_GPU_BLOCK = 2048  # the same on a GPU, which smaller products do not fill
_TILE, _PROCESSORS = 128, 132  # what one multiprocessor works on, and how many a large GPU has
_BLOCK = 512  # columns of a block of H: only blocks on or above the diagonal are multiplied
_KEPT_SHARE = 1 / 24  # of a GPU's memory, for Hessians that wait for their use


def accumulate(hessian: Tensor, x: Tensor, weight: Tensor | None = None) -> None:
    """Add sum_t w_t x_t x_t^T to the upper block triangle of `hessian`, in place.

    Args:
        hessian: float32 [K, K]; call `symmetrize` once after the last token.
        x: [T, K], any floating dtype; see `add_product` for how it is multiplied.
        weight: float32 [T] token weights, or None for 1.
    """
    weighted = x if weight is None else x * weight[:, None]  # in float32
    k = x.shape[1]
    block = _GPU_BLOCK if x.is_cuda else _BLOCK
    for a in range(0, k, block):
        b = min(a + block, k)
        add_product(hessian[a:b, a:], weighted[:, a:b], x[:, a:])


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a^T b of a [T, M] and b [T, N], any floating dtype, to float32 `out` [M, N], in place.

    In float32; but where b is bfloat16 on a GPU, on its tensor cores, which take it as it is and
    are ten times as fast: a is then the sum of two bfloat16 parts, exact to 2^-17 of each value.
    """
    if b.is_cuda and b.dtype == torch.bfloat16:
        for part in bfloat16_parts(a):
            _add_product(out, part, b, out_dtype=torch.float32)
    else:
        _add_product(out, a.float(), b.float())


def bfloat16_parts(values: Tensor) -> list[Tensor]:
    """bfloat16 tensors whose sum is `values` up to 2^-17 of each; one where that is exact."""
    high = values.bfloat16()
    if values.dtype == torch.bfloat16:
        return [high]
    return [high, torch.sub(values, high, out=torch.empty_like(high))]


def _add_product(out: Tensor, a: Tensor, b: Tensor, **options) -> None:
    """Where the product is too small to fill a GPU, parts of T are multiplied side by side."""
    parts = _parts(out, len(a))
    if parts > 1:
        a, b = (value.unflatten(0, (parts, -1)) for value in (a, b))
        out += torch.bmm(a.transpose(1, 2), b, **options).sum(dim=0)
    elif options:
        out += torch.mm(a.T, b, **options)
    else:
        out.addmm_(a.T, b)


def _parts(out: Tensor, tokens: int) -> int:
    """How many equal parts of the tokens to multiply side by side, of at least 1024 each."""
    if not out.is_cuda:
        return 1
    tiles = -(-out.shape[0] // _TILE) * -(-out.shape[1] // _TILE)
    most = min(_PROCESSORS // tiles, tokens // 1024)
    return max((parts for parts in range(1, most + 1) if tokens % parts == 0), default=1)


def symmetrize(hessian: Tensor) -> Tensor:
    """Copy the upper triangle below the diagonal, in place."""
    k = hessian.shape[-1]
    for a in range(0, k, _BLOCK):
        b = min(a + _BLOCK, k)
        block = hessian[a:b, a:b].triu()
        hessian[a:b, a:b] = block + block.triu(1).T
        hessian[b:, a:b] = hessian[a:b, b:].T
    return hessian


class Shelf:
    """Where Hessians wait: on the GPU they were made on while few bytes do, else on the CPU.

    Ways to the CPU and back take longer than many a small Hessian.
    """

    def __init__(self, device):
        self._room = 0.0
        if torch.device(device).type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
            self._room = _KEPT_SHARE * memory

    def put(self, hessian: Tensor) -> Tensor:
        """The Hessian, or a copy on the CPU."""
        size = hessian.numel() * hessian.element_size()
        if size > self._room:
            return hessian.cpu()
        self._room -= size
        return hessian


def check_finite(hessian: Tensor, name: str) -> None:
    """Raise PruneError naming the projection whose inputs had NaN or Inf."""
    if not bool(torch.isfinite(hessian.diagonal()).all()):
        raise PruneError(f"prune: the calibration input of {name} has NaN or Inf")


def token_weights(y: Tensor) -> Tensor:
    """float32 [T]: 1 / mean(y_t^2), what a following RMSNorm does to a token's error.

    Rows of zeros get weight 0: the norm amplifies them without bound, and they carry nothing.
    """
    energy = y.float().square().mean(dim=-1)
    return torch.where(energy > 0, 1.0 / energy.clamp_min(torch.finfo(torch.float32).tiny), 0.0)


def dead_inputs(hessian: Tensor) -> Tensor:
    """bool [..., K]: inputs that were zero in every calibration token."""
    return hessian.diagonal(dim1=-2, dim2=-1) <= 0


def damp(hessian: Tensor, damping: float) -> Tensor:
    """H with 1 at dead inputs and damping * mean(diag H) added to the diagonal (a copy).

    The mean is over live inputs.
    """
    out = hessian.clone()
    diagonal = out.diagonal(dim1=-2, dim2=-1)
    dead = dead_inputs(hessian)
    live = (~dead).sum(dim=-1).clamp_min(1)
    mean = (diagonal.clamp_min(0).sum(dim=-1) / live)[..., None]
    diagonal.copy_(torch.where(dead, torch.where(mean > 0, mean, 1.0), diagonal + damping * mean))
    return out


def cholesky(matrix: Tensor) -> Tensor:
    """Lower factors of [..., K, K]; large ones one by one, for batched routines are for small ones.

    Raises torch.linalg.LinAlgError where one is not positive definite.
    """
    if matrix.dim() == 3 and len(matrix) > 1 and matrix.shape[-1] > _BATCHED:
        return torch.stack([torch.linalg.cholesky(one) for one in matrix])
    return torch.linalg.cholesky(matrix)


def checked_cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Factors as `cholesky` gives them of [B, K, K], and bool [B]: which are factors at all.

    Nothing is raised and no device waited for.
    """
    if len(matrix) > 1 and matrix.shape[-1] > _BATCHED:
        pairs = [torch.linalg.cholesky_ex(one) for one in matrix]
        factor, info = (torch.stack(values) for values in zip(*pairs, strict=True))
    else:
        factor, info = torch.linalg.cholesky_ex(matrix)
    finite = torch.isfinite(factor.diagonal(dim1=-2, dim2=-1)).all(dim=-1)
    return factor, (info == 0) & finite


def unit_diagonal(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """D^-1/2 A D^-1/2 of A [B, K, K] with the diagonal D, and D^1/2 [B, 1, K]."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    root = diagonal.clamp_min(torch.finfo(torch.float32).tiny).sqrt()[:, None]
    return matrix / root / root.transpose(1, 2), root


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U with H^-1 = U^T U, for damped H [..., K, K].

    With J the reversal of rows: J H J = L L^T gives U = J L^-1 J, so that row j of U describes how
    an error at column j spreads to the columns after it.

    Raises torch.linalg.LinAlgError when H is not positive definite in float32.
    """
    lower = cholesky(hessian.flip(-1, -2))
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return inverse.flip(-1, -2)


def damped_factor(
    hessian: Tensor, damping: float, where: str = "matrix", attempts: int = 5
) -> tuple[Tensor, Tensor, float]:
    """Damped H, its inverse factor and the damping that made it positive definite.

    The damping is raised tenfold, up to `attempts` times, when the factorisation fails; the
    caller records it. Raises PruneError naming `where` when that does not help either.
    """
    for _ in range(attempts):
        damped = damp(hessian, damping)
        try:
            factor = inverse_factor(damped)
            if torch.isfinite(factor).all():
                return damped, factor, damping
        except torch.linalg.LinAlgError:
            pass
        damping *= 10.0
    raise PruneError(f"prune: {where}: H stays singular with damping {damping / 10.0:g}")


def damped_factors(hessian: Tensor, damping: float, names: list[str]) -> tuple[Tensor, list[float]]:
    """Inverse factors float32 [B, K, K] of H [B, K, K], and the damping of each.

    All at once; one by one, as `damped_factor` does it, when one of them needs more damping.
    """
    try:
        factor = inverse_factor(damp(hessian, damping))
        if bool(torch.isfinite(factor).all()):
            return factor, [damping] * len(names)
    except torch.linalg.LinAlgError:
        pass
    found = [damped_factor(h, damping, name) for h, name in zip(hessian, names, strict=True)]
    return torch.stack([factor for _, factor, _ in found]), [used for *_, used in found]


def permuted(hessian: Tensor, order: Tensor) -> Tensor:
    """H with rows and columns in `order` (int [K])."""
    return hessian.index_select(-2, order).index_select(-1, order)


def shrunk(hessian: Tensor, share: float) -> Tensor:
    """(1 - share) H + share diag(H): covariances of few tokens are partly chance."""
    if share == 0.0:
        return hessian
    out = hessian * (1.0 - share)
    out.diagonal(dim1=-2, dim2=-1).copy_(hessian.diagonal(dim1=-2, dim2=-1))
    return out
