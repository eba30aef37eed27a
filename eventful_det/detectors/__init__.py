"""What detectors of all kinds have in common."""
