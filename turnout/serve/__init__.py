"""Models behind HTTP: what answers requests, what watches it, and what puts it under load."""

__all__: list[str] = []
