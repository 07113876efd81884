"""Measurements of speed, repeatable by anyone: ``python -m benchmarks.moe_layer``."""
