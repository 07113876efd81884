"""Many models to one: averaged, weighted by Fisher information, interpolated, added and taken away."""

from turnout.reshape.many_to_one.average import average
from turnout.reshape.many_to_one.fisher import fisher, fisher_information
from turnout.reshape.many_to_one.interpolate import interpolate, interpolation_path
from turnout.reshape.many_to_one.soup import Soup, soup
from turnout.reshape.many_to_one.stragglers import interpolate_sparse, stragglers
from turnout.reshape.many_to_one.task_vectors import task_vectors

__all__ = [
    "Soup",
    "average",
    "fisher",
    "fisher_information",
    "interpolate",
    "interpolate_sparse",
    "interpolation_path",
    "soup",
    "stragglers",
    "task_vectors",
]
