"""Conversions and choices of adapters on a page with others: side by side in one table, then each by itself."""

from collections.abc import Sequence
from html import escape
from typing import TypeAlias

from turnout.measure.report import quantity
from turnout.show.adaptation import AdaptationData, adaptation_headline, adaptation_sections
from turnout.show.conversion import (
    ConversionData,
    conversion_headline,
    conversion_sections,
    conversion_size,
    flops_label,
    most_experts,
)
from turnout.show.page import missing, table
from turnout.show.stock import stock_loads

__all__ = ["Other", "beside", "beside_headline", "colours", "title_of"]

_SAID = 3  # conversions of which a heading has room to say more than their number

Other: TypeAlias = "ConversionData | AdaptationData"


def beside(others: Sequence[Other]) -> list[str]:
    """The sections: one table of all conversions, then what a page of its own would show of each.

    Source: none; plain bookkeeping.
    """
    conversions = [one for one in others if isinstance(one, ConversionData)]
    sections = [_side_by_side(conversions)] if len(conversions) > 1 else []
    for one in others:
        conversion = isinstance(one, ConversionData)
        said = conversion_headline(one) if isinstance(one, ConversionData) else adaptation_headline(one)
        inside = conversion_sections(one) if isinstance(one, ConversionData) else adaptation_sections(one)
        kind = "a conversion" if conversion else "a choice of adapters"
        sections.append(
            f'<section><p class="eyebrow">{kind}</p><h2>{escape(title_of(one))}</h2>'
            f'<p class="about">{escape(said)}.</p></section>'
        )
        sections += inside
    return sections


def beside_headline(others: Sequence[Other]) -> str:
    """What came about, where few conversions stand alone; else how many there are.

    Source: none; plain words.
    """
    found = [one for one in others if isinstance(one, ConversionData)]
    if len(found) == len(others) <= _SAID:
        return "; ".join(f"{one.name} has {conversion_size(one)} against {one.source}" for one in found)
    return f"{len(others)} model{'s' if len(others) > 1 else ''} made of others"


def colours(one: Other) -> int:
    """How many experts or adapters it draws."""
    return most_experts(one) if isinstance(one, ConversionData) else len(one.record["adapters"])


def title_of(one: Other) -> str:
    """What was made of what."""
    return f"{one.source if isinstance(one, ConversionData) else one.base} → {one.name}"


def _side_by_side(found: Sequence[ConversionData]) -> str:
    labels = {flops_label(one) for one in found}
    lines = {
        "made of": [one.source for one in found],
        "steps": [", ".join(step["step"] for step in one.record["steps"]) or "another format" for one in found],
        "parameters": [_moved(one, "params") for one in found],
        "active parameters": [_moved(one, "params_active") for one in found],
        "memory of weights": [_moved(one, "memory_bytes", "B") for one in found],
        labels.pop() if len(labels) == 1 else "FLOPs a token": [_moved(one, "flops") for one in found],
        "computes the same": [one.certificate.verdict if one.certificate else "no certificate" for one in found],
        "largest relative difference": [_apart(one) for one in found],
        "transformers": [_stock(one) for one in found],
        "bits per byte on its held-out text": [_bits(one) for one in found],
    }
    head = "".join(f"<th>{escape(one.name)}</th>" for one in found)
    grid = table([[name, *cells] for name, cells in lines.items()], head) if found else missing("Nothing.")
    about = "Each number before and after. "
    if _one_text(found):
        about += "All are of one model and were measured on the same text: lower bits per byte are better."
    else:
        about += (
            "Every conversion was measured on the text that it was given itself, so bits per byte compare within a "
            "column, and the columns are not ranked."
        )
    title = f'<h2>Conversions side by side</h2><p class="about">{about}</p>'
    return f'<section>{title}<div class="card">{grid}</div></section>'


def _one_text(found: Sequence[ConversionData]) -> bool:
    """Whether all began with one model, and found the same of it on as many bytes of the same text."""
    if not all(one.held_out for one in found):
        return False
    given = [(one.record["source"], one.record.get("calibration"), one.held_out["bytes"]) for one in found]
    before = {one.held_out["before"]["bits_per_byte"] for one in found}
    return len(before) == 1 and all(one == given[0] and one[1] for one in given)


def _moved(one: ConversionData, key: str, unit: str = "") -> str:
    first, last = one.rows[0][key], one.rows[-1][key]
    return f"{quantity(first)}{unit} → {quantity(last)}{unit}"


def _apart(one: ConversionData) -> str:
    relative = one.certificate.logits.relative if one.certificate else None
    return "–" if one.certificate is None else "not finite" if relative is None else f"{relative:.3g}"


def _stock(one: ConversionData) -> str:
    found = one.record.get("stock")
    return stock_loads(found) or ("not asked" if found is None else f"not checked: {', '.join(found['skipped'])}")


def _bits(one: ConversionData) -> str:
    if not one.held_out:
        return "not measured"
    return " → ".join(f"{one.held_out[when]['bits_per_byte']:.3f}" for when in ("before", "after"))
