"""Annotations of other programs, to COCO-video."""
