"""Boxes between key frames: when the network runs again, and how they move until then."""
