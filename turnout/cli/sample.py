"""Let a model continue a prompt: of a run, of transformers, or what turnout convert wrote.

examples:
  turnout sample runs/x --prompt "def main("
  turnout sample mixtral --prompt "Once upon a time" --temperature 0
  turnout sample runs/x --prompt "import" --tokens 200 --temperature 0.7 --seed 1
"""

import argparse

from turnout.cli.device import add_device
from turnout.cli.early import check_there

HELP = "let a model continue a prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout sample`` takes."""
    parser.add_argument(
        "run_folder", metavar="RUN", help="an output folder of turnout train, a model's folder, or org/name"
    )
    parser.add_argument("--prompt", default="", help="the text to continue (default: a new document)")
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens to generate (default: 100, or what fits)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top-k", type=int, metavar="N", help="draw among the N likeliest tokens only")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the prompt and its continuation."""
    check_there("RUN", [arguments.run_folder], "turnout sample", hub=True)
    from turnout.recipes.models import sample_model

    text = sample_model(
        arguments.run_folder,
        prompt=arguments.prompt,
        tokens=arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
        device=arguments.device,
    )
    print(text)
    return 0
