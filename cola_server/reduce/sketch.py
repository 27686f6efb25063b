"""Rows `sketch`: k pseudo-rows (x̃, g̃) in place of N rows (x, g), with nearly the same gᵀx. For adapters linear in x.

The gradient of such an adapter depends on its rows through M = Gᵀ X (O×D) alone: it is s·M for `linear`, and for `lora`
s·Bᵀ M and s·M Aᵀ. So any pair with G̃ᵀ X̃ ≈ M will do; the VJP does not know the difference, and the adapter's parameters
are not needed here.

**A basis of M's rows.** With P (D×k), PᵀP = 1, take

    X̃ = Pᵀ (k×D)        G̃ = (X P)ᵀ G (k×O)        so that   G̃ᵀ X̃ = M P Pᵀ

The best P are the first k right singular vectors of M. A randomized range finder with one power iteration comes close
(Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithm 4.4 for Mᵀ and q = 1). With Ω (O×k) Gaussian:

    Y = orth(Mᵀ Ω)      Z = orth(M Y)      P = orth(Mᵀ Z)

orth is a QR factorization: without those in between, what is smaller than 0.4 % of the largest singular value is lost
to fp32. M is never formed: M Y = Gᵀ(X Y) and Mᵀ Z = Xᵀ(G Z), 8·N·k·(D + O) flops in all, the last X P and G̃ included.

**How close.** M has rank ≤ k: exact, up to rounding. Else, with r + p = k and p ≥ 2, theorem 10.5 promises already
without the power iteration an expected ‖M - M P Pᵀ‖ ≤ (1 + r/(p - 1))^½ · (what rank r must leave) in the Frobenius
norm. With it, the error stayed below 1.15 times what rank k must leave in the mean over 40 Ω, on spectra from flat to
0.8ʲ, and below 2.2 times in the worst case met (a spectrum of 0.5ʲ).

**Sites that share x** (q, k, v; gate, up) share P: M is then the stack of their G_iᵀ X, and X̃ is sent once. That takes
k·(D + ΣO) numbers; a P of its own for each site takes k·(nD + ΣO). In the same number of bytes as the one for all with
k = 64, own ones (k = 37 for q, k, v) were less exact where it counts: cosines with the true gradient on SmolLM2-135M,
1,024 rows of real text, mean over five layers, q 0.989 against 0.992, gate 0.929 against 0.935, up 0.945 against 0.949,
k 0.993 against 0.992, v 0.997 both. Each G_i is divided by its norm before P is sought: the gradient of v is
many times that of q, which without that came to 0.987. (The division does not reach G̃.)

Legend: N rows, D = d_in, O = d_out of one site or of all in the stack, k pseudo-rows.
"""

from collections.abc import Sequence

import torch

from cola_common.adapters import Adapter


def valid_for(adapter: Adapter) -> str | None:
    """None, or why this adapter's rows cannot be reduced so."""
    if adapter.linear_in_x:
        return None
    return "it keeps gᵀx, and only of adapters linear in x, lora and linear, is that all there is to the gradient"


PROBES = 16
"""Random directions by which a sketch's error is estimated; that of its square is right within a third or so."""


def pseudo_rows(
    x_ND: torch.Tensor, gs: Sequence[torch.Tensor], *, k: int, seed: int, max_error: float | None = None
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """x̃ and each site's g̃: at most k rows, fp32, where x is. `gs` (N×O each) are those of all sites that share x.

    Up to k rows go as they are, and so do all of them where `error` finds the sketch further off than `max_error`.
    Everything must be finite. Ω follows from `seed` (0 ≤ seed < 2⁶³) and the widths alone: make it of the job's seed,
    the batch, the group and the call. The order of the rows shows in rounding only.
    """
    assert k > 0
    if len(x_ND) <= k:
        return x_ND, tuple(gs)
    x_ND = x_ND.to(torch.float32)
    gs = [g_NO.to(torch.float32) for g_NO in gs]
    basis_Dk = _basis(x_ND, torch.cat([_at_norm_1(g_NO) for g_NO in gs], dim=1), k, seed)
    if max_error is not None and error(x_ND, gs, basis_Dk, seed=seed) > max_error:
        return x_ND, tuple(gs)
    thin_kN = (x_ND @ basis_Dk).T
    return basis_Dk.T.contiguous(), tuple(thin_kN @ g_NO for g_NO in gs)


def error(x_ND: torch.Tensor, gs: Sequence[torch.Tensor], basis_Dk: torch.Tensor, *, seed: int) -> float:
    """An estimate of ‖M - M P Pᵀ‖ / ‖M‖, for all sites together, without M.

    For ω with independent entries of mean 0 and variance 1 the expectation of ‖Mᵀω‖² is ‖M‖² (Hutchinson 1990), and
    that of ‖(1 - P Pᵀ) Mᵀω‖² the square of what P leaves: the quotient of the two sums over `PROBES` of them.
    """
    generator = torch.Generator().manual_seed(seed ^ 1)  # others than the basis was made with
    seen_Dp = x_ND.new_zeros(x_ND.shape[1], PROBES)
    for g_NO in gs:
        omega_Op = torch.randn(g_NO.shape[1], PROBES, generator=generator).to(g_NO.device)
        seen_Dp += x_ND.T @ (g_NO @ omega_Op)
    left_Dp = seen_Dp - basis_Dk @ (basis_Dk.T @ seen_Dp)
    whole = float(torch.linalg.vector_norm(seen_Dp, dtype=torch.float64))
    return float(torch.linalg.vector_norm(left_Dp, dtype=torch.float64)) / whole if whole > 0 else 0.0


def _basis(x_ND: torch.Tensor, g_NO: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    """P, of fewer than k columns where D or O is less."""
    columns = min(k, x_ND.shape[1], g_NO.shape[1])
    # Drawn on the CPU: the same numbers whatever the device.
    omega_Ok = torch.randn(g_NO.shape[1], columns, generator=torch.Generator().manual_seed(seed)).to(g_NO.device)
    y_Dk = _orthonormal(x_ND.T @ (g_NO @ omega_Ok))
    z_Ok = _orthonormal(g_NO.T @ (x_ND @ y_Dk))
    return _orthonormal(x_ND.T @ (g_NO @ z_Ok))


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    basis: torch.Tensor = torch.linalg.qr(columns).Q
    return basis


def _at_norm_1(g_NO: torch.Tensor) -> torch.Tensor:
    # In fp64, as the squares of small gradients are no fp32 numbers.
    norm = torch.linalg.vector_norm(g_NO, dtype=torch.float64)
    factor = torch.where(norm > 0, 1 / norm, 0.0).clamp(max=torch.finfo(torch.float32).max)
    return g_NO * factor.to(torch.float32)
