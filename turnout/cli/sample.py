"""Let a model continue prompts: of a run, of transformers, or what turnout convert wrote.

On a terminal the text of one prompt comes word by word, and stderr has the time to the first token and tokens a second;
in a pipe nothing but the text is written. Of --top-k, --top-p and --min-p any number: each leaves fewer tokens to draw
from. turnout doctor RUN says whether its tokens are made by the compiled step, and why not.

examples:
  turnout sample runs/x --prompt "def main("
  turnout sample mixtral --prompt "Once upon a time" --temperature 0    the likeliest text, the same each time
  turnout sample runs/x --prompt "import" --tokens 200 --top-p 0.95 --stop "def " --seed 1
  turnout sample mixtral --expert-memory 8GB --prompt "Once upon a time"    the other experts stay on disk
  turnout sample runs/x --prompts prompts.txt --min-p 0.05 --repetition-penalty 1.1
  turnout sample runs/x --prompt "def main(" --contrast 0.5             less of what experts say that were not chosen
"""

import argparse
import sys
import time

from turnout.cli.device import add_device
from turnout.cli.early import check_there
from turnout.cli.experts import add_experts, experts_of
from turnout.errors import UsageError, word

HELP = "let a model continue a prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout sample`` takes."""
    parser.add_argument(
        "run_folder", metavar="RUN", help="an output folder of turnout train, a model's folder, or org/name"
    )
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", default="", help="the text to continue (default: a new document)")
    given.add_argument("--prompts", metavar="FILE", help="the texts to continue, one a line; '---' stands between them")
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens to generate (default: 100, or what fits)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top-k", type=int, metavar="N", help="draw among the N likeliest tokens only")
    parser.add_argument("--top-p", type=float, metavar="P", help="among the fewest likeliest that have the share P")
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="among those at least P times as likely as the likeliest"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: tokens of the text so far less often",
    )
    parser.add_argument(
        "--contrast",
        type=float,
        metavar="BETA",
        help="draw from (1 + BETA) times the scores less BETA times those of one lower expert (SCMoE; try 0.5)",
    )
    parser.add_argument("--contrast-rank", type=int, metavar="K", help="which expert that is, from 1 (default 2)")
    parser.add_argument(
        "--contrast-alpha", type=float, metavar="A", help="among those at least A times as likely (default 0.1)"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--keep-stop", action="store_true", help="end behind it")
    parser.add_argument(
        "--eos", action=argparse.BooleanOptionalAction, help="end where the text ends (default: where that is known)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0), the same alone and among others")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print the text of one prompt as it comes (default: on a terminal)",
    )
    add_experts(parser)
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the prompts and their continuations."""
    check_there("RUN", [arguments.run_folder], "turnout sample", hub=True)
    check_there("--prompts", [arguments.prompts], "turnout sample")
    for flag, text in [("--prompt", arguments.prompt), *(("--stop", stop) for stop in arguments.stop)]:
        _check_text(flag, text)
    from turnout.recipes.progress import progress_for
    from turnout.recipes.sample import Sampling, prompts_in, sample_model

    asked = Sampling(
        tokens=arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        stop=arguments.stop,
        keep_stop=arguments.keep_stop,
        eos=arguments.eos,
        seed=arguments.seed,
        contrast=arguments.contrast,
        contrast_alpha=arguments.contrast_alpha,
        contrast_rank=arguments.contrast_rank,
    )
    prompts = [arguments.prompt] if arguments.prompts is None else prompts_in(arguments.prompts)
    one, watched = len(prompts) == 1, sys.stderr.isatty()
    streams = arguments.stream if arguments.stream is not None else one and sys.stdout.isatty()
    told = _Told(streams)
    texts = sample_model(
        arguments.run_folder,
        prompts,
        asked,
        device=arguments.device,
        stream=told if streams or (one and watched) else None,
        progress=progress_for(quiet=streams or not watched),
        experts=experts_of(arguments),
        note=lambda said: print(said, file=sys.stderr),
    )
    print("" if streams else "\n---\n".join(texts))
    if one and watched:
        print(told, file=sys.stderr)
    return 0


class _Told:
    """Is given a prompt, then what each token adds: prints it, or not, and says how fast it came."""

    def __init__(self, prints: bool) -> None:
        self._prints = prints
        self._at_s: list[float] = []

    def __call__(self, piece: str) -> None:
        self._at_s.append(time.perf_counter())
        if self._prints:
            print(piece, end="", flush=True)

    def __str__(self) -> str:
        start, *others = self._at_s
        if not others:
            return "no token was added"
        first, last, further = others[0], others[-1], len(others) - 1
        speed = f", then {further / (last - first):.1f} tokens/s" if further and last > first else ""
        return f"first token after {first - start:.2f} s{speed} ({further + 1} tokens)"


def _check_text(flag: str, text: str) -> None:
    """Refuses what a shell handed on as bytes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        got, fix = f"the byte {ord(text[error.start]) & 0xFF:#04x}", "write it in UTF-8"
        what = word(flag, got=got, allowed="be text", where="turnout sample", fix=fix)
        raise UsageError(what) from error
