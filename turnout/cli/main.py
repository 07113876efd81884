"""``turnout``: reads the command line, runs one subcommand, turns expected errors into one line and an exit code."""

import argparse
import difflib
import errno
import importlib
import io
import os
import re
import signal
import sys
import threading
import typing
from collections.abc import Sequence

from turnout import __version__
from turnout.cli.device import check_device
from turnout.cli.words import in_flags
from turnout.errors import Interrupted, TurnoutError

# Every subcommand is a module here (with _ for -) with ``HELP``, ``add_arguments(parser)`` and ``run(arguments) -> exit
# code``.
# None of them imports torch before ``run``, so that help is instant.
COMMANDS = (
    "demo",
    "train",
    "run",
    "eval",
    "sample",
    "serve",
    "bench-serve",
    "report",
    "convert",
    "certify",
    "audit",
    "parity",
    "place",
    "cache",
    "compare",
    "laws",
    "plan",
    "verify",
    "methods",
    "doctor",
)

_EXAMPLES = """\
a job each:
  turnout demo                                   dense against sparse, on this machine's own text, with a report
  turnout train tiny --data my_folder --out runs/x
  turnout train --resume --out runs/x            go on after a crash, bit for bit
  turnout train --from MODEL --data my_folder --out runs/y
                                                 train a model on: a run's, a folder of transformers, org/name
  turnout eval runs/x                            bits per byte and load balance, on held-out text
  turnout sample runs/x --prompt "def main("
  turnout serve runs/x                           answer by OpenAI's API: completions, chat, streams
  turnout bench-serve http://127.0.0.1:8000 --rate 1,2
                                                 how long users of a server wait, and what it does a second
  turnout report runs/x runs/y                   one page, which opens without a network
  turnout run runs/x/run.json --out runs/again   repeat a run, or a conversion
  turnout convert llama --to moe --experts 8 --top-k 2 --out mixtral
                                                 dense to sparse; smaller, with adapters: turnout convert --help
  turnout certify llama mixtral                  does B compute what A does? if not, where they part
  turnout audit runs/x                           do others in a batch change what a model answers?
  turnout parity plan.json                       has training on many processes the gradients of one?
  turnout place trace --devices 8 --out placement.json
                                                 which device holds which expert, from a recorded trace
  turnout cache trace                            which policy a cache of experts should have, from a recorded trace
  turnout compare TopK LossFree ReMoE            routers on the same seeds, and which differences are real
  turnout laws runs/*                            what experts are worth in parameters, from runs
  turnout methods upcycle                        what a method does, whose paper it is, what was seen of it
  turnout verify loss_free                       see a published result reproduced
  turnout doctor                                 what is installed, which backend each device would use, and why
  turnout COMMAND --help                         what a command takes, with examples

exit codes: 0 done, 1 a claim or check failed, 2 a mistake in the input, 130 interrupted (everything saved)
"""


class _Parser(argparse.ArgumentParser):
    """One that says in words which type it expects."""

    def error(self, message: str) -> typing.NoReturn:
        for kind, words in (("int", "a whole number"), ("float", "a number")):
            message = message.replace(f"invalid {kind} value: ", f"must be {words}; got ")
        super().error(message)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line.

    >>> build_parser().parse_args(["methods"]).command
    'methods'

    Source: none; argparse.
    """
    parser = _Parser(
        prog="turnout",
        description="Networks that run only part of themselves: train, reshape, measure, verify and ship them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"turnout {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"turnout.cli.{name.replace('-', '_')}")
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, parser=command)
    return parser


def _refuse_unknown(parser: argparse.ArgumentParser, rest: Sequence[str]) -> typing.NoReturn:
    """Names what the command does not take, and the flag that comes nearest."""
    flags = re.findall(r"--[a-z][a-z-]+", parser.format_usage())
    close = [found[0] for text in rest if (found := difflib.get_close_matches(text.split("=")[0], flags, n=1))]
    parser.error(
        f"unrecognized arguments: {' '.join(rest)}" + (f"; did you mean {' and '.join(close)}?" if close else "")
    )


# A full disk, a full quota, a device that fails.
_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; a user's mistake is one line on stderr, never a traceback.

    Args:
        argv: the arguments after the program's name; default the process's own.

    Returns:
        0 done, 1 a claim or check failed, 2 a mistake in the input, 130 interrupted.

    >>> main(["sample", "no/such/run"])
    2

    Source: none; argparse.
    """
    try:
        return _run(argv)
    except KeyboardInterrupt:
        # From wherever a second one struck: while the first was told, or before a command had begun.
        return 130


def _run(argv: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        # A pipe on Windows, LC_ALL=C: what the encoding lacks is a question mark, not a traceback.
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() not in ("utf-8", "utf8"):
            stream.reconfigure(errors="replace")
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    # Before torch loads: threads that wait for each other sleep instead of spinning, which on a machine that does
    # anything else besides is up to ten times as fast (docs/log.md). A setting of the user's own stands.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # argparse takes positional arguments in one go; field=value may also stand behind the options.
    late = [text for text in rest if "=" in text and not text.startswith("-")]
    if late != rest or (late and not hasattr(arguments, "overrides")):
        _refuse_unknown(arguments.parser, rest)
    if late:
        arguments.overrides += late
    try:
        check_device(arguments)
        code = arguments.run(arguments)
        _flush(argv)
        return code
    except Interrupted as stop:
        _deaf(argv)
        print(f"turnout: {in_flags(str(stop), arguments.command)}", file=sys.stderr)
        return 130
    except TurnoutError as error:
        print(f"turnout {arguments.command}: error: {in_flags(str(error), arguments.command)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        _deaf(argv)
        print("turnout: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe (`turnout methods | head`) has gone: nothing is left to say. A verdict is not known then.
        sys.stderr.close()
        return 141 if arguments.command in ("audit", "certify", "parity", "verify") else 0
    except OSError as error:
        if error.filename is not None or error.errno not in _UNWRITTEN:
            raise
        _give_up_stdout(argv)
        message = f"the output could not be written ({os.strerror(error.errno)})"
        print(
            f"turnout {arguments.command}: error: {message}. Nearest fix: free some space, or write it elsewhere.",
            file=sys.stderr,
        )
        return 2


def _flush(argv: Sequence[str] | None) -> None:
    """Writes what is left now, while an error can still be told; a reader that has gone leaves the exit code alone."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _give_up_stdout(argv)


def _give_up_stdout(argv: Sequence[str] | None) -> None:
    """Nothing more can be written there; else the interpreter tries again at its end, and prints a traceback."""
    if argv is None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _deaf(argv: Sequence[str] | None) -> None:
    """From here to the end of the process nothing is left to stop; a further Ctrl-C would only print a traceback."""
    if argv is None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
