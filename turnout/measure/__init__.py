"""Meters: what a decision costs, how even it is, how well the network does, and whether two are the same."""

from typing import TYPE_CHECKING

from turnout import moved
from turnout.measure.block_costs import fit_block_costs, fit_slowed
from turnout.measure.certificate import Certificate, weights_digest
from turnout.measure.certify import certify
from turnout.measure.cost import count_flops, count_params
from turnout.measure.crowd import crowd_load
from turnout.measure.differences import Difference, paired_differences
from turnout.measure.evaluate import Evaluation, bits_per_byte
from turnout.measure.hardware import hardware
from turnout.measure.isolation import Finding, Isolation, audit
from turnout.measure.load import coefficient_of_variation, dead_experts, dropped_share, entropy, load_report, max_vio
from turnout.measure.passage import Passage
from turnout.measure.placement import placement_report
from turnout.measure.report import compare, markdown, quantity, results_rows, results_table
from turnout.measure.runs import ReportData, RunData, read_run
from turnout.measure.scaling import ScalingPoint, points_of_runs, points_of_table
from turnout.measure.sharpness import layers_of, sharpness
from turnout.measure.simulate import calibrated, simulate
from turnout.measure.simulate_block import BlockTimes, simulate_block
from turnout.measure.specialisation import layer_affinity, routing_kept, specialisation

__all__ = [
    "BlockTimes",
    "Certificate",
    "Difference",
    "Evaluation",
    "Finding",
    "Isolation",
    "Passage",
    "ReportData",
    "RunData",
    "ScalingPoint",
    "audit",
    "bits_per_byte",
    "calibrated",
    "certify",
    "coefficient_of_variation",
    "compare",
    "count_flops",
    "count_params",
    "crowd_load",
    "dead_experts",
    "dropped_share",
    "entropy",
    "fit_block_costs",
    "fit_slowed",
    "hardware",
    "layer_affinity",
    "layers_of",
    "load_report",
    "markdown",
    "max_vio",
    "paired_differences",
    "placement_report",
    "points_of_runs",
    "points_of_table",
    "quantity",
    "read_run",
    "results_rows",
    "results_table",
    "routing_kept",
    "sharpness",
    "simulate",
    "simulate_block",
    "specialisation",
    "weights_digest",
]


if not TYPE_CHECKING:  # a checker would take every name for there

    def __getattr__(name: str) -> object:
        return moved.name("turnout.measure", name)
