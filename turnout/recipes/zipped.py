"""A model's folder in fewer bytes, no bit lost; and as it was."""

import shutil
from collections.abc import Callable
from pathlib import Path

from turnout.errors import CheckpointError, word
from turnout.hub import located
from turnout.models.checkpoint.whole_folder import whole_folder
from turnout.models.checkpoint.zipped import END, Zipped, unzip, zip_weights
from turnout.reading import check_link
from turnout.recipes.partial import Say, refuse_existing

__all__ = ["unzip_folder", "zip_folder"]

_WHERE = "turnout convert"
_WEIGHTS = ".safetensors"


def zip_folder(path: str | Path, out: str | Path, *, say: Say = lambda text: None) -> Zipped:
    """Writes a folder with its weights in fewer bytes, which is read as it is by whatever of ours reads folders.

    Args:
        path: any folder with weights, or a model of the hub.
        out: the new folder; must not exist.
        say: is told what happens.

    Raises:
        TurnoutError: anything the user can mend; ``out`` does not exist then.
    """

    def one(file: Path, target: Path) -> tuple[int, int]:
        done = zip_weights(file, target.with_name(target.name + END))
        return done.before_bytes, done.after_bytes

    return _folder(path, out, _WEIGHTS, one, say)


def unzip_folder(path: str | Path, out: str | Path, *, say: Say = lambda text: None) -> Zipped:
    """Writes the folder that was zipped, every file as it was; arguments and errors as ``zip_folder``."""

    def one(file: Path, target: Path) -> tuple[int, int]:
        plain = target.with_name(target.name.removesuffix(END))
        unzip(file, plain)
        return file.stat().st_size, plain.stat().st_size

    return _folder(path, out, END, one, say)


def _folder(
    path: str | Path, out: str | Path, suffix: str, do: Callable[[Path, Path], tuple[int, int]], say: Say
) -> Zipped:
    """Does it to the files with this suffix, and copies all others."""
    out, source = Path(out), located(path, where=_WHERE).folder
    refuse_existing(out)
    files = [file for file in sorted(source.rglob("*")) if file.is_file()]
    if not any(file.name.endswith(suffix) for file in files):
        got, fix = f"{source}, which has no file *{suffix}", "name a folder with weights"
        if suffix == END:
            fix += " that turnout convert --zip wrote"
        raise CheckpointError(word("the folder", got=got, allowed="hold such weights", where=_WHERE, fix=fix))
    sizes = []
    with whole_folder(out, _WHERE) as aside:
        for file in files:
            check_link(file)
            target = aside / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.name.endswith(suffix):
                say(f"{'unzipping' if suffix == END else 'zipping'} {file.name}")
                sizes.append(do(file, target))
            else:
                shutil.copyfile(file, target)
    return Zipped(sum(before for before, _ in sizes), sum(after for _, after in sizes))
