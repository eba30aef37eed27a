"""Detectors in and out of files: formats recognised by content, read safely, every key accounted for."""
