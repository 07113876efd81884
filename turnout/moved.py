"""Old import paths: what moved in 0.2 still imports for one release, with a warning that names the new place."""

import importlib
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import MappingProxyType, ModuleType

__all__ = ["MODULES", "NAMES", "UNTIL", "Finder", "name"]

# The release without them.
UNTIL = "0.3"


def _floors() -> Iterator[tuple[str, str]]:
    """Every old module and its new path."""
    floors = {
        "measure show": "adaptation bars beside charts conversion conversion_record html:run page palette panels",
        "reshape reshape.live": "adopt",
        "reshape reshape.adapters": "attach adapted:folder beside:save live:host learned:trained routers phatgoose poly"
        " shards scale_and_shift",
        "reshape reshape.to_sparse": "upcycle split diversify read_me masked:neuron_masks neurons:neuron_groups",
        "reshape reshape.to_smaller": "compress_experts densify drop_experts factors latent_experts merge_experts",
        "reshape reshape.many_to_one": "average fisher interpolate soup stragglers task_vectors match"
        " agree:same_architecture",
        "reshape reshape": "kept:resumable",
        "train train.adapters": "descend router shards",
        "train train.federated": "fedjets",
    }
    for rooms, modules in floors.items():
        old, new = rooms.split()
        for module in modules.split():
            before, _, after = module.partition(":")
            yield f"turnout.{old}.{before}", f"turnout.{new}.{after or before}"


# Old module -> new module. ``turnout.reshape.live`` is a floor now, so what it was is not found by its old name.
MODULES: Mapping[str, str] = MappingProxyType({old: new for old, new in _floors() if old != "turnout.reshape.live"})

# Module -> the names that left it, and the module each is in now. Saved objects name their classes by these too.
NAMES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "turnout.measure": dict.fromkeys(
            ("AdaptationData", "ConversionData", "adaptation_html", "conversion_html", "report_html"), "turnout.show"
        ),
        "turnout.reshape": {},
        "turnout.reshape.live": dict.fromkeys(
            ("CHOICE", "SHARDS", "Living", "Saver", "alive", "changed", "freeze", "leave_alone", "put", "saved_by"),
            "turnout.reshape.adapters.host",
        ),
        "turnout.train": {},
        "turnout.train.federated": {"Local": "turnout.train.federated.rounds"},
    }
)


def name(room: str, wanted: str) -> object:
    """What ``room.wanted`` was before it moved, a name or a module of the room; for its ``__getattr__``.

    Raises:
        AttributeError: it never was there.

    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     name("turnout.measure", "report_html").__module__
    'turnout.show.run'

    Source: none; plain bookkeeping.
    """
    if f"{room}.{wanted}" in MODULES:
        now = MODULES[f"{room}.{wanted}"]
        _warn(f"{room}.{wanted}", now, stacklevel=4)
        return importlib.import_module(now)
    if wanted not in NAMES[room]:
        raise AttributeError(f"module {room!r} has no attribute {wanted!r}")
    now = NAMES[room][wanted]
    _warn(f"{room}.{wanted}", f"{now}.{wanted}", stacklevel=4)
    return getattr(importlib.import_module(now), wanted)


class Finder:
    """Finds old modules, after every other finder has looked: ``sys.meta_path`` asks it last.

    >>> Finder.find_spec("turnout.no_such_room") is None
    True

    Source: none; plain bookkeeping.
    """

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """How the module of an old name is loaded; None for a name that was never used."""
        if fullname not in MODULES:
            return None
        # The import system sets the module on its room, where a function of that name may be: it stays.
        sys.modules[fullname.rpartition(".")[0]].__class__ = _Room
        return ModuleSpec(fullname, cls())  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """The default one, which ``exec_module`` puts the real one in the place of."""

    def exec_module(self, module: ModuleType) -> None:
        """The module at its new path, in the place of the old."""
        now = MODULES[module.__name__]
        _warn(module.__name__, now, stacklevel=3)
        sys.modules[module.__name__] = importlib.import_module(now)


class _Room(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        old = isinstance(value, ModuleType) and f"{self.__name__}.{name}" in MODULES
        if not (old and name in self.__dict__):
            super().__setattr__(name, value)


def _warn(old: str, new: str, *, stacklevel: int) -> None:
    warnings.warn(f"{old} is now {new}; the old name goes with turnout {UNTIL}", FutureWarning, stacklevel=stacklevel)
