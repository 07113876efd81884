"""Complete runs as Python functions, chosen by name on the command line; each returns a frozen Run."""

from turnout.errors import nearest
from turnout.recipes.pyramid import pyramid, pyramid_student
from turnout.recipes.run import Run
from turnout.recipes.tiny import tiny, tiny_dense

__all__ = ["pyramid", "pyramid_student", "tiny", "tiny_dense"]


def find(name: str) -> Run:
    """The run that the recipe of this name makes.

    Raises:
        UnknownNameError: there is no such recipe; the nearest is offered.
    """
    if name not in __all__:
        raise nearest(name, __all__, kind="recipe", where="turnout train")
    return globals()[name]()
