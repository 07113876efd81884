"""Write the report.html of one or more runs; it opens without a network. A run still going is fine.

Of a recorded trace it is a page of its texts, coloured by the experts that each token took.

examples:
  turnout report runs/x
  turnout report runs/x runs/y --out compare.html
  turnout report smaller                          a folder of turnout convert: before and after
  turnout report trace --tokenizer runs/x/tokenizer.json
                                                  what turnout eval RUN --trace trace --token-ids recorded
"""

import argparse
from pathlib import Path

from turnout.cli.early import check_there
from turnout.errors import UsageError, word

HELP = "write the report.html of one or more runs"
_WHERE = "turnout report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout report`` takes."""
    parser.add_argument(
        "run_folders", nargs="+", metavar="RUN", help="folders of turnout train, of convert, or a trace"
    )
    parser.add_argument("--out", metavar="FILE", help="the page (default: report.html in the first folder)")
    parser.add_argument("--tokenizer", metavar="FILE", help="whose texts a trace's tokens have (default: their places)")


def run(arguments: argparse.Namespace) -> int:
    """Writes the page and says where."""
    check_there("RUN", arguments.run_folders, _WHERE)
    check_there("--tokenizer", [arguments.tokenizer], _WHERE)
    traces = [folder for folder in arguments.run_folders if (Path(folder) / "trace.json").is_file()]
    if traces and len(arguments.run_folders) > 1:
        got, fix = f"{traces[0]} and others", "name one trace, and runs by themselves"
        raise UsageError(word("RUN", got=got, allowed="be one trace, or folders of runs", where=_WHERE, fix=fix))
    if arguments.tokenizer and not traces:
        allowed, fix = "go with a trace", "leave it out"
        raise UsageError(word("--tokenizer", got="no trace", allowed=allowed, where=_WHERE, fix=fix))
    if traces:
        print(_write_trace(Path(traces[0]), arguments.out, arguments.tokenizer))
        return 0
    from turnout.recipes.inspect import write_report

    print(write_report(arguments.run_folders, arguments.out))
    return 0


def _write_trace(folder: Path, out: str | None, tokenizer: str | None) -> Path:
    """The page of a trace, which lies beside its folder: nothing else goes into that."""
    from turnout.serve.viewer import trace_html
    from turnout.storage import write_whole
    from turnout.types import Trace

    trace, path = Trace.open(folder), Path(out) if out else folder.with_name(f"{folder.name}.html")
    text_of = None
    if tokenizer is not None:
        from turnout.train.data.tokenizer import open_tokenizer

        if not trace.has_token_ids:
            got, fix = f"{folder}, which has no token ids", "record it with turnout eval RUN --trace DIR --token-ids"
            raise UsageError(word("the trace", got=got, allowed="have token ids", where=_WHERE, fix=fix))
        read = open_tokenizer(Path(tokenizer))
        most, size = int(trace.column("token_id").max(initial=0)), read.get_vocab_size()
        if most >= size:
            got, fix = (
                f"{tokenizer}, whose tokens end at {size - 1:,}",
                "pass the tokenizer.json of the model's own folder",
            )
            allowed = f"be the one that {folder} was recorded with, which has a token {most:,}"
            raise UsageError(word("--tokenizer", got=got, allowed=allowed, where=_WHERE, fix=fix))
        text_of = lambda token: read.decode([token], skip_special_tokens=False)  # noqa: E731
    write_whole(path, trace_html(trace, text_of=text_of))
    return path
