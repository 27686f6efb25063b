"""The adapter interface: one family at one site, without state. Parameters are passed in, so that server and worker
share the code and a job's bits never depend on where they are computed.

Legend: N rows, D = d_in, O = d_out. s is the scale; forward and VJP include it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

Parameters = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Cost:
    """What a shard costs: FLOPs of forward and VJP for N rows; bytes of fp32 parameters."""

    forward_flops: int
    vjp_flops: int
    parameter_bytes: int


class Adapter(ABC):
    """f_w at one site; subclasses are final."""

    linear_in_x: bool
    """Whether `delta_weight` exists."""
    replaces: bool = False
    """Whether the output takes the place of the module's own instead of adding to it."""

    def __init__(self, d_in: int, d_out: int) -> None:
        self.d_in = d_in
        self.d_out = d_out

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters, in the order in which they are sent and digested."""

    @abstractmethod
    def initial(self, seed: int, site: str) -> Parameters:
        """Fresh fp32 parameters on the CPU; a function of (seed, site) and the shapes alone. f_w(x) = 0 for all x,
        but for a head.
        """

    @abstractmethod
    def forward(self, parameters: Parameters, x: torch.Tensor) -> torch.Tensor:
        """s·f_w(x): (…, D) -> (…, O), in x's dtype and memory of its own. Autograd goes through it, for tests."""

    @abstractmethod
    def pull(self, parameters: Parameters, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """The gradient in x, (…, D) in x's dtype, of a loss whose gradient at the site's output is g (…, O)."""

    @abstractmethod
    def vjp(self, parameters: Parameters, x_ND: torch.Tensor, g_NO: torch.Tensor) -> Parameters:
        """The gradient in the parameters of a loss whose gradient at the site's output is g, summed over rows."""

    @abstractmethod
    def delta_weight(self, parameters: Parameters) -> torch.Tensor:
        """s·∂f/∂x as an O×D matrix, for `linear_in_x`. Raises: `ColaError(NOT_MERGEABLE)`."""

    @abstractmethod
    def cost(self, rows: int) -> Cost:
        """What `rows` rows cost."""
