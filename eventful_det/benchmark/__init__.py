"""Timing beside peers: things that take turns in one process."""
