"""Channels, limits with their reasons, tokens, status translation, and the duplex stream."""
