"""Extra terms of a client's local loss, for many clients at once; all differentiable.

Factors are stacked as in the bank: `B (slots, d_out, rank)`, `A (slots, rank, d_in)`, zero beyond a
slot's own rank, which both terms leave at zero value and zero gradient.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flexlora.federation.state import Penalty

Left = Float[Tensor, "slots d_out rank"]
Right = Float[Tensor, "slots rank d_in"]


def value(
    penalty: Penalty,
    now: tuple[Left, Right],
    sent: tuple[Left, Right],
    scaling: Float[Tensor, " slots"],
    ranks: Int[Tensor, " slots"],
) -> Float[Tensor, " slots"]:
    """The term that a payload asks for at one module, coefficient included; sum it over modules.

    Args:
        penalty: which term.
        now: the factors `(B, A)` as they are being trained.
        sent: the factors that were received, in the same layout.
        scaling: of each slot.
        ranks: of each slot.
    """
    if penalty.name == "prox":
        return penalty.coefficient * prox(now, sent, scaling)
    return penalty.coefficient * tail(*now, ranks, penalty.gamma)


def prox(
    now: tuple[Left, Right], sent: tuple[Left, Right], scaling: Float[Tensor, " slots"]
) -> Float[Tensor, " slots"]:
    """FedProx on the product: `1/2 ||s (B A - B_0 A_0)||_F^2`, from factors only.

    `B A - B_0 A_0 = [B - B_0, B_0] @ [A; A - A_0]`, and the squared norm of a product `L R` is
    `<L^T L, R R^T>`. Every entry of that sum is of second order in the change, so nothing cancels
    in float32, as it would in `||D||^2 - 2 <D, D_0> + ||D_0||^2`. Cost `(d_out + d_in) (2 r)^2`.

    Source: Li et al., MLSys 2020, arXiv 1812.06127, equation 2, there on the parameters.

    >>> B, A, s = torch.ones(1, 2, 1), torch.ones(1, 1, 3), torch.tensor([0.5])
    >>> prox((B, A), (B, A), s).item(), prox((2 * B, A), (B, A), s).item()
    (0.0, 0.75)
    """
    (B, A), (B0, A0) = now, sent
    L, R = torch.cat([B - B0, B0], 2), torch.cat([A, A - A0], 1)
    square: Tensor = ((L.mT @ L) * (R @ R.mT)).sum((1, 2))
    return 0.5 * scaling**2 * square


def tail(B: Left, A: Right, ranks: Int[Tensor, " slots"], gamma: float) -> Float[Tensor, " slots"]:
    """HetLoRA: `||B[:, t:]||_F ||A[t:]||_F` with `t = max(1, floor(gamma r))`.

    Where a norm is zero its gradient is taken as zero, as torch does.

    Source: Cho et al., EMNLP 2024, arXiv 2401.06432, section 4.

    >>> B, A = torch.ones(1, 2, 4), torch.ones(1, 4, 8)
    >>> tail(B, A, torch.tensor([4]), gamma=0.5).item()
    8.0
    """
    first = (gamma * ranks.double()).floor().clamp(min=1)  # float64, as the server has it
    kept = (torch.arange(A.shape[1], device=A.device) >= first[:, None]).to(A.dtype)
    left: Tensor = torch.linalg.vector_norm(B * kept[:, None, :], dim=(1, 2))
    right: Tensor = torch.linalg.vector_norm(A * kept[:, :, None], dim=(1, 2))
    return left * right
