"""Answer by OpenAI's API over HTTP: completions, chat and responses, streamed, of many clients at once.

Any program that speaks to OpenAI speaks to it: set its base URL to the printed address, which ends in /v1. It listens
on this machine alone unless --host says otherwise, and then wants a key. Each answer is the one that the model gives
alone, whoever asks beside it; at temperature 0 it is that of turnout sample. Ctrl-C or SIGTERM: nothing new is taken,
what is under way is finished, then it ends. At / is a page that shows which experts each token takes.

examples:
  turnout serve runs/demo/moe
  turnout serve mixtral --port 9000 --served-model-name mixtral --max-running 32
  turnout serve mixtral --lora sql=adapters/sql --lora poem=adapters/poem     "model": "sql" answers with that adapter
  turnout serve mixtral --no-viewer                                           no page at /
  turnout serve mixtral --host 0.0.0.0 --api-key-file keys.txt                for others: a key a line
  curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" -d '{"prompt": "def main("}'
  curl http://127.0.0.1:8000/health; curl http://127.0.0.1:8000/metrics
"""

import argparse
import os
import stat
import sys
import typing
from pathlib import Path

from turnout.cli.device import add_device
from turnout.cli.early import check_there
from turnout.cli.experts import add_experts, experts_of
from turnout.errors import DataError, MissingExtraError, UsageError, word
from turnout.reading import read_text

HELP = "answer by OpenAI's API over HTTP"
_WHERE = "turnout serve"
_KEY = "TURNOUT_API_KEY"
_KEYS_MOST = 1 << 20  # characters of a pipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout serve`` takes."""
    parser.add_argument(
        "path", metavar="PATH", help="an output folder of turnout train, a model's folder, or org/name of the hub"
    )
    parser.add_argument("--port", type=int, default=8000, help="where to listen (default 8000); 0 for any that is free")
    parser.add_argument("--host", default="127.0.0.1", help="at which address (default 127.0.0.1: this machine alone)")
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="what clients call the model (default: its folder's name)"
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="an adapter of PEFT, which clients call by this name; repeatable",
    )
    _add_limits(parser)
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument(
        "--api-key-file", metavar="FILE", help=f"keys that clients must send, one a line (or in {_KEY}: one)"
    )
    keys.add_argument(
        "--api-key", metavar="KEY", help="one key; others on this machine can read it in the process list"
    )
    parser.add_argument(
        "--no-viewer", dest="viewer", action="store_false", help="no page at / that shows which experts texts take"
    )
    parser.add_argument("--insecure", action="store_true", help="let everybody ask who reaches --host, without a key")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name that clients call this server by, behind a proxy for example; repeatable",
    )
    add_experts(parser)
    add_device(parser)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """How much is answered at once, and how long."""
    limit = parser.add_argument_group("limits")
    limit.add_argument("--max-running", type=int, default=16, metavar="N", help="texts at once (default 16)")
    limit.add_argument(
        "--max-waiting", type=int, default=256, metavar="N", help="texts that may wait (default 256), beyond that 429"
    )
    limit.add_argument(
        "--kv-memory",
        metavar="SIZE",
        help="for keys and values of all texts: 1GB, 512MB (default: 2,048 tokens a text)",
    )
    limit.add_argument(
        "--no-prefix-sharing",
        dest="sharing",
        action="store_false",
        help="read every prompt anew, also where one with the same beginning was read before",
    )
    limit.add_argument(
        "--request-timeout", type=float, default=1800.0, metavar="S", help="seconds an answer may take (default 1800)"
    )
    limit.add_argument(
        "--drain-timeout", type=float, default=30.0, metavar="S", help="seconds to finish in at the end (default 30)"
    )
    limit.add_argument("--max-body", type=int, default=8, metavar="MB", help="of a request, in MB (default 8)")


