"""Reshape a model on disk and write it in the format it came in: steps in the order given, or another format.

PATH is a folder of transformers, one of turnout's own models, a run folder, or a model of the hub (org/name).
--experts, --top-k, --granularity and --by belong to the step before them. What was done is in DIR/run.json, and
turnout run DIR/run.json does it again. Until it is done everything is in DIR.part; whatever stopped it, the same
command goes on from the last finished layer.

examples:
  turnout convert llama --to moe --experts 8 --top-k 2 --dry-run            what it would cost; writes nothing
  turnout convert llama --to moe --experts 8 --top-k 2 --out mixtral
  turnout convert llama --to moe --experts 16 --top-k 4 --granularity 2 --out fine
  turnout convert llama --split 16 --top-k 4 --out split
  turnout convert mixtral --drop-experts 25% --calibration text --out smaller
  turnout convert runs/x --merge-experts 4 --calibration text --out merged
  turnout convert runs/x --merge-experts 4 --compress-experts 16 --calibration text --out small
  turnout convert runs/x --bits 4 --group 64 --out small4                    weights in 4 bits and a quarter
  turnout convert runs/x --bits 4 --method gptq --calibration text --out small4
  turnout convert runs/x --as transformers --out exported
  turnout convert runs/x --gguf q8_0 --out model.gguf                       a file for llama.cpp
  turnout convert llama --adapters math code --router arrow --out routed    adapters of PEFT, a router for every token
  turnout convert llama --adapters math code --router phatgoose --gate-text math=a.txt --gate-text code=b --out routed
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from turnout.cli.device import add_device
from turnout.cli.early import check_seed, check_there
from turnout.errors import UsageError, word

if TYPE_CHECKING:
    from turnout.recipes.steps import Step

HELP = "reshape a model on disk, and write it in the format it came in"

_DTYPES = ("float32", "float16", "bfloat16")
_GGUF = ("f32", "f16", "bf16", "q8_0", "q4_0", "mxfp4")
# What each step's own options may be, the first being the step's argument.
_TAKES = {
    "--to": ("--experts", "--top-k", "--granularity"),
    "--split": ("--top-k", "--by"),
    "--drop-experts": ("--by",),
    "--merge-experts": (),
    "--compress-experts": ("--rows", "--by"),
    "--latent": ("--share",),
    "--densify": (),
    "--bits": ("--group", "--codes", "--method", "--act-order", "--head"),
}

_NEEDS = {"--to": ("--experts", "--top-k"), "--split": ("--top-k",)}


class _InOrder(argparse.Action):
    """Keeps options and their values in the order of the command line."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        namespace.given = [*namespace.given, (self.option_strings[0], values)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout convert`` takes."""
    parser.add_argument("path", metavar="PATH", help="the model's folder, or org/name of the hub")
    parser.set_defaults(given=[])
    steps = parser.add_argument_group("steps, any number, in this order")
    steps.add_argument("--to", action=_InOrder, choices=["moe"], help="dense to sparse, by copies (upcycling)")
    steps.add_argument("--split", action=_InOrder, type=int, metavar="E", help="dense to sparse: deal out the neurons")
    steps.add_argument("--drop-experts", action=_InOrder, metavar="N|P%", help="so many experts of each layer go")
    steps.add_argument(
        "--merge-experts", action=_InOrder, type=int, metavar="N", help="so many experts are left, on average"
    )
    steps.add_argument("--compress-experts", action=_InOrder, type=int, metavar="RANK", help="low rank, and a few rows")
    steps.add_argument("--latent", action=_InOrder, type=int, metavar="RANK", help="experts in a space that they share")
    steps.add_argument(
        "--densify", action=_InOrder, nargs=0, help="write out compressed and merged experts, and few bits"
    )
    steps.add_argument("--bits", action=_InOrder, type=int, metavar="N", help="weights in 4 or 8 bits; comes last")
    of = parser.add_argument_group("of the step before")
    of.add_argument("--experts", action=_InOrder, type=int, metavar="E", help="of --to: how many")
    of.add_argument("--top-k", action=_InOrder, type=int, metavar="K", help="of --to and --split: experts per token")
    of.add_argument("--granularity", action=_InOrder, type=int, metavar="G", help="of --to: shards a layer (default 1)")
    of.add_argument("--rows", action=_InOrder, type=float, metavar="P", help="of --compress-experts: share (0.1)")
    of.add_argument("--share", action=_InOrder, type=int, metavar="N", help="of --latent: among so many (default all)")
    of.add_argument(
        "--by",
        action=_InOrder,
        metavar="HOW",
        help="of --drop-experts: reap (default), frequency, random; of --split: cluster (default), coactivation, "
        "gradient, random; of --compress-experts: sensitivity (default), magnitude, random",
    )
    _add_bits(of)
    many = parser.add_argument_group("adapters, in the place of steps")
    many.add_argument(
        "--adapters", nargs="+", metavar="DIR", help="folders of PEFT or org/name, LoRA adapters of this very model"
    )
    many.add_argument(
        "--router", metavar="NAME", help="who chooses among them (default arrow, which needs no training)"
    )
    many.add_argument(
        "--gate-text",
        action="append",
        default=[],
        metavar="ADAPTER=PATH",
        help="of --router phatgoose: text to train an adapter's gates on",
    )
    many.add_argument("--any-base", action="store_true", help="also adapters of a model of another name")
    parser.add_argument(
        "--calibration", metavar="PATH", help="a file or folder of text, for steps that look at text, and to measure on"
    )
    parser.add_argument(
        "--calibration-tokens", type=int, default=65_536, metavar="N", help="how much of it (default 65536 tokens)"
    )
    _add_formats(parser)
    parser.add_argument("--seed", type=int, default=0, help="of whatever a step draws (default 0)")
    add_device(parser)
    parser.add_argument("--out", metavar="DIR", help="the new folder")
    parser.add_argument("--dry-run", action="store_true", help="show the plan; load no weights, write nothing")
    parser.add_argument("--force", action="store_true", help="go on where the disk or the memory looks too small")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _add_formats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--as", dest="as_format", choices=["transformers", "model"], help="write another format")
    parser.add_argument(
        "--gguf", choices=_GGUF, help="write a file of llama.cpp instead, its weights stored so; no steps but --densify"
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="of --gguf: leave it out")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--zip", action="store_true", help="write the folder in fewer bytes, no bit lost; no steps")
    group.add_argument("--unzip", action="store_true", help="write what was zipped as it was")
    parser.add_argument("--dtype", choices=_DTYPES, help="read the weights in this dtype (default: as stored)")


