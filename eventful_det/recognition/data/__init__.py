"""Labelled clips, and where their frames come from."""
