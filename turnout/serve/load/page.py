"""The page of a report."""

from turnout.serve.load.report import LoadPoint, LoadReport
from turnout.show.serving import ServingPoint, serving_html

__all__ = ["page"]


def page(report: LoadReport) -> str:
    """The report as html that needs no network.

    Args:
        report: of ``bench``.
    """
    points = [
        ServingPoint(load=one.load, level=one.level, is_open=one.is_open, values=_values(one), errors=one.errors)
        for one in report.points
    ]
    return serving_html(report.model, report.url, report.about, points, report.notes)


def _values(one: LoadPoint) -> dict[str, float]:
    spreads = {"TTFT": one.ttft_s, "ITL": one.itl_s, "TPOT": one.tpot_s, "whole answer": one.e2e_s}
    found = {
        f"{name} {part}, ms": 1000 * getattr(spread, part)
        for name, spread in spreads.items()
        for part in ("median", "mean", "p90", "p99")
    }
    found |= {"tokens/s": one.tokens_per_s, "answers/s": one.requests_per_s}
    found |= {} if one.goodput_per_s is None else {"goodput, answers/s": one.goodput_per_s}
    found |= {"requests": one.sent, "whole answers": one.done, "seconds": one.seconds}
    return found | {"client's processor time, % of a core": 100 * one.client_share}