def _add_bits(of: Any) -> None:
    """What --bits takes."""
    of.add_argument("--group", action=_InOrder, metavar="N|row", help="of --bits: inputs a scale (64; 8 bits: a row)")
    of.add_argument("--codes", action=_InOrder, metavar="TYPE", help="of --bits 4: int (default), float, nf4, quantile")
    of.add_argument(
        "--method", action=_InOrder, metavar="HOW", help="of --bits: nearest (default), or gptq, with --calibration"
    )
    of.add_argument("--act-order", action=_InOrder, nargs=0, help="of --method gptq: inputs of most power first")
    of.add_argument("--head", action=_InOrder, nargs=0, help="of --bits: the output layer too")


def run(arguments: argparse.Namespace) -> int:
    """Plans, converts, and says how far the model moved."""
    check_there("PATH", [arguments.path], "turnout convert", hub=True)
    check_there("--calibration", [arguments.calibration], "turnout convert")
    check_there("--adapters", arguments.adapters or [], "turnout convert", hub=True)
    grouped(arguments.given if not arguments.adapters else [])
    if not arguments.dry_run:
        _need_out(arguments)
    check_seed(arguments.seed, "turnout convert")
    if arguments.calibration_tokens < 1:
        raise _refusal("--calibration-tokens", str(arguments.calibration_tokens), "be at least 1", "leave it out")
    import torch

    from turnout.recipes.convert import convert
    from turnout.recipes.plan import make_plan
    from turnout.recipes.progress import progress_for

    steps = [] if arguments.adapters else read_steps(arguments.given)
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    if arguments.gguf:
        return _gguf(arguments, dtype)
    if arguments.zip or arguments.unzip:
        return _zip(arguments)
    if arguments.adapters:
        return _adapters(arguments, dtype)
    _refuse_without_adapters(arguments)
    if arguments.dry_run:
        plan = make_plan(arguments.path, steps, as_format=arguments.as_format, text=arguments.calibration, dtype=dtype)
        print(plan)
        return 0
    _need_out(arguments)
    progress = progress_for(quiet=arguments.quiet)
    try:
        done = convert(
            arguments.path,
            steps,
            arguments.out,
            as_format=arguments.as_format,
            text=arguments.calibration,
            text_tokens=arguments.calibration_tokens,
            dtype=dtype,
            seed=arguments.seed,
            force=arguments.force,
            device=arguments.device,
            say=progress.say,
            part=progress.part,
        )
    finally:
        progress.stop()
    print(done.summary())
    return 0


