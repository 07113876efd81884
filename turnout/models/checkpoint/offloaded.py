"""Models whose experts stay in their files, but for those that fit into so many bytes."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from turnout.decide.device import expert_slots
from turnout.decide.device.cache import LRU
from turnout.errors import CheckpointError, UsageError, word
from turnout.expects import PATH, expects
from turnout.hub import located
from turnout.layers import MoE
from turnout.models.checkpoint import compressed, mxfp4, own
from turnout.models.checkpoint.expert_files import ExpertFile, FileExperts, Piece, Place, Range
from turnout.models.checkpoint.few_bits import Held, held_config, held_slots
from turnout.models.checkpoint.own import check_shape, fill, opened, outline, read_json, stored
from turnout.models.checkpoint.packed import check_finite
from turnout.models.checkpoint.survey import Survey, survey
from turnout.models.checkpoint.zipped import plain_or_zipped
from turnout.models.config import LMConfig
from turnout.models.families.tensors import Slot, slots
from turnout.models.lm import LM
from turnout.paths import Bank, OffloadedBank, PackedBank
from turnout.paths.offloaded import bank_parts
from turnout.run.pages import in_large_pages
from turnout.run.swap import ExpertCache
from turnout.types import CachePolicy, CacheShape, Packed, Routing

__all__ = ["load_offloaded"]

_WHERE = "turnout.models.checkpoint.load_offloaded"
Policy = CachePolicy | Callable[[CacheShape], CachePolicy]


@expects(path=PATH)
def load_offloaded(
    path: str | Path,
    *,
    expert_memory: int | str,
    dtype: torch.dtype | None = None,
    packed: bool = True,
    policy: Policy | None = None,
    shared: bool = False,
    threads: int = 1,
) -> LM:
    """The model in a folder, on the CPU, with as many of its experts in memory as fit; the others come when used.

    What it computes has the bits of the model that holds all of them (by the executor that "auto" takes on a CPU).
    Experts are read from the folder's own files, which must stay there and stay as they are; all else is read as
    ``load`` and ``from_hf`` do. Files that the system keeps in its own memory are read at the speed of that.
    ``lm.experts.stats()`` counts what came and what was waited for, ``lm.experts.close()`` gives all of it up.

    Args:
        path: a folder that ``save`` or transformers wrote, or a model of the hub.
        expert_memory: how many bytes experts may take: a number, or as "2GB", "500MB", "1.5GiB".
        dtype: of the weights, for a folder of transformers; None for the one they are stored in.
        packed: hold what a folder of transformers has in few bits as it is.
        policy: which experts stay (``turnout.decide.device.cache``), or what makes one for so many slots; None: LRU.
        shared: whether all layers share the slots, rather than having as many each, where there are enough for that.
        threads: how many read ahead while passes go on.

    Raises:
        CheckpointError: as ``load`` and ``from_hf``; or experts that are zipped, or quantised and not held so.
        UsageError: a model without experts, no size, or room for fewer experts than a token takes of one layer.

    >>> import tempfile
    >>> from turnout.models.lm import MoEConfig
    >>> lm = LM(LMConfig(vocab_size=8, width=8, layers=2, heads=2, moe=MoEConfig(num_experts=4, top_k=1, hidden=16)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     own.save(folder, lm)
    ...     few = load_offloaded(folder, expert_memory="5kB")
    ...     one, other = (model(torch.tensor([[1, 2, 3]])).logits_BSV for model in (few, lm.eval()))
    ...     few.experts.close()
    >>> torch.equal(one, other)
    True

    Source: Eliseev & Mazur, 2023, "Fast Inference of Mixture-of-Experts Language Models with Offloading".
    """
    path, files = located(path, where=_WHERE).folder, dict[str, ExpertFile]()
    foreign = bool({"model_type", "architectures"} & set(read_json(path / "config.json", _WHERE)))
    try:
        found = _of_transformers(path, dtype, packed, files) if foreign else _of_ours(path, dtype, files)
        cache = found.cache(expert_memory, policy or LRU(), shared=shared, threads=threads)
    except BaseException:
        for file in files.values():
            file.close()
        raise
    try:
        found.fill()
        found.give(cache)
    except BaseException:
        cache.close()
        raise
    return found.lm.eval().requires_grad_(False)


@dataclasses.dataclass(eq=False)
class _Found:
    """A folder's model while it is being put together: all but its experts' matrices has memory."""

    lm: LM
    path: Path
    files: Mapping[str, ExpertFile]
    # What is read at once, by the name of the tensor; and of each matrix of experts what is read later.
    whole: Mapping[str, tuple[str, Slot | Held | Tensor]]
    pieces: dict[tuple[int, int], list[Piece]]
    survey: Survey | None

    @property
    def banks(self) -> list[tuple[MoE, Bank | PackedBank]]:
        """The layers that have experts."""
        return _banks(self.lm)

    def cache(self, memory: int | str, policy: Policy, *, shared: bool, threads: int) -> ExpertCache:
        """Slots for as many experts as fit."""
        bank, moe = self.banks[0][1], self.lm.config.moe
        assert moe is not None
        parts = bank_parts(
            bank.width,
            bank.hidden,
            activation=bank.activation,
            dtype=self.lm.embedding.dtype,
            packs=self.lm.config.packs("experts"),
            bias=bank.up_bias is not None,
        )
        each, count = sum(part.nbytes for part in parts), len(self.banks)
        count_L = [bank.num_experts for _, bank in self.banks]
        sizes = {"expert_bytes": each, "layers": count, "experts": max(count_L), "top_k": moe.top_k}
        shape = expert_slots(memory, **sizes, shared=shared)
        biases = [[one for one in (bank.up_bias, bank.down_bias) if one is not None] for _, bank in self.banks]
        source = FileExperts(parts, self.pieces, biases, list(self.files.values()))
        return ExpertCache(
            source, shape, policy(shape) if callable(policy) else policy, threads=threads, num_experts_L=count_L
        )

    @torch.no_grad()
    def fill(self) -> None:
        """Reads all that is no expert's matrix."""
        for shard in sorted({file for file, _ in self.whole.values()}):
            with opened(self.path / shard) as file:
                for name, (_, place) in sorted((name, one) for name, one in self.whole.items() if one[0] == shard):
                    self._fill(file, name, shard, place)
        in_large_pages((*self.lm.parameters(), *self.lm.buffers()))

    def _fill(self, file: "own.MappedFile", name: str, shard: str, place: Slot | Held | Tensor) -> None:
        if isinstance(place, Held):
            assert self.survey is not None
            place.fill(self.survey.packed.matrix(file, self.path, name))
        elif isinstance(place, Tensor):
            fill(place, file.get_tensor(name), f"{name} in {self.path / shard}")
        else:
            check_shape(file.get_slice(name).get_shape(), place.shape, f"{name} in {self.path / shard}")
            place.view.copy_(place.cut(file.get_tensor(name)))

    def give(self, cache: ExpertCache) -> None:
        """Puts banks that ask the cache in the place of those that would hold all experts."""
        packs = self.lm.config.packs("experts")
        for layer, (moe, bank) in enumerate(self.banks):
            levels = None
            if isinstance(bank, PackedBank) and bank.up.levels is not None and bank.down.levels is not None:
                levels = bank.up.levels, bank.down.levels
            moe.bank = OffloadedBank(
                cache,
                layer,
                width=bank.width,
                hidden=bank.hidden,
                activation=bank.activation,
                packs=packs,
                levels=levels,
                up_bias=bank.up_bias,
                down_bias=bank.down_bias,
            )
        self.lm.experts = cache
        if self.lm.pre_gate is not None:
            self.lm.pre_gate.register_forward_hook(_foretelling(cache))


def _foretelling(cache: ExpertCache) -> Callable[[nn.Module, object, Routing], None]:
    """Tells the cache what a router that all layers share has decided before the first of them."""

    def tell(gate: nn.Module, given: object, routing: Routing) -> None:
        experts = routing.expert_R.unique().tolist()
        cache.foretell([experts] * cache.shape.layers)

    return tell


def _banks(lm: LM) -> list[tuple[MoE, Bank | PackedBank]]:
    moes = [module for module in lm.modules() if isinstance(module, MoE)]
    return [(moe, moe.bank) for moe in moes if isinstance(moe.bank, Bank | PackedBank)]


def _shell(config: LMConfig, dtype: torch.dtype, path: Path) -> LM:
    """The model, with memory for all but its experts' matrices."""
    lm = outline(config).to(dtype)
    banks = [bank for _, bank in _banks(lm)]
    if not banks:
        fix = "read it with turnout.models.checkpoint.load or from_hf"
        got = f"{path}, a model without experts" if config.moe is None else f"{path}, whose experts are factored"
        raise UsageError(word("the model", got=got, allowed="have experts of their own", where=_WHERE, fix=fix))
    inside = {id(module) for bank in banks for module in bank.modules()}
    for module in lm.modules():
        if id(module) not in inside:
            module.to_empty(device="cpu", recurse=False)
    for bank in banks:
        for name in ("up_bias", "down_bias"):
            if (bias := getattr(bank, name)) is not None:
                setattr(bank, name, nn.Parameter(torch.empty_like(bias, device="cpu"), requires_grad=False))
        for held in (bank.up, bank.down) if isinstance(bank, PackedBank) else ():
            if held.levels is not None:
                held.levels = torch.empty_like(held.levels, device="cpu")
    return lm


def _places(lm: LM) -> dict[int, tuple[int, int, int]]:
    """By the memory of a stack: whose layer it is of, which part of an expert, and how many numbers each has."""
    found = {}
    for layer, (_, bank) in enumerate(_banks(lm)):
        stacks = [bank.up, bank.down] if isinstance(bank, Bank) else [
            one for held in (bank.up, bank.down) for one in (held.code, held.scale)
        ]  # fmt: skip
        for part, stack in enumerate(stacks):
            found[stack.untyped_storage()._cdata] = layer, part, stack[0].numel()
    return found


def _cut(view: Tensor, places: Mapping[int, tuple[int, int, int]]) -> Iterator[tuple[int, int, Place]] | None:
    """(layer, expert, place) of each expert that a view of a stack shows; None of what is in no stack of experts."""
    if (at := places.get(view.untyped_storage()._cdata)) is None:
        return None
    layer, part, each = at
    if view.ndim > 2:  # of all experts
        shape, stride = tuple(view.shape[1:]), tuple(view.stride()[1:])
        return ((layer, expert, Place(part, shape, stride, int(view.storage_offset()))) for expert in range(len(view)))
    expert, offset = divmod(int(view.storage_offset()), each)
    return iter([(layer, expert, Place(part, tuple(view.shape), tuple(view.stride()), offset))])


def _open(path: Path, shards: Sequence[str], files: dict[str, ExpertFile]) -> None:
    """Opens the files that hold experts; whoever gave the dictionary closes them."""
    for shard in shards:
        if plain_or_zipped(path / shard) != path / shard:
            got, fix = f"{path / shard}, which is zipped", f"turnout unzip {path}, or read it whole"
            raise CheckpointError(word("the experts", got=got, allowed="lie plain", where=_WHERE, fix=fix))
        files[shard] = ExpertFile(path / shard)


def _of_ours(path: Path, dtype: torch.dtype | None, files: dict[str, ExpertFile]) -> _Found:
    """A folder that ``save`` wrote; its digest is checked, as ``load`` does."""
    weights = own.WEIGHTS
    _open(path, [weights], files)
    config, stored_as = own.describe(path)
    own.check_digest(path)
    if dtype not in (None, stored_as):
        fix = "leave dtype out, or write the model in that dtype first"
        raise UsageError(word("dtype", got=dtype, allowed=f"be {stored_as}, as {path} is", where=_WHERE, fix=fix))
    lm = _shell(config, stored_as, path)
    places = _places(lm)
    whole: dict[str, tuple[str, Slot | Held | Tensor]] = {}
    pieces: dict[tuple[int, int], list[Piece]] = {}
    slots_ = stored(lm)
    for name, key in own.keys_of(files[weights].names, slots_).items():
        cuts = _cut(slots_[name], places)
        if cuts is None:
            whole[key] = weights, slots_[name]
            continue
        lies = files[weights].range(key)
        for layer, expert, place in cuts:
            pieces.setdefault((layer, expert), []).append(Piece((lies[expert],), (place,)))
    found = _Found(lm, path, files, whole, pieces, None)
    lm.origin = own.origin_of(path)
    return found


def _of_transformers(path: Path, dtype: torch.dtype | None, packed: bool, files: dict[str, ExpertFile]) -> _Found:
    """A folder that transformers wrote."""
    found = survey(path, dtype)
    held_there = packed and bool(found.packed.scales)
    config = held_config(path, found) if held_there else found.config
    lm = _shell(config, found.dtype, path)
    target, held = held_slots(lm, found.names) if held_there else (slots(lm, found.names), dict[str, Held]())
    places, cuts = _places(lm), {}
    for name in found.where:
        one = held.get(name) or target.get(name)
        if one is not None and (cut := _cut(one.code if isinstance(one, Held) else one.view, places)) is not None:
            cuts[name] = list(cut)
    for name in cuts:
        if name in found.packed.scales and name not in held:
            fix = "convert it first (turnout convert), or read it whole"
            got = f"{found.packed.method}, which is read as the numbers that it stands for"
            raise CheckpointError(word("the experts", got=got, allowed="be plain or held", where=str(path), fix=fix))
    shards = {found.where[name] for name in cuts} | {found.packed.scales[name] for name in cuts if name in held}
    _open(path, sorted(shards), files)
    pieces: dict[tuple[int, int], list[Piece]] = {}
    for name, some in cuts.items():
        for layer, expert, piece in _pieces(name, some, found, files, held.get(name), places):
            pieces.setdefault((layer, expert), []).append(piece)
    whole = {
        name: (file, held.get(name) or target[name])
        for name, file in found.where.items()
        if name not in cuts and (name in held or name in target)
    }
    if levels := {name: one for name, one in held.items() if name in cuts and one.owner.levels is not None}:
        _set_levels(levels, found)
    lm.origin = path
    return _Found(lm, path, files, whole, pieces, found)


def _set_levels(held: Mapping[str, Held], found: Survey) -> None:
    """What MXFP4's codes stand for, which its files do not say."""
    assert found.packed.method == mxfp4.METHOD
    for one in held.values():
        assert one.owner.levels is not None
        one.owner.levels.copy_(mxfp4.levels())


def _pieces(
    name: str,
    cuts: Sequence[tuple[int, int, Place]],
    found: Survey,
    files: Mapping[str, ExpertFile],
    held: Held | None,
    places: Mapping[int, tuple[int, int, int]],
) -> Iterator[tuple[int, int, Piece]]:
    """What is read of each expert that a tensor of the folder holds."""
    file = files[found.where[name]]
    if held is None:
        lies = file.range(name)
        for layer, expert, place in cuts:
            yield layer, expert, Piece((lies[expert] if _fused(lies) else lies,), (place,))
        return
    beside = files[found.packed.scales[name]]
    scales = _cut(held.scale, places)
    assert scales is not None
    many = found.packed.method == mxfp4.METHOD
    words, scale, _ = (name + mxfp4.BLOCKS, name + mxfp4.SCALES, "") if many else compressed.parts_of(name)
    lies = file.range(words), beside.range(scale)
    for (layer, expert, code_at), (_, _, scale_at) in zip(cuts, scales, strict=True):
        if many:
            yield layer, expert, Piece((lies[0][expert], lies[1][expert]), (code_at, scale_at), _Blocks(found, name))
        else:
            yield layer, expert, Piece(lies, (code_at, scale_at), _Words(found, name))


def _fused(lies: Range) -> bool:
    """Whether a tensor of a folder holds all experts."""
    return len(lies.shape) > 2


@dataclasses.dataclass(frozen=True)
class _Words:
    """Reads a matrix as compressed-tensors packs it."""

    found: Survey
    name: str

    def __call__(self, words: Tensor, scale: Tensor) -> Packed:
        check_finite(Path(self.found.where[self.name]), self.name, scale)
        return compressed.unpack(words, scale, self.found.packed.shapes[self.name])


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Reads an expert's matrix in MXFP4."""

    found: Survey
    name: str

    def __call__(self, blocks: Tensor, scale: Tensor) -> Packed:
        check_finite(Path(self.found.where[self.name]), self.name, scale)
        return mxfp4.matrix_of(blocks[None], scale[None])
