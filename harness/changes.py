"""What plugins change: in words, whose it is, how it is undone, and what of it still stands.

A plugin was active only if it changed the pipeline, and what it changed is still there. So every change goes through a
method that writes it down, and a plugin's own word counts for nothing. Setting what was there before is no change. One
that was put back, or in whose place another one came, stands no more; what wraps the thing that it finds lets earlier
changes stand below it. And a change has to be of something that the pipeline works with: of what it holds, or of what
a library keeps for everybody, as PyTorch its switches.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from types import FunctionType, MethodType, ModuleType, NoneType
from typing import Any

PLAIN = (bool, int, float, complex, str, bytes, NoneType, MethodType)
"""Types whose values are the same where they are equal; of all others each object is itself."""


@dataclass(frozen=True)
class Change:
    """One entry of the journal; `by` is the plugin that made it, None where that is nobody in particular.

    Changes of the same `place` follow one another there. `owner` is what holds the place, None where the pipeline
    itself does.
    """

    what: str
    by: str | None
    place: tuple[Any, ...]
    owner: object
    is_undone: Callable[[], bool]
    """Whether what was there before is there again."""
    is_there: Callable[[], bool]
    """Whether what was put there is still there."""
    wraps: bool = False


@dataclass
class Changeable:
    """What can be changed and become what it was again."""

    _journal: list[Change] = field(default_factory=list, init=False, repr=False, compare=False)
    _undo: list[Callable[[], None]] = field(default_factory=list, init=False, repr=False, compare=False)
    _by: str | None = field(default=None, init=False, repr=False, compare=False)
    _homes: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    @contextmanager
    def changing(self, by: str, home: str = "") -> Iterator[None]:
        """Within, every change is made by the plugin of that name, which is defined in the module `home`."""
        self._by, self._homes[by] = by, home
        try:
            yield
        finally:
            self._by = None

    def swap(self, owner: object, attribute: str, value: Any) -> None:
        """Set an attribute, and remember the old value (also where a module's registry held it)."""
        self._swap(owner, attribute, value, wraps=False)

    def wrap(self, owner: object, attribute: str, wrapper: Callable[[Any], Any]) -> None:
        """Set an attribute to `wrapper(current)`, which goes on using what it is given."""
        self._swap(owner, attribute, wrapper(getattr(owner, attribute)), wraps=True)

    def swap_item(self, mapping: dict, key: Any, value: Any) -> None:
        """Set a mapping's item, and remember what was there."""
        self._swap_item(mapping, key, value, wraps=False)

    def on_undo(self, undo: Callable[[], None]) -> None:
        """Run `undo` when everything is reset, last change first. This by itself is no change."""
        self._undo.append(undo)

    def reset(self) -> None:
        """Become what it was again."""
        while self._undo:
            self._undo.pop()()
        self._journal.clear()

    # -- what was changed ----------------------------------------------------------------------------------------

    def changes(self, by: str | None = None) -> list[str]:
        """Everything that was changed by a plugin, in words, whatever became of it."""
        return _in_words(change for change in self._journal if change.by == by)

    def standing(self) -> dict[str | None, list[str]]:
        """What still stands of everything that was changed, in words, by the plugin that changed it."""
        held = reachable(self, besides=(self._journal, self._undo))
        places: dict[tuple[Any, ...], list[Change]] = {}
        for change in self._journal:
            places.setdefault(change.place, []).append(change)
        found: dict[str | None, list[Change]] = {}
        for changes in places.values():
            if changes[0].is_undone() or not changes[-1].is_there():
                continue
            ground = max((index for index, change in enumerate(changes) if not change.wraps), default=0)
            for change in changes[ground:]:
                if self._is_at_work(change, held):
                    found.setdefault(change.by, []).append(change)
        return {by: _in_words(changes) for by, changes in found.items()}

    def _is_at_work(self, change: Change, held: set[int]) -> bool:
        """Whether the pipeline works with what was changed; what only the plugin knows of is nothing."""
        owner, home = change.owner, self._homes.get(change.by or "")
        if owner is None or id(owner) in held:
            return True
        if isinstance(owner, ModuleType):
            return owner.__name__ != home
        if isinstance(owner, type):
            return owner.__module__ != home
        library = sys.modules.get(type(owner).__module__)
        return library is not None and library.__name__ != home and any(x is owner for x in vars(library).values())

    # -- writing it down -----------------------------------------------------------------------------------------

    def _matters(self, owner: object, key: Any) -> bool:
        """Whether anything can depend on this attribute or item; a subclass knows labels and books of its own."""
        return True

    def _note(
        self,
        what: str,
        place: tuple[Any, ...],
        owner: object = None,
        is_undone: Callable[[], bool] = lambda: False,
        is_there: Callable[[], bool] = lambda: True,
        wraps: bool = False,
    ) -> None:
        self._journal.append(Change(what, self._by, place, owner, is_undone, is_there, wraps))

    def _swap(self, owner: object, attribute: str, value: Any, wraps: bool) -> None:
        old = getattr(owner, attribute)
        setattr(owner, attribute, value)
        self.on_undo(lambda: setattr(owner, attribute, old))
        if not same(old, value) and self._matters(owner, attribute):
            self._note(
                attribute if owner is self else f"{_name(owner)}.{attribute}",
                (id(owner), attribute),
                owner,
                lambda: same(getattr(owner, attribute, None), old),
                lambda: same(getattr(owner, attribute, None), value),
                wraps,
            )

    def _swap_item(self, mapping: dict, key: Any, value: Any, wraps: bool) -> None:
        missing = key not in mapping
        old = mapping.get(key)
        mapping[key] = value
        self.on_undo(lambda: mapping.pop(key) if missing else mapping.__setitem__(key, old))
        if (missing or not same(old, value)) and self._matters(mapping, key):
            own = next((f"{name}." for name, held in vars(self).items() if held is mapping), "")
            self._note(
                f"{own}{key}",
                (id(mapping), key),
                mapping,
                lambda: key not in mapping if missing else key in mapping and same(mapping[key], old),
                lambda: key in mapping and same(mapping[key], value),
                wraps,
            )


def same(one: Any, other: Any) -> bool:
    """Whether putting one in the other's place changes nothing."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if hasattr(one, "data_ptr"):  # a tensor's `data` is another object each time, over the same memory
        return _memory(one) == _memory(other)
    frozen = is_dataclass(one) and one.__dataclass_params__.frozen
    return (isinstance(one, PLAIN) or frozen) and bool(one == other)


def reachable(root: object, besides: Iterable[object]) -> set[int]:
    """Identities of all that `root` holds, directly or not; not by way of modules, classes, or objects of `besides`."""
    found, ahead = {id(other) for other in besides}, [root]
    while ahead:
        held = ahead.pop()
        if id(held) in found or isinstance(held, ModuleType | type):
            continue
        found.add(id(held))
        if isinstance(held, FunctionType):  # whose globals are everything
            ahead += [held.__closure__, held.__defaults__, held.__kwdefaults__, held.__dict__]
        else:
            ahead += gc.get_referents(held)
            ahead += [held.__dict__] if hasattr(held, "__dict__") else []
    return found


def _memory(tensor: Any) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _name(owner: object) -> str:
    if isinstance(owner, ModuleType | type):
        return owner.__name__
    return type(owner).__name__


def _in_words(changes: Iterable[Change]) -> list[str]:
    """Each change once, with how many there are of its kind."""
    counts = Counter(change.what for change in changes)
    return [f"{what} ({n})" if n > 1 else what for what, n in counts.items()]
