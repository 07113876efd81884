"""Claims of the family ``serve``, not listed yet: their published seeds run once, when all of them were attacked."""

__all__: list[str] = []
