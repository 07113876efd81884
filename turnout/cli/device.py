"""The option --device, the same for every command that runs a model."""

import argparse

from turnout.errors import UsageError, word
from turnout.fields import device_name

__all__ = ["add_device", "check_device", "device_field"]


def add_device(parser: argparse.ArgumentParser, *, default: str | None = "auto", note: str = "") -> None:
    """Adds ``--device``; whether there is such a device is for the function behind the command to say.

    Args:
        parser: of the command.
        default: what it is without one; None leaves that to the function.
        note: what to say of the default.
    """
    text = note or "auto (default: CUDA where it is there, else the CPU)"
    parser.add_argument("--device", default=default, metavar="DEVICE", help=f"{text}, cpu, cuda, cuda:1 or mps")


def check_device(arguments: argparse.Namespace) -> None:
    """Refuses what is a device nowhere, while torch is not loaded yet; ``turnout verify`` takes fewer, and says so.

    Raises:
        UsageError: ``--device`` is misspelt.

    >>> check_device(argparse.Namespace(command="train", device="cuda:1"))

    Source: none; plain bookkeeping.
    """
    given = getattr(arguments, "device", None)
    if given is None or arguments.command == "verify":
        return
    try:
        device_name(given, f"turnout {arguments.command}")
    except UsageError as error:
        text = str(error).replace("device must", "--device must", 1).replace("pass device=", "pass --device ", 1)
        raise UsageError(text) from None


def device_field(arguments: argparse.Namespace) -> list[str]:
    """``--device`` as the field=value that it stands for, where a command takes fields.

    Raises:
        UsageError: fields that say another.

    >>> device_field(argparse.Namespace(device="cpu", overrides=["width=96"]))
    ['train.device=cpu']

    Source: none; plain bookkeeping.
    """
    if arguments.device is None:
        return []
    said = [text for text in arguments.overrides if text.partition("=")[0] in ("device", "train.device")]
    if any(text.partition("=")[2] != arguments.device for text in said):
        got, fix = f"--device {arguments.device} and {said[0]}", f"leave {said[0]} out"
        raise UsageError(word("the device", got=got, allowed="be said once", where="the command line", fix=fix))
    return [f"train.device={arguments.device}"]
