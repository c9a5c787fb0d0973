"""A pickle of tensors read as data: our own small machine, which knows the instructions that describe containers and tensors.

It never imports, never calls and never builds an object of a class that the pickle names: the few names that torch writes for tensors are
looked up in a table of words, everything else is an error. Memory and time are linear in the pickle, whatever it claims.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from modelglue.checkpoint.formats.header import shown

#: bytes of one pickle: names and shapes of a hundred thousand tensors take a third of it
MAX_PICKLE_BYTES = 2**26
#: lists, tuples and dicts in one pickle, and instructions: enough for several hundred thousand tensors
_MAX_CONTAINERS = 3_000_000
_MAX_STEPS = 30_000_000
_LONGEST_LINE = 10_000
#: begins the key of a dict that was no text, such as the parameter numbers of an optimiser
NUMBERED = "\0"
_MANY = 2**63

#: storage class -> dtype; "" where elements are bytes and the tensor says its dtype itself
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64", "UntypedStorage": "", "Float8_e4m3fnStorage": "F8_E4M3", "Float8_e5m2Storage": "F8_E5M2",
}  # fmt: skip
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL", "complex64": "C64", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Storage:
    """A block of elements that the pickle refers to: its key in the file, its dtype ("" for bytes) and its number of elements."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it was pickled: a window (in elements) on a storage."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class PickleError(ValueError):
    """A pickle that is damaged, or that asks for more than tensors and plain containers; the words fit behind "its pickle"."""


class BoundedReader:
    """The part of a file that a pickle may stand in, handed out piece by piece; no claim makes it read more."""

    def __init__(self, data: Callable[[int, int], bytes], begin: int, end: int) -> None:
        self._data = data
        self._end = end
        self.position = begin

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self._end - self.position:
            raise PickleError("is cut off")
        text = self._data(self.position, self.position + count)
        self.position += count
        return text

    def readline(self) -> bytes:
        text = self._data(self.position, min(self.position + _LONGEST_LINE, self._end))
        line = text[: text.find(b"\n") + 1]
        if not line:
            raise PickleError("holds an endless line")
        self.position += len(line)
        return line


@dataclass(frozen=True, slots=True)
class _Name:
    """A word of the table: what the pickle may refer to, which is never resolved."""

    kind: str
    value: str


def _names() -> dict[tuple[str, str], _Name]:
    known = {
        ("collections", "OrderedDict"): _Name("dict", ""),
        ("torch", "Size"): _Name("size", ""),
        ("torch", "device"): _Name("device", ""),
        ("torch", "Tensor"): _Name("type", ""),
        ("torch.nn.parameter", "Parameter"): _Name("type", ""),
        ("torch.nn.parameter", "Buffer"): _Name("type", ""),
        ("torch._utils", "_rebuild_tensor"): _Name("tensor", "4"),
        ("torch._utils", "_rebuild_tensor_v2"): _Name("tensor", "6 7"),
        ("torch._utils", "_rebuild_tensor_v3"): _Name("tensor", "7 8"),
        ("torch._utils", "_rebuild_parameter"): _Name("parameter", "3"),
        ("torch._utils", "_rebuild_parameter_with_state"): _Name("parameter", "4"),
        ("torch._tensor", "_rebuild_from_type_v2"): _Name("subclass", ""),
    }
    for name, dtype in _STORAGES.items():
        module = "torch.storage" if name == "UntypedStorage" else "torch"
        known[module, name] = _Name("storage", dtype)
    known.update({("torch", name): _Name("dtype", dtype) for name, dtype in _DTYPES.items()})
    return known


_KNOWN: Mapping[tuple[str, str], _Name] = _names()


def read_pickle(reader: BoundedReader) -> Any:
    """The value of one pickle: None, bool, int, float, str, bytes, list, tuple, dict (with text as keys), `Storage`, `StoredTensor`.

    Reads up to its STOP and leaves the reader behind it. Raises PickleError.
    """
    machine = _Machine()
    begin = reader.position
    try:
        with warnings.catch_warnings():  # of odd escapes in text, which are the pickle's
            warnings.simplefilter("ignore")
            for opcode, argument, _ in pickletools.genops(reader):  # type: ignore[arg-type]  # it asks for read and readline only
                if reader.position - begin > MAX_PICKLE_BYTES:
                    raise PickleError(f"is longer than {MAX_PICKLE_BYTES:,} bytes")
                if opcode.name == "STOP":
                    return machine.pop()
                machine.step(opcode.name, argument)
    except PickleError:
        raise
    except (ValueError, IndexError, UnicodeError, OverflowError) as error:
        raise PickleError(f"is damaged ({shown(str(error))})") from error
    raise PickleError("is cut off")


