"""`python -m cola_worker` is `cola-worker`."""

from cola_worker.cli import main

main()
