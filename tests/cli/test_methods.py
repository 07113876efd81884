"""``turnout methods``: every room's methods, one in full, and nothing that is no method."""

import importlib
import inspect
import json
import os
import subprocess
import sys

import pytest

import catalogue
from house import ROOT, Module, read
from turnout import claims
from turnout.cli.main import main
from turnout.cli.methods import CATALOGUE

FOUND = json.loads(CATALOGUE.read_text(encoding="utf-8"))


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["methods", *arguments]) == 0
    return capsys.readouterr().out


def test_every_room_and_floor_is_there(capsys):
    text = said(capsys)
    rooms = "decide.token run paths layers models train train.adapters train.federated measure solve".split()
    floors = [f"reshape.{floor}" for floor in ("live", "to_sparse", "to_smaller", "many_to_one", "adapters")]
    assert {f"\n{room}: " in f"\n{text}" for room in (*rooms, *floors)} == {True}
    for name in ("upcycle", "LossFree", "merge_experts", "adopt", "train_gates", "densify", "certify"):
        assert f"  {name} " in text
    for noun in ("EXECUTORS", "dict()", "plain bookkeeping", "LMConfig", "TrainResult", "read_adapter", "none;"):
        assert noun not in text


def test_a_room_or_a_floor_alone(capsys):
    sparse = said(capsys, "--room", "reshape.to_sparse")
    assert "upcycle" in sparse and "merge_experts" not in sparse
    assert sparse.splitlines()[0] in said(capsys, "--room", "reshape")
    assert "Hungarian" in said(capsys, "--room", "turnout.solve")
    assert main(["methods", "--room", "reshpe"]) == 2
    assert "Did you mean 'reshape'?" in capsys.readouterr().err


def test_a_part_is_looked_for_in_names_lines_and_papers(capsys):
    assert {"SMEAR", "PHATGOOSE"} <= set(said(capsys, "muqeeth").split())
    assert "LossFree " in said(capsys, "auxiliary-loss")
    assert main(["methods", "lossfre", "--room", "run"]) == 2


def test_what_a_listing_or_a_guide_calls_by_its_claim_or_its_file_is_found(capsys):
    """A claim's name that the list prints itself was an unknown method, with an unlike one offered in its place."""
    for claim in FOUND["claims"]:
        text = said(capsys, claim)
        assert claim in text or claim.replace("_", "") in text.lower().replace("_", ""), claim
    assert "gather" in said(capsys, "zero_plus_plus") and "OneByte" in said(capsys, "train.zeroth.one_byte")


@pytest.mark.parametrize("method", FOUND["methods"], ids=lambda method: method["name"])
def test_one_in_full_is_what_python_says(method, capsys):
    item = getattr(importlib.import_module(method["import_from"]), method["name"])
    text = said(capsys, method["name"], "--room", method["room"])
    assert (inspect.getdoc(item) or "").strip() in text
    assert f"from {method['import_from']} import {method['name']}" in text
    for claim in method["claims"]:
        assert f"{claim}: {FOUND['claims'][claim]['verdict']}  (turnout verify {claim})" in text


def test_a_name_in_other_letters_is_found(capsys):
    assert said(capsys, "LOSSFREE") == said(capsys, "LossFree")
    assert said(capsys, "FedJETs") != said(capsys, "fedjets")


def test_json(capsys):
    listed = json.loads(said(capsys, "--json", "--room", "reshape.to_sparse"))
    assert [method["name"] for method in listed] == ["diversify", "read_me", "split", "upcycle"]
    (whole,) = json.loads(said(capsys, "--json", "upcycle"))
    assert "Args:" in whole["documentation"] and whole["claims"]["upcycle"]["rows"]


def test_every_claim_is_of_a_method():
    measured = {claim for method in FOUND["methods"] for claim in method["claims"]}
    assert set(claims.__all__) == measured == set(FOUND["claims"])


def test_listing_loads_no_torch():
    code = "import sys; from turnout.cli.main import main; main(['methods']); main(['methods', 'TopK'])"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, cwd=ROOT).returncode == 0


# ---- what counts as a method, on source made up for it

ROOM = """'''Runs.'''
from turnout.run.sort import Holder, bare, own, sort
__all__ = ["Holder", "bare", "own", "sort"]
"""
CODE = """'''Sorts.'''
def sort(x: int) -> int:
    '''Sorts.

    Source: Gale et al., 2022, "MegaBlocks: Efficient"; Li, 2020, in passing.
    '''
def own(): '''Ours.

    Source: none; our own.
    '''
def bare(): '''Nobody's.

    Source: none; plain bookkeeping.
    '''
@dataclasses.dataclass(frozen=True)
class Holder: '''A noun.

    Source: Gale et al., 2022, "MegaBlocks".
    '''
"""
CLAIMS = "'''Claims.'''\nfrom turnout.claims.sort import sort\n__all__ = ['sort']\n"
CLAIM = "'''C.'''\ndef sort(): '''S.\n\n    Source: Gale et al., 2022, \"MegaBlocks\".\n    '''\n"


def test_methods_are_those_with_a_paper_or_our_own():
    files = {"run/__init__": ROOM, "run/sort": CODE, "claims/__init__": CLAIMS, "claims/sort": CLAIM}
    modules = [Module(f"turnout/{path}.py", text) for path, text in files.items()]
    own, sort = catalogue.methods({module.name: module for module in modules})
    assert (own.name, own.papers, own.claims) == ("own", (), ())
    assert list(map(str, sort.papers)) == ["Gale et al., 2022, MegaBlocks: Efficient", "Li, 2020"]
    assert (sort.claims, sort.home) == (("sort",), "turnout.run")


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ('Li et al., 2024, "Merge, Then Compress"', 'Li et al., 2024, "Merge, then compress: Demystify"', True),
        ('Li et al., 2024, "Merge, Then Compress"', 'Li et al., 2024, "LoSparse"', False),
        ('Li et al., 2024, "Merge"', 'Li et al., 2023, "Merge"', False),
        ("Li et al., 2024", 'Li et al., 2024, "Merge"', False),
        ('Ahuja, Magnanti & Orlin, 1993, "Flows"', 'Ahuja et al., 1993, "Flows"', True),
    ],
)
def test_the_same_paper(one, two, same):
    first, second = next(catalogue.papers(one)), next(catalogue.papers(two))
    assert first.is_same(second) is second.is_same(first) is same


def test_all_source_of_the_house_is_read():
    assert len(catalogue.methods({module.name: module for module in read()})) == len(FOUND["methods"])


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_an_encoding_without_our_signs_is_no_traceback(encoding: str) -> None:
    command = [sys.executable, "-m", "turnout", "methods"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(command, check=False, capture_output=True, cwd=ROOT, env=environment)
    assert (done.returncode, done.stderr) == (0, b"") and b"LossFree" in done.stdout
