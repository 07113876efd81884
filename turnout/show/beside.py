"""Conversions and choices of adapters on a page with others: side by side in one table, then each by itself."""

from collections.abc import Sequence
from html import escape
from typing import TypeAlias

from turnout.measure.report import quantity
from turnout.show.adaptation import AdaptationData, adaptation_headline, adaptation_sections
from turnout.show.conversion import ConversionData, conversion_headline, conversion_sections, most_experts
from turnout.show.page import missing, table
from turnout.show.stock import stock_loads

__all__ = ["Other", "beside", "colours", "title_of"]

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


def colours(one: Other) -> int:
    """How many experts or adapters it draws."""
    return most_experts(one) if isinstance(one, ConversionData) else len(one.record["adapters"])


def title_of(one: Other) -> str:
    """What was made of what."""
    return f"{one.source if isinstance(one, ConversionData) else one.base} → {one.name}"


def _side_by_side(found: Sequence[ConversionData]) -> str:
    lines = {
        "made of": [one.source for one in found],
        "steps": [", ".join(step["step"] for step in one.record["steps"]) or "another format" for one in found],
        "parameters": [_moved(one, "params") for one in found],
        "active parameters": [_moved(one, "params_active") for one in found],
        "memory of weights": [_moved(one, "memory_bytes", "B") for one in found],
        "FLOPs a token": [_moved(one, "flops") for one in found],
        "computes the same": [one.certificate.verdict if one.certificate else "no certificate" for one in found],
        "largest relative difference": [_apart(one) for one in found],
        "transformers": [_stock(one) for one in found],
        "bits per byte on its held-out text": [_bits(one) for one in found],
    }
    head = "".join(f"<th>{escape(one.name)}</th>" for one in found)
    grid = table([[name, *cells] for name, cells in lines.items()], head) if found else missing("Nothing.")
    about = (
        "Each number before and after. Every conversion was measured on the text that it was given itself, so bits per "
        "byte compare within a column, and the columns are not ranked."
    )
    title = f'<h2>Conversions side by side</h2><p class="about">{about}</p>'
    return f'<section>{title}<div class="card">{grid}</div></section>'


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
