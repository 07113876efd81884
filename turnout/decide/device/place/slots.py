"""Slots: the copies of one layer's experts while a search moves them about; what is dear is kept up to date."""

import numpy as np

from turnout.errors import UsageError, word

__all__ = ["Slots", "capacities", "speeds", "tables"]


class Slots:
    """Copies of experts on devices, and how long each device is busy. A mutable working table of a search.

    Args:
        load_E: of each expert; it is dealt evenly to its copies.
        held_GE: which device holds which expert.
        speed_G: of each device.
    """

    def __init__(self, load_E: np.ndarray, held_GE: np.ndarray, speed_G: np.ndarray) -> None:
        self.load_E, self.speed_G = np.asarray(load_E, dtype=float), speed_G
        self.held_GE = held_GE.astype(bool).copy()
        self.even = float(self.load_E.sum() / speed_G.sum())
        self.refresh()

    def refresh(self) -> None:
        """Counts again, from the table."""
        self.count_E = self.held_GE.sum(0)
        self.share_E = self.load_E / self.count_E
        self.time_G = self.held_GE @ self.share_E / self.speed_G

    @property
    def worst(self) -> float:
        """How long the busiest device takes, over how long all would if they were busy alike."""
        return float(self.time_G.max() / self.even) if self.even else 1.0

    def swap(self, device: int, expert: int, other: int, instead: int) -> None:
        """Two copies change places."""
        self.held_GE[[device, other], [expert, instead]] = False
        self.held_GE[[device, other], [instead, expert]] = True
        delta = self.share_E[expert] - self.share_E[instead]
        self.time_G[device] -= delta / self.speed_G[device]
        self.time_G[other] += delta / self.speed_G[other]

    def best_swap(self, device: int) -> tuple[float, int, int, int]:
        """The swap with another device after which the busier of the two is busy the least.

        Returns:
            How busy, over what is even; the copy's expert, the other device, and the expert that comes instead.
            Infinity where there is none.
        """
        mine_A = np.nonzero(self.held_GE[device])[0]
        other_B, theirs_B = np.nonzero(self.held_GE & ~self.held_GE[device])  # what is here already cannot come
        delta_AB = self.share_E[mine_A][:, None] - self.share_E[theirs_B][None]
        here_AB = self.time_G[device] - delta_AB / self.speed_G[device]
        there_AB = self.time_G[other_B] + delta_AB / self.speed_G[other_B]
        after_AB = np.where(self.held_GE[other_B][:, mine_A].T, np.inf, np.maximum(here_AB, there_AB))
        if not after_AB.size or not np.isfinite(after_AB.min()):
            return np.inf, -1, -1, -1
        a, b = np.unravel_index(after_AB.argmin(), after_AB.shape)
        return float(after_AB[a, b] / self.even), int(mine_A[a]), int(other_B[b]), int(theirs_B[b])

    def best_replacement(self, device: int) -> tuple[float, int, int, int]:
        """The spare copy anywhere else whose room is best given to one more copy of an expert of this device.

        Returns:
            As ``best_swap``, of the busiest of the devices that are concerned.
        """
        mine_A = np.nonzero(self.held_GE[device])[0]
        spare_GE = self.held_GE & (self.count_E > 1)
        spare_GE[device] = False
        other_B, theirs_B = np.nonzero(spare_GE)
        if not len(other_B):
            return np.inf, -1, -1, -1
        fewer_B = self.load_E[theirs_B] / (self.count_E[theirs_B] - 1)
        more_A = self.load_E[mine_A] / (self.count_E[mine_A] + 1)
        less_AG = self.held_GE[:, mine_A].T * (more_A - self.share_E[mine_A])[:, None]
        extra_BG = self.held_GE[:, theirs_B].T * (fewer_B - self.share_E[theirs_B])[:, None]
        extra_BG[np.arange(len(other_B)), other_B] = -self.share_E[theirs_B]
        load_ABG = (self.time_G * self.speed_G) + less_AG[:, None] + extra_BG[None]
        load_ABG[:, np.arange(len(other_B)), other_B] += more_A[:, None]
        concerned_BG = self.held_GE[:, theirs_B].T.copy()  # who gets more, and this device; the others get less or stay
        concerned_BG[:, device] = True
        after_AB = np.where(concerned_BG[None], load_ABG / self.speed_G, 0.0).max(2)
        after_AB[self.held_GE[other_B][:, mine_A].T | (mine_A[:, None] == theirs_B[None])] = np.inf
        if not np.isfinite(after_AB.min()):
            return np.inf, -1, -1, -1
        a, b = np.unravel_index(after_AB.argmin(), after_AB.shape)
        return float(after_AB[a, b] / self.even), int(mine_A[a]), int(other_B[b]), int(theirs_B[b])

    def best_cycle(self, device: int, goal: float) -> tuple[int, int, int, int, int] | None:
        """Three copies that go round: from this device to an idle one, from that to another busy one, from there here.

        Three moves then mend two devices, where exchanges take four.

        Returns:
            This device's expert, the idle device and its expert, the other busy device and its; of those after which
            all three are at the goal, the one that mends the busiest. None where there is none.
        """
        limit = goal * self.even
        busy_G = self.time_G > limit
        busy_G[device] = False
        mine_A = np.nonzero(self.held_GE[device])[0]
        busy_C, from_C = np.nonzero(self.held_GE & busy_G[:, None] & ~self.held_GE[device])
        idle_B, from_B = np.nonzero(self.held_GE & (self.time_G < self.even)[:, None])
        if not len(busy_C) or not len(idle_B):
            return None
        a_A, b_B, c_C = self.share_E[mine_A], self.share_E[from_B], self.share_E[from_C]
        here_AC = self.time_G[device] - (a_A[:, None] - c_C[None]) / self.speed_G[device] <= limit
        idle_AB = self.time_G[idle_B] + (a_A[:, None] - b_B[None]) / self.speed_G[idle_B] <= limit
        busy_CB = self.time_G[busy_C][:, None] - (c_C[:, None] - b_B[None]) / self.speed_G[busy_C][:, None] <= limit
        idle_AB &= ~self.held_GE[idle_B][:, mine_A].T
        busy_CB &= ~self.held_GE[busy_C][:, from_B]
        fits_ACB = here_AC[:, :, None] & idle_AB[:, None] & busy_CB[None]
        if not fits_ACB.any():
            return None
        # The busiest first; of idle ones, the one that is left with least room, so that the idlest wait for the worst.
        worth_ACB = (
            self.time_G[busy_C][None, :, None]
            + 1e-3 * ((a_A[:, None] - b_B[None]) / self.speed_G[idle_B] + self.time_G[idle_B])[:, None]
        )
        a, c, b = np.unravel_index(np.where(fits_ACB, worth_ACB, -np.inf).argmax(), fits_ACB.shape)
        return int(mine_A[a]), int(idle_B[b]), int(from_B[b]), int(busy_C[c]), int(from_C[c])

    def cycle(self, device: int, expert: int, idle: int, second: int, busy: int, third: int) -> None:
        """``expert`` goes to the idle device, its ``second`` to the busy one, whose ``third`` comes here."""
        self.held_GE[[device, idle, busy], [expert, second, third]] = False
        self.held_GE[[idle, busy, device], [expert, second, third]] = True
        self.refresh()

    def replace(self, other: int, gone: int, come: int) -> None:
        """A device drops one copy and takes another."""
        self.held_GE[other, gone], self.held_GE[other, come] = False, True
        self.refresh()


