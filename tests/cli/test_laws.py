"""turnout laws: a table in, numbers, a page and JSON out."""

import json

import numpy as np
import pytest

from turnout.cli.main import main

SIZES, COUNTS = (1e6, 1e7, 1e8), (1, 2, 4, 8, 16, 32)


@pytest.fixture
def table(tmp_path):
    rows = [(n, e, 10 ** (1.1 - 0.08 * np.log10(n) - 0.03 * np.log10(e))) for n in SIZES for e in COUNTS]
    path = tmp_path / "losses.csv"
    path.write_text("params,experts,loss\n" + "".join(f"{n},{e},{loss}\n" for n, e, loss in rows))
    return path


def test_it_prints_the_law_and_what_is_asked(table, capsys):
    argv = ["laws", "--table", str(table), "--law", "separable", "--draws", "20", "--ask", "2e6,6"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "separable law of 18 models" in said and "-0.08" in said and "95 %:" in said
    last = said.strip().splitlines()[-1].split()
    assert last[:3] == ["2e+06", "6", "-"]
    assert float(last[3]) == pytest.approx(10 ** (1.1 - 0.08 * np.log10(2e6) - 0.03 * np.log10(6)), abs=1e-3)


def test_a_page_and_json(table, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["laws", "--table", str(table), "--law", "bilinear", "--draws", "10", "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["values"]
    assert said["law"] == "bilinear" and said["numbers"]["most"] is None and len(said["points"]) == 18
    page = (out / "laws.html").read_text()
    assert (
        "a bilinear scaling law" in page
        and "http://" not in page.replace("http://www.w3.org", "")
        and "https://" not in page
    )
    assert json.loads((out / "laws.json").read_text())["values"]["numbers"] == said["numbers"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "RUN and --table must be one of the two"),
        (["--ask", "2e6"], "--ask must be parameters and experts"),
        (["--draws", "-1"], "--draws and --seed must be 0 or more"),
        (["--ask", "1e12,4"], "4.00 decades outside. Nearest fix: pass --extrapolate"),
        (["--ask", "0,4"], "above 0"),
    ],
)
def test_mistakes_are_named(table, capsys, argv, words):
    given = ["--table", str(table), "--law", "separable"] if argv else []
    assert main(["laws", *given, *argv]) == 2
    assert words in capsys.readouterr().err


def test_outside_with_its_distance(table, capsys):
    argv = ["laws", "--table", str(table), "--law", "separable", "--draws", "0", "--ask", "1e9,4", "--extrapolate"]
    assert main(argv) == 0
    assert "1.00 decades outside the models" in capsys.readouterr().out


def test_a_table_that_is_not_there(tmp_path, capsys):
    assert main(["laws", "--table", str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in capsys.readouterr().err


def test_a_folder_that_is_a_file_is_refused_before_anything(table, capsys):
    for command in (["laws", "--table", str(table)], ["compare", "TopK", "Hash"]):
        assert main([*command, "--out", str(table)]) == 2
        assert f"--out must be a folder in turnout {command[0]}" in capsys.readouterr().err
