"""Token gating: the idea, in torch only. Knows tokens, not images, boxes or files."""