def run(arguments: argparse.Namespace) -> int:
    """Serves until told to end."""
    check_there("PATH", [arguments.path], _WHERE, hub=True)
    adapters = _adapters(arguments.lora)
    keys = _keys(arguments)
    _check_numbers(arguments)
    room = experts_of(arguments)
    _kv_bytes(arguments.kv_memory)
    _check_public(arguments, keys)
    _check_extra()
    from turnout.serve.http import Door, Limits, build_app, listen, run_server

    limits = Limits(
        request_s=arguments.request_timeout,
        drain_s=arguments.drain_timeout,
        body_bytes=arguments.max_body << 20,
        active=4 * (max(arguments.max_running, 1) + max(arguments.max_waiting, 0)) + 64,
    )
    # Before the model, whose reading takes a while: a port that is taken is known now.
    with listen(arguments.host, arguments.port, reader_s=limits.reader_s) as sock:
        engine, texts = _engine(arguments, adapters, room)
        with engine:
            door = Door.at(arguments.host, keys=keys, also=arguments.allowed_host)
            app = build_app(engine, texts, door=door, limits=limits, viewer=_viewer(arguments, keys))
            run_server(app, sock, ready=lambda url: _say_ready(url, engine.models(), keys, texts, arguments.viewer))
    if sys.stderr.isatty():
        print("ended", file=sys.stderr)
    return 0


def _engine(
    arguments: argparse.Namespace, adapters: dict[str, str], room: typing.Any = None
) -> tuple[typing.Any, typing.Any]:
    """What answers, and the texts of its model."""
    from turnout.models import Drawing
    from turnout.models.wishes import own_wishes, say_unmet
    from turnout.recipes.calibration import find_tokenizer
    from turnout.recipes.models import opened
    from turnout.recipes.sample import text_ends
    from turnout.serve import Engine
    from turnout.serve.http import Texts

    _say(f"reading {arguments.path} ...")
    found = opened(arguments.path, _WHERE, arguments.device, experts=room)
    for note in found.notes:
        print(note, file=sys.stderr)  # in a log too: what was asked for is not quite what is done
    say_unmet(own_wishes(found.lm), Drawing(where=_WHERE), _WHERE)  # clients may pass it; nobody does for them
    file = find_tokenizer(found.folder, where=_WHERE)
    size = found.lm.config.vocab_size
    plain = Texts.load(file, vocab_size=size, eos=(), own=found.own)
    ends = text_ends(found.lm, plain.tokenizer, own=found.own)
    texts = Texts(plain.tokenizer, vocab_size=size, eos=ends, own=found.own, template=plain.template)
    engine = Engine(
        found.lm,
        tokenizer=texts.tokenizer,
        name=arguments.served_model_name or found.name,
        adapters=adapters,
        slots=arguments.max_running,
        waiting=arguments.max_waiting,
        cache_bytes=_kv_bytes(arguments.kv_memory),
        sharing=arguments.sharing,
    )
    _warm(engine, texts)
    return engine, texts


def _warm(engine: typing.Any, texts: typing.Any) -> None:
    """Answers once before anybody asks: what is compiled on first use is compiled now."""
    from turnout.serve import Request

    _say("making ready ...")
    engine.start()
    prompt = tuple(texts.tokenizer.encode("a").ids[:1]) or (0,)
    _, end = engine.submit(Request(prompt, tokens=2)).result()
    if end.reason == "error":
        fix = "look at the model with turnout doctor"
        raise UsageError(word("the model", got=end.message, allowed="answer", where=_WHERE, fix=fix))


def _check_numbers(arguments: argparse.Namespace) -> None:
    """Refuses limits that let nothing through, before anything is read."""
    for flag, least, words in (
        ("max_running", 1, "be 1 or more"),
        ("max_waiting", 0, "be 0 or more"),
        ("request_timeout", 1e-3, "be a finite number of seconds above 0"),
        ("drain_timeout", 1e-3, "be a finite number of seconds above 0"),
        ("max_body", 1, "be 1 or more, in MB"),
    ):
        if not least <= (got := getattr(arguments, flag)) < float("inf"):
            fix = "leave it out for the default"
            raise UsageError(word(f"--{flag.replace('_', '-')}", got=got, allowed=words, where=_WHERE, fix=fix))
    if arguments.served_model_name == "":
        allowed, fix = "be a name", "leave it out for the folder's name"
        raise UsageError(word("--served-model-name", got="an empty text", allowed=allowed, where=_WHERE, fix=fix))


def _kv_bytes(size: str | None) -> int | None:
    from turnout.fields import byte_size

    return None if size is None else byte_size(size, what="--kv-memory", where=_WHERE)


