"""What server, worker and client agree on."""

__version__ = "0.4.0"
