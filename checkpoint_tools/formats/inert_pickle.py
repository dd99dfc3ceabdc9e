"""Read pickles without running anything that they name.

`.metadata` of a distributed checkpoint and `data.pkl` of a rank file are pickles, and a pickle is a program: it names
functions to be called. Here every name that checkpoints use becomes an inert stand-in that only keeps its arguments,
nothing is ever imported, and any other name ends the reading.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from foundation.errors import WorkError

PACKAGES = ("torch", "megatron", "transformer_engine", "numpy", "apex")
"""What a checkpoint's arguments and tensors may be made of; they become stand-ins like all others."""
NAMES = {
    "argparse": {"Namespace"},
    "builtins": {"set", "frozenset", "bytearray", "complex", "range", "slice", "object", "int", "float", "str", "list"},
    "collections": {"OrderedDict", "defaultdict", "deque", "Counter"},
    "copyreg": {"_reconstructor"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "enum": {"Enum", "IntEnum"},
    "functools": {"partial"},
    "io": {"BytesIO"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "signal": {"Signals"},
    "types": {"SimpleNamespace"},
    "_codecs": {"encode"},
}
NAMES["__builtin__"] = NAMES["builtins"]


class Inert:
    """Stands for an object of a pickle: what it was called with, and the state that was put into it."""

    reference = ""
    """module.name, of the subclass made for it."""

    args: tuple[Any, ...]
    state: Any
    items: dict[Any, Any]

    def __new__(cls, *args: Any, **options: Any) -> Inert:
        made = super().__new__(cls)
        made.args, made.state, made.items = args, options or None, {}
        return made

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        self.items[len(self.items)] = value

    def extend(self, values: Any) -> None:
        for value in values:
            self.append(value)

    def add(self, value: Any) -> None:
        self.append(value)

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<{self.reference}>"

    def field(self, name: str, default: Any = None) -> Any:
        """An attribute of the state."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(io.BytesIO(data))
        self._where = where
        self._known: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            self._known[module, name] = self._stand_in(module, name)
        return self._known[module, name]

    def persistent_load(self, identifier: Any) -> Any:
        return Storage.of(identifier, self._where)

    def _stand_in(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("copyreg", "_reconstructor"):
            return _reconstructed
        package = module.partition(".")[0]
        if package not in PACKAGES and name not in NAMES.get(module, ()):
            raise WorkError(
                f"{self._where} names {module}.{name}, which no checkpoint needs: it is not read",
                cure="take the checkpoint from a source that you trust; nothing of it was run",
            )
        return type(name, (Inert,), {"reference": f"{module}.{name}", "__module__": __name__})


def _reconstructed(cls: Any, _base: Any, _state: Any) -> Any:
    return cls()


class Storage:
    """A tensor's bytes in a torch file: which record, of which numbers, how many."""

    def __init__(self, kind: str, key: str, count: int) -> None:
        self.kind, self.key, self.count = kind, key, count

    @classmethod
    def of(cls, identifier: Any, where: str) -> Storage:
        match identifier:
            case ("storage", kind, str(key), _, int(count)) if isinstance(kind, type) and issubclass(kind, Inert):
                return cls(kind.reference.rpartition(".")[2], key, count)
        raise WorkError(f"{where} is damaged: it points to {identifier!r}, which is no storage")


def load_inert(data: bytes, where: Path | str) -> Any:
    """What a pickle holds, with stand-ins for everything but plain values, tuples, lists and dicts.

    Args:
        data: the pickle.
        where: its file, for messages.

    Raises:
        WorkError: it names what no checkpoint needs, or is damaged.
    """
    try:
        return _Unpickler(data, str(where)).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise WorkError(f"{where} is damaged: {error}") from error
    except (UnicodeDecodeError, MemoryError, OverflowError, RecursionError) as error:
        raise WorkError(f"{where} is damaged: {type(error).__name__}") from error
