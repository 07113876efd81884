"""turnout bench-serve: what it prints of a server that answers, and what it says of one that does not."""

import json
import re

import pytest

from turnout.cli.main import main


def asked(endpoint, *more: str) -> int:
    return main(
        ["bench-serve", endpoint.url, "--requests", "4", "--prompt-tokens", "16", "--output-tokens", "4", *more]
    )


def test_a_table_and_a_page(endpoint, tmp_path, capsys) -> None:
    page = tmp_path / "page.html"
    code = asked(endpoint, "--streams", "1,2", "--rate", "50,100", "--slo", "ttft=5s,itl=900ms", "--html", str(page))
    printed = capsys.readouterr()
    assert code == 0 and not printed.err, "nothing tells how far it is where nobody looks on"
    rows = [line for line in printed.out.splitlines() if re.match(r"(rate|\d+ stream)", line)]
    assert [row.split()[0] for row in rows] == ["rate", "rate", "1", "2"] and all("4/4" in row for row in rows)
    assert "ttft <= 5 s, itl <= 0.9 s" in printed.out and "The client took" in printed.out
    text = page.read_text()
    assert text.count("<svg") == 14 and not re.search(r'(src|href)="http', text) and "goodput" in text
    assert "http-equiv" in text and "default-src 'none'" in text


def test_json(endpoint, capsys) -> None:
    assert asked(endpoint, "--rate", "100", "--chat", "--json", "--shared-prefix", "8", "--prefixes", "2") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "small" and found["points"][0]["errors"] == {}
    assert found["about"]["endpoint"] == "/v1/chat/completions" and "2 shared" in found["about"]["prompts"]


def test_failures_are_told_and_are_an_exit_code(endpoint, capsys) -> None:
    endpoint.manner = "busy"
    assert asked(endpoint, "--streams", "2") == 1
    assert "2 streams: 4 of 4 failed: HTTP 429: too many" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "add --rate 1, or --streams 1,4"),
        (["--rate", "0"], "--rate must be numbers above 0"),
        (["--streams", "1.5"], "--streams must be whole numbers"),
        (["--rate", "1", "--requests", "0"], "--requests must be at least 1"),
        (["--rate", "1", "--shared-prefix", "16"], "--shared-prefix must be 0 to 15"),
        (["--rate", "1", "--prefixes", "0"], "--prefixes must be at least 1"),
        (["--rate", "1", "--slo", "soon"], "--slo must be NAME=TIME"),
        (["--rate", "1", "--output-tokens", "no"], "--output-tokens must be lengths"),
        (["--rate", "1", "--api-key-env", "NO_SUCH_KEY"], "export NO_SUCH_KEY"),
    ],
)
def test_mistakes_are_one_line(endpoint, more, says, capsys) -> None:
    assert asked(endpoint, *more) == 2
    printed = capsys.readouterr()
    assert says in printed.err and printed.err.count("\n") == 1 and not printed.out
