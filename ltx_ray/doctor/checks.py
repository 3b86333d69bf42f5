"""A check of a node: a name, what was found, and what is wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Check:
    """One line. "warn": runs work, slower or less safely. "FAIL": runs that need it end or lose replicas."""

    status: Status
    name: str
    value: str
    wanted: str

    def line(self) -> str:
        return f"{self.status:<4} {self.name}: {self.value}; {self.wanted}"


def at_least(name: str, amount: float, unit: str, enough: float, least: float, why: str) -> Check:
    """An amount that should be `enough`, and fails below `least`."""
    status: Status = "ok" if amount >= enough else "warn" if amount >= least else "FAIL"
    return Check(status, name, f"{amount:,.4g} {unit}", f"{enough:,.4g} or more, {why}")