def capacities(slots: int, devices: int) -> np.ndarray:
    """(G,) slots of each device, as even as can be."""
    return np.bincount(np.arange(slots) * devices // slots, minlength=devices)


def speeds(speed_G: np.ndarray | None, devices: int, where: str) -> np.ndarray:
    """(G,) the speeds, all 1 where none are given.

    Raises:
        UsageError: not a positive number for each device.
    """
    found = np.ones(devices) if speed_G is None else np.asarray(speed_G, dtype=float)
    if found.shape != (devices,) or not np.isfinite(found).all() or (found <= 0).any():
        fix = "leave speed_G out for like devices"
        allowed = f"be {devices} positive numbers, one a device"
        raise UsageError(word("speed_G", got=str(np.asarray(speed_G).tolist()), allowed=allowed, where=where, fix=fix))
    return found


def tables(load_LE: "list[np.ndarray] | tuple[np.ndarray, ...] | np.ndarray", devices: int, slots: int | None,
           where: str) -> tuple[list[np.ndarray], int]:  # fmt: skip
    """The loads in fp64, and the slots of a layer.

    Raises:
        UsageError: loads below 0, or slots in which the experts have no place, or which would hold one twice.
    """
    loads = [np.asarray(load_E, dtype=float) for load_E in load_LE]
    if not loads or any(one.ndim != 1 or not np.isfinite(one).all() or (one < 0).any() for one in loads):
        fix = "pass traffic.load_LE"
        raise UsageError(word("load_LE", got="others", allowed="be numbers of at least 0", where=where, fix=fix))
    most, fewest = max(map(len, loads)), min(map(len, loads))
    wanted = most if slots is None else slots
    per_device = -(-wanted // devices)
    if wanted < most or per_device > fewest:
        allowed = f"hold {most} experts on {devices} devices, none twice on one: {most} to {fewest * devices} slots,"
        fix = f"pass slots={most if wanted < most else fewest * devices}"
        raise UsageError(word("slots", got=wanted, allowed=allowed, where=where, fix=fix))
    return loads, wanted
