"""List the methods that turnout has, room by room, each with the paper it comes from.

examples:
  turnout methods
  turnout methods token             only rooms or methods whose name contains this
  turnout methods LossFree --long   with the whole documentation
"""

import argparse
import importlib
import inspect

HELP = "list the methods and their papers"

# The rooms whose public names are methods, in the order of the house.
ROOMS = ("decide.token", "run", "paths", "layers", "train.balance", "claims", "recipes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout methods`` takes."""
    parser.add_argument("name", nargs="?", default="", help="show only what contains this")
    parser.add_argument("--long", action="store_true", help="show the whole documentation")


def run(arguments: argparse.Namespace) -> int:
    """Prints the list."""
    from turnout.errors import nearest

    wanted, seen, shown = arguments.name.lower(), set(), 0
    for room in ROOMS:
        module = importlib.import_module(f"turnout.{room}")
        rows = []
        for name in module.__all__:
            item = getattr(module, name)
            text = inspect.getdoc(item) or ""
            if not callable(item) or "Source: none; plain" in text:
                continue  # a table of methods, or what only serves them
            seen.add(name)
            if wanted in room or wanted in name.lower():
                rows.append((name, text))
        if rows:
            print(f"{room}: {(module.__doc__ or '').splitlines()[0]}")
        for name, text in rows:
            print(f"  {name:<20} {text if arguments.long else text.splitlines()[0]}")
            if not arguments.long and "Source:" in text:
                print(f"  {'':<20} {' '.join(text.split('Source:')[1].split())}")
        shown += len(rows)
    if not shown:
        raise nearest(arguments.name, seen, kind="method", where="turnout methods")
    return 0
