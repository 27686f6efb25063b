"""Rows `all`: every row that is no padding, as it is."""

import torch


def keep(values: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """(…, d) -> (N, d): the numbered rows of the flattened tensor, all for None. A view where it can be one."""
    flat = values.reshape(-1, values.shape[-1])
    return flat if rows is None else flat.index_select(0, rows)
