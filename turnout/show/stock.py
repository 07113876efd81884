"""What transformers itself said when it loaded what a conversion had written, as words and as a section of its page."""

from collections.abc import Mapping
from html import escape
from typing import Any

from turnout.reading import Refuse, check_fields
from turnout.show.page import card, missing, section, table

__all__ = ["check_stock", "stock_loads", "stock_section"]


def check_stock(found: Mapping[str, Any], refuse: Refuse) -> None:
    """Refuses a record that ``turnout convert`` did not write.

    Raises:
        TurnoutError: says which field is what; what ``refuse`` words.
    """
    check_fields(found, {"version": str | None, "dtypes": dict[str, dict], "skipped": list[str]}, refuse)
    for gap in found["dtypes"].values():
        check_fields(gap, {"max_abs": float, "relative": float}, refuse)


def stock_loads(found: Mapping[str, Any] | None) -> str:
    """That transformers loads it, for a headline; empty where it was not asked.

    >>> stock_loads({"version": "5.1.0", "dtypes": {"float32": {"max_abs": 0.0, "relative": 0.0}}, "skipped": []})
    'transformers 5.1.0 loads it and computes the same'

    Source: none; plain words.
    """
    return f"transformers {found['version']} loads it and computes the same" if found and found["dtypes"] else ""


def stock_section(found: Mapping[str, Any] | None) -> str:
    """How far the logits of transformers' own model are from ours, by dtype, and what was not checked."""
    title = "What does transformers say?"
    if found is None:
        why = (
            "It was not asked: this folder is in turnout's own format, its input's logits are not finite, or it was "
            "written before transformers was asked."
        )
        return section(title, "", [], why)
    skipped = [f"Not checked: {one}." for one in found["skipped"]]
    notes = "".join(f'<p class="small">{escape(note)}</p>' for note in skipped)
    if not found["dtypes"]:
        return f"<section><h2>{title}</h2>{missing(' '.join(skipped) or 'Nothing was compared.')}</section>"
    head = "<th>largest difference of a logit</th><th>relative, mean over tokens</th>"
    rows = [[name, f"{gap['max_abs']:.3g}", f"{gap['relative']:.3g}"] for name, gap in found["dtypes"].items()]
    about = (
        "What was written was loaded with AutoModelForCausalLM, whole and with nothing left over, and gave the logits "
        "that it gives here: within 1e-4 in fp32; in half precision, where no two programs agree, not much further "
        "from fp32 than here."
    )
    inside = card(f"transformers {found['version']}", "against turnout", table(rows, head) + notes)
    return section(title, about, [inside], "")
