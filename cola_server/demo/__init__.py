"""The torch side of `cola demo`, run as `python -m cola_server.demo`: the client itself stays free of torch."""
