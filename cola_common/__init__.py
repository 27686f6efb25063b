"""What server, worker and client agree on."""

__version__ = "0.2.0"