def _adapters(given: list[str]) -> dict[str, str]:
    """Names and folders of ``--lora``."""
    found: dict[str, str] = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not name or not folder or name in found:
            got, allowed = text, "be NAME=FOLDER, each name once"
            raise UsageError(
                word("--lora", got=got, allowed=allowed, where=_WHERE, fix="write --lora sql=adapters/sql")
            )
        found[name] = folder
    check_there("--lora", found.values(), _WHERE)
    return found


def _keys(arguments: argparse.Namespace) -> list[str]:
    """The keys of those who may ask; none for everybody."""
    keys = [arguments.api_key] if arguments.api_key is not None else []
    if arguments.api_key_file is not None:
        check_there("--api-key-file", [arguments.api_key_file], _WHERE)
        keys = [line.strip() for line in _read(arguments.api_key_file).splitlines()]
        keys = [key for key in keys if key and not key.startswith("#")]
        if not keys:
            got, fix = f"{arguments.api_key_file}, which holds none", "write one a line"
            raise DataError(word("--api-key-file", got=got, allowed="hold a key", where=_WHERE, fix=fix))
    elif not keys and os.environ.get(_KEY):
        keys = [os.environ[_KEY]]
    if any(not key.isascii() or not key.isprintable() or " " in key or not key for key in keys):
        got, fix = "one with other characters", "make one: python -c 'import secrets; print(secrets.token_urlsafe())'"
        raise UsageError(
            word("an API key", got=got, allowed="be printable ASCII without spaces", where=_WHERE, fix=fix)
        )
    return keys


def _read(path: str) -> str:
    def unread(wrong: str) -> DataError:
        got, fix = f"{path} ({wrong})", "write one key a line"
        return DataError(word("--api-key-file", got=got, allowed="be a file of text", where=_WHERE, fix=fix))

    try:
        if stat.S_ISFIFO(Path(path).stat().st_mode):  # as the shell's <(command) is; who named it waits for it
            with Path(path).open(encoding="utf-8") as pipe:
                return pipe.read(_KEYS_MOST)
        return read_text(path, refuse=unread, any_link=True)
    except UnicodeDecodeError as error:
        raise unread(f"not UTF-8: {error.reason}") from error
    except OSError as error:
        raise unread(error.strerror or str(error)) from error


def _viewer(arguments: argparse.Namespace, keys: list[str]) -> typing.Literal["live", "shared"] | None:
    """What the page may show of others: counts as they are among those who trust each other, else in large steps."""
    trusted = len(keys) == 1 or (_is_local(arguments) and not keys)
    return None if not arguments.viewer else "live" if trusted else "shared"


def _is_local(arguments: argparse.Namespace) -> bool:
    return arguments.host in ("localhost", "::1") or arguments.host.startswith("127.")


def _check_public(arguments: argparse.Namespace, keys: list[str]) -> None:
    """Refuses to answer strangers by an oversight."""
    if _is_local(arguments) or keys:
        return
    if not arguments.insecure:
        got, allowed = f"{arguments.host} without a key, where others could ask", "go with a key"
        fix = f"add --api-key-file FILE or set {_KEY}, listen on --host 127.0.0.1, or say --insecure"
        raise UsageError(word("--host", got=got, allowed=allowed, where=_WHERE, fix=fix))
    print(f"WARNING: everybody who reaches {arguments.host} may use this model, without a key.", file=sys.stderr)


def _check_extra() -> None:
    """Refuses before the model is read what would fail after it."""
    import importlib.util

    wanted = ("fastapi", "uvicorn", "prometheus_client", "llguidance", "jinja2")
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"{_WHERE} needs {', '.join(missing)}. Nearest fix: pip install 'turnout[serve]'.")


def _say(text: str) -> None:
    """Tells whoever watches; in a pipe nothing."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


def _say_ready(url: str, names: tuple[str, ...], keys: list[str], texts: typing.Any, viewer: bool) -> None:
    """Where it listens, and a line to paste."""
    head = ' -H "Authorization: Bearer $KEY"' if keys else ""
    path, body = "/v1/completions", '{"prompt": "Once", "max_tokens": 32}'
    if texts.template is not None:
        path, body = "/v1/chat/completions", '{"messages": [{"role": "user", "content": "Hello"}]}'
    print(f"{', '.join(names)} at {url}/v1", flush=True)
    print(f"curl {url}{path} -H \"Content-Type: application/json\"{head} -d '{body}'", flush=True)
    if viewer:
        print(f"in a browser: {url}/", flush=True)