def _adapters(arguments: argparse.Namespace, dtype: Any) -> int:
    """Puts adapters and a router on the model, and says what they are worth."""
    from turnout.recipes.adapters import adapt, outline_adapters
    from turnout.recipes.progress import progress_for

    given = dict(arguments.given)
    if set(given) - {"--top-k"} or arguments.as_format:
        got = ", ".join([*(set(given) - {"--top-k"}), *(["--as"] if arguments.as_format else [])])
        raise _refusal("--adapters", f"also {got}", "come without steps", "convert first, then train adapters of that")
    gate_text: dict[str, str] = {}
    for pair in arguments.gate_text:
        name, equals, place = pair.partition("=")
        if not equals or not place:
            raise _refusal("--gate-text", pair, "be ADAPTER=PATH", f"write --gate-text {name or 'math'}=math.txt")
        gate_text[name] = place
    options: dict[str, Any] = {"router": arguments.router or "arrow", "any_base": arguments.any_base}
    options |= {"router_options": {"top_k": given["--top-k"]} if "--top-k" in given else {}}
    options |= {"gate_text": gate_text, "text": arguments.calibration, "dtype": dtype}
    if arguments.dry_run:
        print(outline_adapters(arguments.path, arguments.adapters, **options))
        return 0
    _need_out(arguments)
    progress = progress_for(quiet=arguments.quiet)
    try:
        done = adapt(
            arguments.path,
            arguments.adapters,
            arguments.out,
            text_tokens=arguments.calibration_tokens,
            device=arguments.device,
            say=progress.say,
            part=progress.part,
            **options,
        )
    finally:
        progress.stop()
    print(done)
    return 0


def _gguf(arguments: argparse.Namespace, dtype: Any) -> int:
    """Writes a file of llama.cpp, and says what is in it."""
    from turnout.recipes.gguf import write_gguf
    from turnout.recipes.progress import progress_for

    whole = [option for option, _ in arguments.given] == ["--densify"]
    _alone("--gguf", arguments, "convert first, then write that as GGUF", steps=not whole)
    progress = progress_for(quiet=arguments.quiet)
    try:
        kind, tokenizer = arguments.gguf, not arguments.no_tokenizer
        how = {"kind": kind, "tokenizer": tokenizer, "whole": whole, "dtype": dtype}
        done = write_gguf(arguments.path, arguments.out, **how, say=progress.say)
    finally:
        progress.stop()
    print(f"{arguments.out}: {done}")
    return 0


def _zip(arguments: argparse.Namespace) -> int:
    """Writes a folder in fewer bytes, or as it was, and says how many."""
    from turnout.recipes.progress import progress_for
    from turnout.recipes.zipped import unzip_folder, zip_folder

    name = "--zip" if arguments.zip else "--unzip"
    also = {"--gguf": arguments.gguf, "--dtype": arguments.dtype}
    _alone(
        name, arguments, f"convert first, then {name[2:]} that", *(option for option, given in also.items() if given)
    )
    progress = progress_for(quiet=arguments.quiet)
    try:
        do = zip_folder if arguments.zip else unzip_folder
        done = do(arguments.path, arguments.out, say=progress.say)
    finally:
        progress.stop()
    print(f"{arguments.out}: {done.after_bytes:,} bytes of weights, {100 * done.share:.1f} % of {done.before_bytes:,}")
    return 0


def _alone(name: str, arguments: argparse.Namespace, fix: str, *others: str, steps: bool = True) -> None:
    """Refuses steps, adapters and other formats beside an option that has a job of its own; and no --out."""
    idle = {
        "--adapters": arguments.adapters,
        "--as": arguments.as_format,
        "--calibration": arguments.calibration,
    }
    given = [option for option, _ in arguments.given] if steps else []
    also = [*given, *others, *(option for option, given in idle.items() if given)]
    if also:
        raise _refusal(name, f"also {', '.join(also)}", "come without steps", fix)
    if arguments.dry_run:
        raise _refusal("--dry-run", f"{name}, which has no plan", "go with steps", "leave it out, and add --out")
    _need_out(arguments)


