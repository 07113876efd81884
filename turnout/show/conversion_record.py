"""What a conversion's run.json must hold for its page to be drawn, checked before anything is drawn."""

from collections.abc import Mapping
from typing import Any

from turnout.reading import Refuse, check_fields
from turnout.show.stock import check_stock

__all__ = ["check_record"]

_RECORD: dict[str, Any] = {
    "source": str,
    "plan": list[dict],
    "steps": list[dict],
    "held_out": dict | None,
    "hardware": dict | None,
    "command": str | None,
    "stock": dict | None,
    "seq": int | None,
}
_ROW: dict[str, Any] = {"name": str, "config": dict, "params": int, "params_active": int, "memory_bytes": int}
_ROW["flops"] = float
_MOE: dict[str, Any] = {"num_experts": int, "top_k": int, "hidden": int, "distinct": list[int] | None}
_REPORT: dict[str, Any] = {"title": str, "values": dict, "notes": list[str] | None}
_MEASURED: dict[str, Any] = {"bits_per_byte": float, "layers": list[int], "load": list[list[float]]}
# Values of reports that are drawn, layer by layer; others are written out as they are.
_BY_LAYER = {
    "leader": dict[str, list[int]],
    "kept": dict[str, list[int]],
    "scores": dict[str, list[float]],
    "frequency": dict[str, list[float]],
}


def check_record(record: Mapping[str, Any], refuse: Refuse) -> None:
    """Refuses a record that ``turnout convert`` did not write.

    Raises:
        TurnoutError: says which field is what; what ``refuse`` words.

    >>> from turnout.errors import CheckpointError
    >>> check_record({"source": "big", "plan": [], "steps": 3}, CheckpointError)
    Traceback (most recent call last):
    turnout.errors.CheckpointError: 'steps' is 3, which must be list[dict]

    Source: none; plain bookkeeping.
    """
    check_fields(record, _RECORD, refuse)
    if len(record["plan"]) != len(record["steps"]) + 1:
        raise refuse(f"{len(record['steps'])} steps and {len(record['plan'])} lines of the plan")
    for row in record["plan"]:
        check_fields(row, _ROW, refuse)
        check_fields(row["config"], {"moe": dict | None}, refuse)
        check_fields(row["config"].get("moe") or {}, _MOE if row["config"].get("moe") else {}, refuse)
    for step in record["steps"]:
        check_fields(step, {"step": str, "report": dict}, refuse)
        check_fields(step["report"], _REPORT, refuse)
        _check_values(step["report"]["values"], refuse)
    if record.get("stock"):
        check_stock(record["stock"], refuse)
    if held := record.get("held_out"):
        check_fields(held, {"bytes": int, "before": dict, "after": dict}, refuse)
        for when in ("before", "after"):
            check_fields(held[when], _MEASURED, refuse)
            if len(held[when]["layers"]) != len(held[when]["load"]) or not all(held[when]["load"]):
                raise refuse(f"loads of {len(held[when]['load'])} layers, with {len(held[when]['layers'])} numbers")


def _check_values(values: Mapping[str, Any], refuse: Refuse) -> None:
    pairs = [name for name in values if f"{name.removesuffix('_before')}_after" in values and name.endswith("_before")]
    numbers = [*pairs, *(f"{name.removesuffix('_before')}_after" for name in pairs)]
    check_fields(values, dict.fromkeys(numbers, float), refuse)
    # "kept" may also be a number of the whole model.
    drawn = {name: kind for name, kind in _BY_LAYER.items() if name in values}
    drawn |= {"kept": _BY_LAYER["kept"] | int | float | None} if "kept" in values else {}
    check_fields(values, drawn, refuse)
    weight = values.get("scores") or values.get("frequency") or {}
    for name in ("leader", "kept"):
        for layer, ids in (values[name] if isinstance(values.get(name), dict) else {}).items():
            many = len(weight[layer]) if layer in weight else max(ids, default=0) + 1
            if (
                not ids
                or min(ids) < 0
                or max(ids) >= many
                or (name == "leader" and layer in weight and len(ids) != many)
            ):
                raise refuse(f"{name!r} of layer {layer} is {ids!r:.80}, of {many} experts")
            if not layer.isdecimal():
                raise refuse(f"{name!r} of a layer {layer!r:.40}")
