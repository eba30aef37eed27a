"""Checks that users can run: our code against recordings of the official research code."""