def _refuse_without_adapters(arguments: argparse.Namespace) -> None:
    for option, value in (("--router", arguments.router), ("--gate-text", arguments.gate_text)):
        if value:
            raise _refusal(option, "no --adapters", "come with adapters", "add --adapters DIR DIR")


def _need_out(arguments: argparse.Namespace) -> None:
    if arguments.out is None:
        raise _refusal("--out", "nothing", "name the output folder", "add --out DIR, or --dry-run to see the plan only")


def read_steps(given: Sequence[tuple[str, Any]]) -> list["Step"]:
    """The steps that options in the order of the command line describe.

    Raises:
        UsageError: an option that belongs to no step before it, comes twice, or is missing.
    """
    return [_step(name, value, options) for name, value, options in grouped(given)]


def grouped(given: Sequence[tuple[str, Any]]) -> list[tuple[str, Any, dict[str, Any]]]:
    """Each step with its value and its own options; nothing is loaded for that.

    Raises:
        UsageError: an option that belongs to no step before it, comes twice, or is missing.
    """
    found: list[tuple[str, Any, dict[str, Any]]] = []
    for option, value in given:
        if option in _TAKES:
            found.append((option, value, {}))
            continue
        owners = [name for name, takes in _TAKES.items() if option in takes]
        if not found or option not in _TAKES[found[-1][0]]:
            after = f"after {found[-1][0]}" if found else "before any step"
            raise _refusal(
                option, after, f"come after {' or '.join(owners)}", f"put {option} behind the step it belongs to"
            )
        if option in found[-1][2]:
            raise _refusal(option, f"two for {found[-1][0]}", "come once a step", "leave one of them out")
        found[-1][2][option] = value
    for name, _, options in found:
        _need(name, options, *_NEEDS.get(name, ()))
    return found


def _step(name: str, value: Any, options: Mapping[str, Any]) -> "Step":
    from turnout.recipes import steps

    by = {"by": options["--by"]} if "--by" in options else {}
    if name == "--to":
        return steps.Upcycle(options["--experts"], options["--top-k"], options.get("--granularity", 1))
    if name == "--split":
        return steps.Split(value, options["--top-k"], **by)
    if name == "--merge-experts":
        return steps.Merge(value)
    if name == "--compress-experts":
        return steps.Compress(value, options.get("--rows", 0.1), **by)
    if name in ("--latent", "--densify"):
        return steps.Densify() if name == "--densify" else steps.Latent(value, options.get("--share"))
    if name == "--bits":
        return _quantize(value, options)
    number, is_share = value.removesuffix("%"), value.endswith("%")
    try:
        size = float(number) / 100 if is_share else int(number)
    except ValueError as error:
        allowed, fix = "be a share or a whole number", "write --drop-experts 25% or --drop-experts 2"
        raise _refusal(name, value, allowed, fix) from error
    return steps.Drop(share=size, **by) if is_share else steps.Drop(count=int(size), **by)


def _quantize(bits: int, options: Mapping[str, Any]) -> "Step":
    from turnout.recipes import steps

    if bits not in (4, 8):
        raise _refusal("--bits", str(bits), "be 4 or 8", f"write --bits {8 if bits > 4 else 4}")
    given = options.get("--group", "row" if bits == 8 else "64")
    if given != "row" and not (given.isdecimal() and int(given)):
        raise _refusal("--group", given, "be a whole number of at least 1, or row", "write --group 64")
    words = {name: options[f"--{name}"] for name in ("codes", "method") if f"--{name}" in options}
    switches = {"act_order": "--act-order" in options, "head": "--head" in options}
    return steps.Quantize(bits, None if given == "row" else int(given), **words, **switches)


def _need(step: str, options: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if name not in options:
            example = {"--experts": "--experts 8", "--top-k": "--top-k 2"}[name]
            raise _refusal(step, f"no {name}", f"be followed by {' and '.join(names)}", f"add {example} behind it")


def _refusal(what: str, got: str, allowed: str, fix: str) -> UsageError:
    return UsageError(word(what, got=got, allowed=allowed, where="turnout convert", fix=fix))