class _Machine:
    """Stack, marks and memo of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.steps = self.containers = self.copied = 0

    def step(self, name: str, argument: Any) -> None:
        self.steps += 1
        if self.steps > _MAX_STEPS or self.containers > _MAX_CONTAINERS:
            raise PickleError("has more parts than any file of tensors")
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _VALUES:
            self.stack.append(argument)
        elif (run := _STEPS.get(name)) is not None:
            run(self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise PickleError(f"uses the instruction {name}, which no file of tensors needs")

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise PickleError("is damaged (its stack is empty)")
        return self.stack.pop()

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise PickleError("is damaged (its stack is empty)")
        return self.stack[-1]

    def push(self, container: Any) -> None:
        self.containers += 1
        self.stack.append(container)

    def since_mark(self) -> list[Any]:
        if not self.marks:
            raise PickleError("is damaged (a mark is missing)")
        place = self.marks.pop()
        items = self.stack[place:]
        del self.stack[place:]
        return items

    # -- one function per instruction; what they share is above -------------------------------------------------------------------

    def mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def put(self, argument: Any) -> None:
        place = len(self.memo) if argument is None else argument
        if not 0 <= place <= MAX_PICKLE_BYTES:
            raise PickleError(f"keeps a value at number {shown(place)}")
        self.memo[place] = self.top()

    def get(self, argument: Any) -> None:
        if argument not in self.memo:
            raise PickleError("is damaged (it recalls what it never kept)")
        self.stack.append(self.memo[argument])

    def empty_dict(self, _: Any) -> None:
        self.push({})

    def empty_list(self, _: Any) -> None:
        self.push([])

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def tuple_(self, _: Any) -> None:
        self.push(tuple(self.since_mark()))

    def list_(self, _: Any) -> None:
        self.push(self.since_mark())

    def dict_(self, _: Any) -> None:
        items = self.since_mark()
        self.push({})
        self.fill(items)

    def append(self, _: Any) -> None:
        value = self.pop()
        self.extend([value])

    def appends(self, _: Any) -> None:
        self.extend(self.since_mark())

    def extend(self, items: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise PickleError(f"appends to {_kind(target)}")
        target.extend(items)

    def set_item(self, _: Any) -> None:
        value = self.pop()
        self.fill([self.pop(), value])

    def set_items(self, _: Any) -> None:
        self.fill(self.since_mark())

    def fill(self, items: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(items) % 2:
            raise PickleError(f"sets items of {_kind(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | float | None):
                raise PickleError(f"has {_kind(key)} as a key")
            # Only text is hashed: numbers can be chosen so that they all fall into one place, and nested tuples take for ever.
            text = key if isinstance(key, str) else f"{NUMBERED}{key!r}"
            if text in target:
                raise PickleError(f"has the key {shown(key)} twice")
            target[text] = value

    def global_(self, argument: str) -> None:
        module, _, name = argument.partition(" ")  # a name with a blank in it is in no table
        self.name_of(module, name)

    def stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleError("is damaged (a name is not text)")
        self.name_of(module, name)

    def name_of(self, module: str, name: str) -> None:
        known = _KNOWN.get((module, name))
        if known is None:
            raise PickleError(f"asks for {shown(f'{module}.{name}')}, which is not one of the few names that tensors are made of")
        self.stack.append(known)

    def persistent(self, _: Any) -> None:
        self.stack.append(_storage(self.pop()))

    def build(self, _: Any) -> None:
        """State of an OrderedDict: module versions and the like, never weights."""
        state = self.pop()
        if not isinstance(self.top(), dict) or not isinstance(state, dict | None):
            raise PickleError(f"sets the state of {_kind(self.top())}")

    def reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise PickleError(f"calls {_kind(function)}")
        self.push(self.made(function, arguments))

    def made(self, function: _Name, arguments: tuple[Any, ...]) -> Any:
        if function.kind == "tensor" and str(len(arguments)) in function.value.split():
            return _tensor(arguments)
        if function.kind == "parameter" and str(len(arguments)) in function.value.split() and isinstance(arguments[0], StoredTensor):
            return arguments[0]
        if function.kind == "subclass" and len(arguments) == 4 and isinstance(arguments[0], _Name) and isinstance(arguments[2], tuple):
            known = isinstance(arguments[1], _Name) and arguments[1].kind == "type" and arguments[0].kind == "tensor"
            if known:
                return self.made(arguments[0], arguments[2])
        if function.kind == "dict" and len(arguments) <= 1:
            return self.ordered(arguments[0] if arguments else [])
        if function.kind == "size" and len(arguments) == 1 and isinstance(arguments[0], tuple):
            return arguments[0]
        if function.kind == "device" and all(isinstance(part, str | int) for part in arguments):
            return ":".join(map(str, arguments))
        raise PickleError(f"makes {function.kind} in a way that torch does not")

    def ordered(self, pairs: Any) -> dict[Any, Any]:
        """The old way of Python 2: an OrderedDict made of a list of pairs."""
        if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            raise PickleError("makes an OrderedDict in a way that torch does not")
        self.copied += len(pairs)
        if self.copied > MAX_PICKLE_BYTES:
            raise PickleError("copies the same list again and again")
        self.push({})
        self.fill([part for pair in pairs for part in pair])
        made: dict[Any, Any] = self.stack.pop()
        return made


def _storage(value: Any) -> Storage:
    """What torch calls a storage from outside the pickle: ("storage", class, key, location, number of elements[, view])."""
    if not isinstance(value, tuple) or len(value) not in (5, 6) or value[0] != "storage":
        raise PickleError(f"refers to something outside that is not a storage: {_kind(value)}")
    _, kind, key, _, numel = value[:5]
    if not isinstance(kind, _Name) or kind.kind != "storage" or not isinstance(key, str) or not _is_count(numel):
        raise PickleError("refers to a storage in a way that torch does not")
    if len(value) == 6 and value[5] is not None:
        raise PickleError("refers to a view of a storage, as torch before 0.4 did")
    return Storage(key, kind.value, numel)


def _tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    storage, offset, shape, stride = arguments[:4]
    dtype = arguments[6] if len(arguments) > 6 and isinstance(arguments[6], _Name) else None
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride):
        raise PickleError("makes a tensor in a way that torch does not")
    if not all(map(_is_count, (offset, *shape, *stride))) or (dtype is not None and dtype.kind != "dtype"):
        raise PickleError("makes a tensor whose shape, stride or offset are no whole numbers")
    if dtype is not None and storage.dtype not in ("", dtype.value):
        raise PickleError(f"makes a tensor of {dtype.value} on a storage of {storage.dtype}")
    return StoredTensor(storage, dtype.value if dtype is not None else storage.dtype or "U8", offset, shape, stride)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MANY


def _kind(value: Any) -> str:
    """What a message calls a value; never its repr, which nests as deeply as the pickle did."""
    return f"the name {value.kind}" if isinstance(value, _Name) else f"a {type(value).__name__}"


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
})  # fmt: skip
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark, "PUT": _Machine.put, "BINPUT": _Machine.put, "LONG_BINPUT": _Machine.put, "MEMOIZE": _Machine.put,
    "GET": _Machine.get, "BINGET": _Machine.get, "LONG_BINGET": _Machine.get,
    "EMPTY_DICT": _Machine.empty_dict, "EMPTY_LIST": _Machine.empty_list, "DICT": _Machine.dict_, "LIST": _Machine.list_,
    "TUPLE": _Machine.tuple_, "TUPLE1": lambda machine, _: machine.tuple_of(1), "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3), "APPEND": _Machine.append, "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item, "SETITEMS": _Machine.set_items, "GLOBAL": _Machine.global_, "STACK_GLOBAL": _Machine.stack_global,
    "BINPERSID": _Machine.persistent, "BUILD": _Machine.build, "REDUCE": _Machine.reduce,
}  # fmt: skip
