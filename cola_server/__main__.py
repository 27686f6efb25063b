"""`python -m cola_server` is `cola-server`."""

from cola_server.cli import main

main()
