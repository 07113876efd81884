"""Damage of every kind to every kind of folder, and what comes of it: ``python -m tests.fuzz``."""
