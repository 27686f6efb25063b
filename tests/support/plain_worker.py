"""`python -m tests.support.plain_worker --data-dir=DIR …`: `cola-worker` that knows rows in fp32 and bf16, and nothing
else: what it does not know it refuses.
"""

import cola_worker.expected
import cola_worker.supervisor
from cola_worker.cli import main

KNOWN = ("fp32", "bf16")


if __name__ == "__main__":
    for module in (cola_worker.expected, cola_worker.supervisor):
        module.CODECS = KNOWN  # type: ignore[attr-defined]
        module.REDUCTIONS = ("all",)  # type: ignore[attr-defined]
    main()
