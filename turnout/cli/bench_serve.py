"""Put a server of OpenAI's protocol under load: how long users wait, what it does a second, and what of it is in time.

--rate sends requests when they are due, as independent users do (Poisson), however slow the server is; every wait
counts from when the request was due. --streams is so many users, each of whom asks again when answered. Lengths are in
the server's own tokens, found out by two questions first. An answer that is cut, short or miscounted is a failure,
counted by its kind.

examples:
  turnout bench-serve http://127.0.0.1:8000 --streams 1,4,16
  turnout bench-serve http://127.0.0.1:8000 --rate 0.5,1,2 --slo ttft=0.5s,itl=50ms
                                              goodput: answers a second that keep to it
  turnout bench-serve http://127.0.0.1:8000 --rate 2 --prompt-tokens 128:9,2048:1 --output-tokens 64,256
                                              nine short prompts to one long; half of the answers long
  turnout bench-serve http://127.0.0.1:8000 --rate 2 --shared-prefix 96 --prefixes 4
                                              prompts begin with one of four texts of 96 tokens
  turnout bench-serve URL --chat --model NAME --api-key-env KEY --rate 1 --html page.html --json
"""

import argparse
import os
import sys

from turnout.cli.early import check_writable
from turnout.errors import UsageError, word

HELP = "put a server of OpenAI's protocol under load"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout bench-serve`` takes."""
    parser.add_argument("url", metavar="URL", help="the server's address, as http://127.0.0.1:8000")
    parser.add_argument("--model", metavar="NAME", help="the model to ask for (default: the first that it lists)")
    parser.add_argument("--chat", action="store_true", help="ask /v1/chat/completions (default: /v1/completions)")
    parser.add_argument("--rate", metavar="R,R,...", help="requests a second, that do not wait for answers")
    parser.add_argument("--streams", metavar="N,N,...", help="users, each of whom asks again when answered")
    parser.add_argument("--requests", type=int, default=100, metavar="N", help="for each of these (default 100)")
    parser.add_argument(
        "--prompt-tokens", default="128", metavar="N[:W],...", help="lengths of prompts, with weights (default 128)"
    )
    parser.add_argument("--output-tokens", default="64", metavar="N[:W],...", help="lengths of answers (default 64)")
    parser.add_argument(
        "--fixed", action="store_true", help="ask for exactly so many (ignore_eos), and take nothing less"
    )
    parser.add_argument(
        "--shared-prefix", type=int, default=0, metavar="N", help="tokens that prompts begin alike with (default 0)"
    )
    parser.add_argument("--prefixes", type=int, default=1, metavar="N", help="how many such beginnings (default 1)")
    parser.add_argument(
        "--slo", metavar="NAME=TIME,...", help="what an answer must keep to: ttft, tpot, itl, e2e (default: none)"
    )
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="of a request (default 600 s)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and arrivals (default 0)")
    parser.add_argument("--api-key-env", metavar="NAME", help="the environment variable that holds the server's key")
    parser.add_argument("--html", metavar="FILE", help="write a page with the curves here")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints; 1 when no request was answered."""
    check_writable("turnout bench-serve", html=arguments.html)
    for name, lowest in (("requests", 1), ("seed", 0), ("timeout", 0.001)):
        if not getattr(arguments, name) >= lowest:
            allowed, fix = f"be at least {lowest}", "leave it out for the default"
            got = getattr(arguments, name)
            raise UsageError(word(f"--{name}", got=got, allowed=allowed, where="turnout bench-serve", fix=fix))
    rates, streams = _numbers("--rate", arguments.rate, float), _numbers("--streams", arguments.streams, int)
    if not rates and not streams:
        allowed, fix = "be told, by --rate or --streams,", "add --rate 1, or --streams 1,4"
        raise UsageError(word("the load", got="neither", allowed=allowed, where="turnout bench-serve", fix=fix))
    from turnout.recipes.progress import progress_for
    from turnout.serve.load import LengthMix, Slo, Target, Traffic, bench
    from turnout.serve.load.page import page
    from turnout.storage import write_whole

    traffic = Traffic(
        LengthMix.parse(arguments.prompt_tokens, what="--prompt-tokens"),
        LengthMix.parse(arguments.output_tokens, what="--output-tokens"),
        shared=arguments.shared_prefix,
        prefixes=arguments.prefixes,
        endpoint="chat" if arguments.chat else "completions",
        fixed=arguments.fixed,
    )
    progress = progress_for(quiet=not sys.stderr.isatty())
    try:
        report = bench(
            Target(arguments.url, key=_key(arguments.api_key_env)),
            traffic,
            model=arguments.model,
            rates=rates,
            streams=[int(count) for count in streams],
            requests=arguments.requests,
            slo=None if arguments.slo is None else Slo.parse(arguments.slo),
            seed=arguments.seed,
            timeout_s=arguments.timeout,
            told=progress.part,
        )
    finally:
        progress.stop()
    print(report.to_json() if arguments.json else report.table())
    if arguments.html:
        write_whole(arguments.html, page(report))
        if not arguments.json:
            print(f"page: {arguments.html}")
    return 0 if all(one.done for one in report.points) else 1


def _numbers(flag: str, text: str | None, kind: type[int] | type[float]) -> list[float]:
    try:
        found = [kind(part) for part in text.split(",")] if text is not None else []
        if all(0 < number < float("inf") for number in found):
            return [float(number) for number in found]
    except ValueError:
        pass
    allowed = f"be {'whole ' if kind is int else ''}numbers above 0 with commas between"
    raise UsageError(word(flag, got=text, allowed=allowed, where="turnout bench-serve", fix=f"write {flag} 1,2,4"))


def _key(name: str | None) -> str:
    if name is None:
        return ""
    if not os.environ.get(name):
        allowed, fix = "name a variable that is set", f"export {name}=..."
        raise UsageError(word("--api-key-env", got=name, allowed=allowed, where="turnout bench-serve", fix=fix))
    return os.environ[name]
