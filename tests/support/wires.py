"""Wire plans for tests: all rows in fp32 unless told otherwise."""

from cola_common.jobs import Codec, Rows, WirePlan


def wire(
    rows: Rows = "all",
    values: Codec = "fp32",
    deltas: Codec = "fp32",
    *,
    sketch_rows: int = 0,
    max_error: float = 0.0,
) -> WirePlan:
    """As a job would name it."""
    return WirePlan(
        rows=rows,
        values=values,
        deltas=deltas,
        sketch_rows=sketch_rows,
        max_error=max_error,
        error=0.0,
        reason="for a test",
    )
