"""What installed packages of a user's own add to surgery, by entry points: measures, probe sets, families of wirings.

    [project.entry-points."surgery.families"]      in the package's pyproject.toml
    ends = "my_package:ends"                       `surgery scan --family ends`

They are listed without importing them; a package that cannot be imported is told where its name is used, and stops
nothing else. What an entry point must hold is in docs/extending.md.

>>> installed("families", built_in=("repeat",)).get("repeat") is None
True
"""

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

from surgery.outside import shown

KINDS = {"measures": "measure", "probes": "probe set", "families": "family"}
NAME = re.compile(r"[a-z][a-z0-9_-]*")


class PluginError(ValueError):
    """What a package adds cannot be used; the sentence names the package and says why."""


@dataclass(frozen=True)
class Plugin:
    """What a package adds under one name.

    Attributes:
        kind: one of ``KINDS``; name: as on the command line.
        package: name and version of the package; about: the package's own line about itself.
        entry: where it is.
    """

    kind: str
    name: str
    package: str
    about: str
    entry: EntryPoint

    def load(self) -> Any:
        """Import what it is. Raises PluginError, whatever the package raises."""
        try:
            return self.entry.load()
        except Exception as error:  # a package of somebody else's can raise anything
            raise self.error(error) from error

    def error(self, why: "Exception | str") -> PluginError:
        """The error that says why it cannot be used."""
        reason = why if isinstance(why, str) else f"{type(why).__name__}: {why}"
        return PluginError(f"the {KINDS[self.kind]} {self.name} of {self.package} cannot be used: {shown(reason, 300)}")

    @property
    def trouble(self) -> str:
        """Why it could not be imported, as far as can be told without trying; empty if nothing speaks against it."""
        package = self.entry.module.partition(".")[0]
        try:
            return "" if importlib.util.find_spec(package) else f"there is no module {package}"
        except (ImportError, ValueError) as error:
            return shown(str(error), 200)


def installed(kind: str, built_in: Iterable[str] = ()) -> dict[str, Plugin]:
    """What packages add, by name; without names that are built in, taken by another, or no word in small letters."""
    return {plugin.name: plugin for plugin, refused in _every(kind, built_in) if not refused}


def refused(kind: str, built_in: Iterable[str] = ()) -> list[str]:
    """In a sentence each, what is left out, and what cannot be imported."""
    every = list(_every(kind, built_in))
    sentences = [
        f"{KINDS[kind]} {shown(plugin.name)} of {plugin.package}: left out, {why}" for plugin, why in every if why
    ]
    return sentences + [str(plugin.error(plugin.trouble)) for plugin, why in every if not why and plugin.trouble]


def names(kind: str, built_in: Iterable[str]) -> tuple[str, ...]:
    """Every name of a kind, the built-in ones first."""
    built_in = tuple(built_in)
    return (*built_in, *installed(kind, built_in))


def _every(kind: str, built_in: Iterable[str]) -> list[tuple[Plugin, str]]:
    """Every entry point of a kind, and why it is left out, if it is."""
    taken, every = dict.fromkeys(built_in, "surgery"), []
    entries = importlib.metadata.entry_points(group=f"surgery.{kind}")
    for entry in sorted(entries, key=lambda entry: (entry.name, str(getattr(entry.dist, "name", "")))):
        plugin = _plugin(kind, entry)
        if not NAME.fullmatch(entry.name):
            why = "a name has small letters, digits, - and _ only"
        elif entry.name in taken:
            why = f"{taken[entry.name]} has that name already"
        else:
            why, taken[entry.name] = "", plugin.package
        every.append((plugin, why))
    return every


def _plugin(kind: str, entry: EntryPoint) -> Plugin:
    about = None if entry.dist is None else entry.dist.metadata.json.get("summary")
    package = f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unknown package"
    return Plugin(kind, entry.name, shown(package, 100), shown(str(about or ""), 200), entry)
