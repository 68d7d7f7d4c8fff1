"""The models a page can show: opened when somebody asks for one, a few kept in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.portable.classifier import Classifier

# (a prepared image, uint8 (side, side, 3); a label) → what speaks for it, float32 (side, side) in [0, 1]
Heat = Callable[[NDArray[np.uint8], int], NDArray[np.float32]]


@dataclass(frozen=True)
class ShownModel:
    """An open model.

    Attributes:
        heat: what in an image speaks for a class; None where the model cannot tell.
        facts: what the page says about it: (name, value).
    """

    classifier: Classifier
    heat: Heat | None = None
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Entry:
    """A model by the name people choose it by, and how it is opened (ValueError: one sentence).

    Attributes:
        note: said beside the name, such as its accuracy.
    """

    name: str
    open: Callable[[], ShownModel]
    note: str = ""


class Shelf:
    """All models of a page, of which the `keep` last used ones stay open.

    Example:
        >>> shelf = Shelf([Entry("mine", lambda: ShownModel(classifier))])
        >>> shelf.open("mine").classifier
    """

    def __init__(self, entries: Sequence[Entry], keep: int = 2) -> None:
        if not entries:
            raise ValueError("there is no model to show")
        self._entries = {entry.name: entry for entry in entries}
        assert len(self._entries) == len(entries), "names must differ"
        self._keep = keep
        self._opened: OrderedDict[str, ShownModel] = OrderedDict()
        self._turn = threading.Lock()  # of what is open, for a moment
        self._opening = threading.Lock()  # one at a time; whoever uses open ones does not wait for it

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    @property
    def choices(self) -> list[tuple[str, str]]:
        """(what people read, name)."""
        return [(f"{e.name} · {e.note}" if e.note else e.name, e.name) for e in self._entries.values()]

    def open(self, name: str | None) -> ShownModel:
        """The model of this name; None: the first one.

        Raises:
            ValueError: there is none, or it cannot be opened.
        """
        name = self.names[0] if name is None else name
        if name not in self._entries:
            raise ValueError(f"There is no model {name[:80]!r} here: choose one of {', '.join(self.names)}.")
        if (model := self._open_already(name)) is not None:
            return model
        with self._opening:
            if (model := self._open_already(name)) is not None:  # by whoever was here before
                return model
            with self._turn:
                while len(self._opened) >= self._keep:
                    self._opened.popitem(last=False)  # before the new one is read: both may not fit
            model = self._entries[name].open()
            with self._turn:
                self._opened[name] = model
            return model

    def _open_already(self, name: str) -> ShownModel | None:
        with self._turn:
            if name in self._opened:
                self._opened.move_to_end(name)
            return self._opened.get(name)
