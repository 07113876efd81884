"""Claims of the family ``scale``: systems that train and place sparse models on many devices."""

__all__: list[str] = []
