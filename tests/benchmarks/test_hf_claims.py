"""README and guide say of adopted models what the committed pages measured, on every processor that has one."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from benchmarks import hf_claims


def test_readme_and_guide_say_what_the_pages_measured():
    for path, new in ((hf_claims.README, hf_claims.sentence), (hf_claims.GUIDE, hf_claims.table)):
        text = path.read_text(encoding="utf-8")
        assert hf_claims.into(text, new(hf_claims.found())) == text, "run python -m benchmarks.hf_claims"
    with pytest.raises(SystemExit, match="no section"):
        hf_claims.into("nothing here", "new")


def page(folder: Path, stem: str, processor: str | None, **turnout: float) -> None:
    about = {} if processor is None else {"processor": processor}
    cases = [
        {"model": model, "dtype": "fp32", "job": "decoding",
         "seconds": {"eager": [[3.0, 9.0]], "grouped_mm": [[2.0, 9.0]], "turnout": [[took, 1.0]]}}
        for model, took in turnout.items()
    ]  # fmt: skip
    (folder / f"{stem}.json").write_text(json.dumps({"about": about, "cases": cases}), encoding="utf-8")


def test_the_newest_page_of_a_processor_counts_and_all_processors_are_named(tmp_path: Path):
    page(tmp_path, "hf_models-2026-11-21", None, Mixtral=1.0, Qwen3Moe=1.6)
    page(tmp_path, "hf_models-decoding-2026-11-21", None, Mixtral=0.5)
    page(tmp_path, "hf_models-2026-12-01", "AMD EPYC (AuthenticAMD 25 AVX512, model 17)", Mixtral=2.5, Qwen3Moe=4.0)
    page(tmp_path, "hf_models-2026-12-02", "Some CPU (Intel 6)", Mixtral=1.0)
    found = hf_claims.found(tmp_path)
    assert found["AMD Zen 5", "fp32", "decoding", "Mixtral"] == (4.0, "hf_models-decoding-2026-11-21")
    said = hf_claims.sentence(found)
    assert "- AMD Zen 5: fp32 decoding 1.25 to 4.00" in said and "- AMD Zen 4: fp32 decoding 0.50 to 0.80" in said
    assert "- Some CPU (Intel 6): fp32 decoding 2.00" in said
    shown = hf_claims.table(found, tmp_path)
    assert "| AMD Zen 5 | fp32 | decoding | 4.00 | 1.25 |" in shown and "| 2.00 |  |" in shown
    assert "[AMD Zen 4, 2026-12-01](" in shown
