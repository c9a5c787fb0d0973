"""Pickled weights: what torch writes is read lazily, tensor for tensor; whatever else a file says is refused, and nothing is run."""

from __future__ import annotations

import collections
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint import PickledCheckpoint, open_checkpoint, save
from modelglue.checkpoint.formats.opening import open_folder
from modelglue.checkpoint.formats.unpickle import BoundedReader, PickleError, read_pickle
from modelglue.errors import CheckpointError
from tests.checkpoint.files import randn
from tests.checkpoint.torch_files import TENSOR, TWO_FLOATS, WEIGHTS, number, pickle_of, stream_file, tensor, text, write, zip_file

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64,
    torch.uint32, torch.uint16, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


def bits(value: torch.Tensor) -> list[int]:
    return list(value.contiguous().view(-1).view(torch.uint8).tolist()) if value.numel() else []


def save_torch(value: Any, path: Path, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_folder(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    for word in words:
        assert word in message
    assert len(message) < len(str(path)) + 900
    message.encode()


# -- what torch writes ---------------------------------------------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_layout_is_read_bit_for_bit(tmp_path: Path, dtype: torch.dtype, zipped: bool) -> None:
    item = torch.empty(0, dtype=dtype).element_size()
    values = torch.randint(0, 2, (60 * item,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).view(dtype).view(3, 4, 5)
    tensors = {
        "whole": values, "turned": values.permute(2, 0, 1), "cut": values[1:, 1:3, ::2], "scalar": values[0, 0, 1], "empty": values[:0],
        "parameter": torch.nn.Parameter(values, requires_grad=False), "reversed strides": values.as_strided((5, 12), (1, 5)),
        "column": values[:, 1, 2],
    }  # fmt: skip
    checkpoint = PickledCheckpoint(save_torch(collections.OrderedDict(tensors), tmp_path / "m.pt", zipped))
    assert list(checkpoint.names()) == sorted(tensors)
    for name, expected in tensors.items():
        found = checkpoint.tensor(name)
        assert found.dtype == dtype
        assert checkpoint.info(name).shape == tuple(expected.shape)
        assert bits(found) == bits(expected)
        flat = expected.reshape(-1)
        for start in range(0, flat.numel(), 7):
            for stop in range(start, flat.numel() + 1, 5):
                assert bits(checkpoint.read(name, start, stop)) == bits(flat[start:stop])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_window_of_any_view_is_read(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    values = torch.arange(720.0).view(2, 3, 4, 5, 6)
    view = values.permute(data.draw(st.permutations(range(5))))
    for axis in range(5):
        step = data.draw(st.integers(1, 2))
        start = data.draw(st.integers(0, view.shape[axis] - 1))
        view = view.index_select(axis, torch.arange(start, view.shape[axis], step)) if data.draw(st.booleans()) else view.narrow(axis, 0, 1)
        view = view.transpose(0, axis)
    path = save_torch({"w": view, "v": values.permute(4, 2, 0, 1, 3)}, tmp_path_factory.mktemp("any") / "m.pt", data.draw(st.booleans()))
    checkpoint = PickledCheckpoint(path)
    for name, expected in (("w", view), ("v", values.permute(4, 2, 0, 1, 3))):
        start = data.draw(st.integers(0, expected.numel()))
        stop = data.draw(st.integers(start, expected.numel()))
        assert torch.equal(checkpoint.read(name, start, stop), expected.reshape(-1)[start:stop])
        out = torch.empty(stop - start)
        assert checkpoint.read(name, start, stop, out=out) is out
        assert torch.equal(out, expected.reshape(-1)[start:stop])


@FORMATS
def test_single_elements_of_a_turned_tensor_can_be_looked_at_as_bytes(tmp_path: Path, zipped: bool) -> None:
    """The writer does; torch calls one element contiguous whatever its stride."""
    values = torch.arange(12.0).view(3, 4)
    checkpoint = PickledCheckpoint(save_torch({"turned": values.t(), "column": values[:, 1]}, tmp_path / "m.pt", zipped))
    for name, expected in (("turned", values.t()), ("column", values[:, 1])):
        for place, value in enumerate(expected.reshape(-1).tolist()):
            assert checkpoint.read(name, place, place + 1).view(torch.uint8).tolist() == bits(torch.tensor([value]))


@FORMATS
def test_tied_tensors_keep_both_names(tmp_path: Path, zipped: bool) -> None:
    table = randn(4, 3)
    folder = tmp_path / "model"
    folder.mkdir()
    save_torch({"embed.weight": table, "lm_head.weight": table, "half": table[2:]}, folder / "pytorch_model.bin", zipped)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.names() == ("embed.weight", "half", "lm_head.weight")
    for name in ("embed.weight", "lm_head.weight"):
        assert torch.equal(checkpoint.tensor(name), table)
    assert torch.equal(checkpoint.tensor("half"), table[2:])
    save(checkpoint, tmp_path / "out")
    assert torch.equal(open_checkpoint(tmp_path / "out").tensor("lm_head.weight"), table)


def test_state_dict_of_a_module_is_read_with_its_metadata(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    checkpoint = PickledCheckpoint(save_torch(module.state_dict(), tmp_path / "m.pth"))
    assert list(checkpoint.names()) == sorted(module.state_dict())
    for name, value in module.state_dict().items():
        assert torch.equal(checkpoint.tensor(name), value)
    parameters = dict(module.named_parameters())
    with_parameters = PickledCheckpoint(save_torch(parameters, tmp_path / "p.pth"))
    assert torch.equal(with_parameters.tensor("0.weight"), parameters["0.weight"])


def test_tensors_with_attributes_are_read_without_them(tmp_path: Path) -> None:
    value, parameter = randn(3), torch.nn.Parameter(randn(2))
    value.note = "kept nowhere"  # type: ignore[attr-defined]
    parameter.note = "neither"  # type: ignore[attr-defined]
    checkpoint = PickledCheckpoint(save_torch({"w": value, "p": parameter}, tmp_path / "m.pt"))
    assert torch.equal(checkpoint.tensor("w"), value)
    assert torch.equal(checkpoint.tensor("p"), parameter)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@FORMATS
def test_every_protocol_is_read(tmp_path: Path, protocol: int, zipped: bool) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.arange(3.0), "épée": torch.ones(2)}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    checkpoint = PickledCheckpoint(path)
    assert checkpoint.names() == ("w", "épée")
    assert checkpoint.read("w").tolist() == [0, 1, 2]


NESTED: dict[str, Any] = {
    "state_dict": lambda w: {"state_dict": w, "epoch": 3, "lr": 0.1, "arch": "resnet", "best": None, "history": [1, (2, True)]},
    "model-and-optimiser": lambda w: {"model": w, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [{"lr": 1}]}},
    "module": lambda w: {"module": w, "rng_state": torch.zeros(4, dtype=torch.uint8)},
    "deep": lambda w: {"checkpoint": {"model": {"state_dict": w}}, "step": 2**80},
    "ordered": lambda w: collections.OrderedDict(state_dict=collections.OrderedDict(w)),
}


@pytest.mark.parametrize("name", NESTED)
@FORMATS
def test_weights_are_found_in_a_training_checkpoint(tmp_path: Path, name: str, zipped: bool) -> None:
    weights = {"a": randn(2, 3), "b": randn(4)}
    checkpoint = open_folder(save_torch(NESTED[name](weights), tmp_path / "last.ckpt", zipped))
    assert checkpoint.names() == ("a", "b")
    assert torch.equal(checkpoint.tensor("a"), weights["a"])


W = {"w": torch.ones(2)}
NOT_WEIGHTS: dict[str, tuple[Any, str]] = {
    "list": ([torch.ones(1)], "holds a list, not a dict of tensors"),
    "tensor": (torch.ones(1), "holds a StoredTensor, not a dict of tensors"),
    "numbers": ({"a": 1, "b": [2]}, "is no dict of tensors: it also holds 'a' (int), 'b' (list)"),
    "mixed": ({"w": torch.ones(1), "scale": 3.0}, "is no dict of tensors: it also holds 'scale' (float)"),
    "two-sets": ({"model": W, "ema": {"w": torch.zeros(2)}}, "holds several sets of weights: ['model'], ['ema']"),
    "loose": ({"model": W, "lm_head.weight": torch.ones(2)}, "has tensors beside its dict of weights: 'lm_head.weight'"),
    "numbered": ({0: torch.ones(1)}, "has a tensor under '0', which is not a name"),
    "half-a-character": ({"\ud800": torch.ones(1)}, "which is not a name"),
    "expanded": ({"w": torch.ones(1).expand(3)}, "tensor 'w' of shape (3,) repeats its 1 stored elements"),
    "complex-double": ({"w": torch.ones(1, dtype=torch.complex128)}, "asks for 'torch.ComplexDoubleStorage'"),
    "sparse": ({"w": torch.ones(2, 2).to_sparse()}, "asks for 'torch._utils._rebuild_sparse_tensor'"),
    "module-object": (torch.nn.Linear(1, 1), "asks for 'torch.nn.modules.linear.Linear'"),
}


@pytest.mark.parametrize("name", NOT_WEIGHTS)
@FORMATS
def test_what_is_no_dict_of_tensors_is_refused_by_name(tmp_path: Path, name: str, zipped: bool) -> None:
    value, words = NOT_WEIGHTS[name]
    refused(save_torch(value, tmp_path / "m.bin", zipped), words)


def test_empty_dict_is_a_model_without_tensors(tmp_path: Path) -> None:
    assert PickledCheckpoint(save_torch({}, tmp_path / "m.bin")).names() == ()


# -- folders ---------------------------------------------------------------------------------------------------------------------

FIRST, SECOND = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"


def shards(folder: Path, index: Any = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_torch({"a": torch.arange(4.0)}, folder / FIRST)
    save_torch({"b": torch.arange(6.0).view(2, 3)}, folder / SECOND)
    if index is not None:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.parametrize("index", [{"a": FIRST, "b": SECOND}, None], ids=["index", "no-index"])
def test_shards_are_read_with_and_without_an_index(tmp_path: Path, index: Any) -> None:
    checkpoint = open_checkpoint(shards(tmp_path, index))
    assert checkpoint.names() == ("a", "b")
    assert torch.equal(checkpoint.tensor("b"), torch.arange(6.0).view(2, 3))


def test_index_is_held_to_what_it_says(tmp_path: Path) -> None:
    refused(shards(tmp_path / "x", {"a": SECOND, "b": FIRST}), "tensor 'a' should stand in pytorch_model-00002-of-00002.bin, but stands in")
    refused(shards(tmp_path / "w", {"a": FIRST, "b": FIRST}), "does not list tensors of every shard: shard 2 of 2 is missing")
    refused(shards(tmp_path / "y", {"a": "../x/" + FIRST}), "which is not a .bin or .pt or .pth file of this folder")
    (shards(tmp_path / "z") / SECOND).unlink()
    refused(tmp_path / "z", "shard 2 of 2 is missing")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = shards(tmp_path)
    save_torch({"a": torch.ones(1)}, folder / SECOND)
    refused(folder, "tensor 'a' stands in pytorch_model-00001-of-00002.bin as well")


def test_training_state_beside_the_weights_is_left_alone(tmp_path: Path) -> None:
    save_torch({"w": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n.")
    assert open_checkpoint(tmp_path).names() == ("w",)


def test_merge_of_pickled_and_safetensors_models_reads_both(tmp_path: Path) -> None:
    from modelglue.recipe import merge

    values = randn(300, 7)
    (tmp_path / "a").mkdir()
    save_torch({"w": values.t().contiguous().t()}, tmp_path / "a" / "pytorch_model.bin", False)
    save(PickledCheckpoint(save_torch({"w": values + 2}, tmp_path / "b.bin")), tmp_path / "b")
    models = [{"model": str(tmp_path / "a"), "weight": 0.5}, {"model": str(tmp_path / "b"), "weight": 0.5}]
    save(merge({"method": "linear", "models": models}), tmp_path / "out", workers=2, chunk=1000)
    assert torch.allclose(open_checkpoint(tmp_path / "out").tensor("w"), values + 1)


def test_checkpoint_crosses_to_another_process(tmp_path: Path) -> None:
    checkpoint = PickledCheckpoint(shards(tmp_path))
    checkpoint.read("a")
    assert torch.equal(pickle.loads(pickle.dumps(checkpoint)).tensor("a"), torch.arange(4.0))


def test_a_file_that_shrank_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.bin", zip_file(WEIGHTS))
    checkpoint = PickledCheckpoint(path)
    os.truncate(path, 60)
    with pytest.raises(CheckpointError, match="has become shorter since it was opened"):
        checkpoint.read("w")


def test_reading_part_of_a_transposed_tensor_takes_memory_for_that_part(tmp_path: Path) -> None:
    """In a process of its own, because the peak of private memory is the process's."""
    save_torch({"w": torch.zeros(4096, 4096).t()}, tmp_path / "m.bin")
    code = """
import sys, torch
from pathlib import Path
from modelglue.checkpoint import PickledCheckpoint
def private():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024
checkpoint = PickledCheckpoint(Path(sys.argv[1]))
checkpoint.read("w", 0, 10)
before, most = private(), 0
for start in range(0, 2**24, 2**20):
    checkpoint.read("w", start, start + 2**20)
    most = max(most, private() - before)
print(most)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc to ask")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.bin")], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 24_000_000, "the whole tensor has 67 MB, a part 4 MB"


# -- hostile pickles: nothing is run ----------------------------------------------------------------------------------------------


class Runs:
    """Pickled, it runs a command that leaves a file when a careless reader loads it."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


def system(canary: Path) -> bytes:
    return b"cos\nsystem\n(" + text(f"touch {canary}") + b"tR"


def touch(canary: Path) -> str:
    return f"__import__('pathlib').Path({str(canary)!r}).touch()"


def stack_global(module: bytes, name: bytes) -> bytes:
    return module + name + b"\x93"


def reduce_os_system(canary: Path) -> bytes:
    return system(canary)


def posix_system(canary: Path) -> bytes:
    return b"cposix\nsystem\n" + text(f"touch {canary}") + b"\x85R"


def builtins_eval(canary: Path) -> bytes:
    return b"cbuiltins\neval\n" + text(touch(canary)) + b"\x85R"


def builtins_exec_of_python_2(canary: Path) -> bytes:
    return b"c__builtin__\nexec\n" + text(touch(canary)) + b"\x85R"


def getattr_chain(canary: Path) -> bytes:
    """getattr(__import__("os"), "system")(...)"""
    module = b"cbuiltins\n__import__\n" + text("os") + b"\x85R"
    return b"cbuiltins\ngetattr\n(" + module + text("system") + b"tR" + text(f"touch {canary}") + b"\x85R"


def dotted_name(canary: Path) -> bytes:
    """Protocol 4 walks dotted names: an allowed module, and a path out of it."""
    name = text("_rebuild_tensor_v2.__globals__.__getitem__")
    return text("torch._utils") + name + b"\x93" + text("os") + b"\x85R" + text(f"touch {canary}") + b"\x85R"


def stack_global_from_the_memo(canary: Path) -> bytes:
    return text("os") + b"q\x01" + text("system") + b"q\x020h\x01h\x02\x93" + text(f"touch {canary}") + b"\x85R"


def global_with_blanks_and_newlines(canary: Path) -> bytes:
    return b"ccollections OrderedDict os\nsystem\n" + text(f"touch {canary}") + b"\x85R"


def instance_opcode(canary: Path) -> bytes:
    return b"(" + text(f"touch {canary}") + b"ios\nsystem\n"


def object_opcode(canary: Path) -> bytes:
    return b"(cos\nsystem\n" + text(f"touch {canary}") + b"o"


def newobj(canary: Path) -> bytes:
    return b"csubprocess\nPopen\n(" + b"(" + text("touch") + text(str(canary)) + b"lt\x81"


def newobj_ex(canary: Path) -> bytes:
    return b"csubprocess\nPopen\n(" + b"(" + text("touch") + text(str(canary)) + b"lt}\x92"


def extension_registry(canary: Path) -> bytes:
    return b"\x82\x01" + text(f"touch {canary}") + b"\x85R"


def copyreg_reconstructor(canary: Path) -> bytes:
    return b"ccopyreg\n_reconstructor\n(csubprocess\nPopen\ncbuiltins\nobject\n(" + text("touch") + text(str(canary)) + b"ltR"


def build_with_setstate(canary: Path) -> bytes:
    """The state of an object whose __setstate__ is a function of the attacker's choice."""
    return b"ccollections\nOrderedDict\n)R}" + text("__setstate__") + b"cos\nsystem\nsb" + text(f"touch {canary}") + b"b"


def build_on_a_tensor(canary: Path) -> bytes:
    return TENSOR + b"}" + text("__reduce__") + text(touch(canary)) + b"sb"


def nested_pickle(canary: Path) -> bytes:
    inner = b"\x80\x02" + system(canary) + b"."
    return b"c_pickle\nloads\nB" + len(inner).to_bytes(4, "little") + inner + b"\x85R"


def torch_load(canary: Path) -> bytes:
    return b"ctorch\nload\n(" + text(str(canary)) + b"tR"


def torch_load_from_bytes(canary: Path) -> bytes:
    inner = stream_file(b"\x80\x02" + system(canary) + b".", {})
    return b"ctorch.storage\n_load_from_bytes\nB" + len(inner).to_bytes(4, "little") + inner + b"\x85R"


def numpy_scalar_of_objects(canary: Path) -> bytes:
    inner = b"\x80\x02" + system(canary) + b"."
    dtype = b"cnumpy\ndtype\n" + text("O8") + b"\x89\x88\x87R"
    return b"cnumpy.core.multiarray\nscalar\n" + dtype + b"B" + len(inner).to_bytes(4, "little") + inner + b"\x86R"


def partial_call(canary: Path) -> bytes:
    return b"cfunctools\npartial\ncos\nsystem\n" + text(f"touch {canary}") + b"\x86R)R"


def persistent_id_of_another_kind(canary: Path) -> bytes:
    return b"(" + text("module") + b"cos\nsystem\n" + text(f"touch {canary}") + b"tQ"


def persistent_id_as_a_line(canary: Path) -> bytes:
    return b"P" + str(canary).encode() + b"\n"


def storage_class_that_is_code(canary: Path) -> bytes:
    reference = b"(" + text("storage") + b"cos\nsystem\n" + text("0") + text("cpu") + b"K\x02tQ"
    return TENSOR.replace(b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x02tQ", reference)


def rebuild_from_type_with_code(canary: Path) -> bytes:
    return b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n" + text(f"touch {canary}") + b"\x85}tR"


def subclass_that_is_code(canary: Path) -> bytes:
    arguments = b"(" + text("x") + b"t"
    return b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_tensor_v2\ncos\nsystem\n" + arguments + b"}tR"


def webbrowser_open(canary: Path) -> bytes:
    return b"cwebbrowser\nopen\n" + text(f"file://{canary}") + b"\x85R"


def run_file(canary: Path) -> bytes:
    return b"crunpy\n_run_code\n(" + text(touch(canary)) + b"}tR"


def calls_a_tensor(canary: Path) -> bytes:
    return TENSOR + text(f"touch {canary}") + b"\x85R"


def calls_an_allowed_name_on_code(canary: Path) -> bytes:
    return b"ctorch._utils\n_rebuild_parameter\n(" + system(canary) + b"\x88}tR"


TRICKS = [
    reduce_os_system, posix_system, builtins_eval, builtins_exec_of_python_2, getattr_chain, dotted_name, stack_global_from_the_memo,
    global_with_blanks_and_newlines, instance_opcode, object_opcode, newobj, newobj_ex, extension_registry, copyreg_reconstructor,
    build_with_setstate, build_on_a_tensor, nested_pickle, torch_load, torch_load_from_bytes, numpy_scalar_of_objects, partial_call,
    persistent_id_of_another_kind, persistent_id_as_a_line, storage_class_that_is_code, rebuild_from_type_with_code, subclass_that_is_code,
    webbrowser_open, run_file, calls_a_tensor, calls_an_allowed_name_on_code,
]  # fmt: skip


@pytest.mark.parametrize("trick", TRICKS, ids=lambda trick: trick.__name__)
@FORMATS
def test_hostile_pickle_runs_nothing(trick: Any, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = tmp_path / "canary"
    data = pickle_of("w", trick(canary))
    path = write(tmp_path / "pytorch_model.bin", zip_file(data) if zipped else stream_file(data))
    monkeypatch.setattr(os, "system", pytest.fail)
    loaded = set(sys.modules)
    refused(path, "its pickle ", "Nothing in it was run.")
    assert not canary.exists()
    assert {"webbrowser", "runpy"} & set(sys.modules) <= loaded


@pytest.mark.parametrize("trick", [reduce_os_system, builtins_eval, getattr_chain, stack_global_from_the_memo, nested_pickle, partial_call])
def test_these_tricks_do_run_where_pickles_are_obeyed(trick: Any, tmp_path: Path) -> None:
    """The canary is a canary: Python's own reader falls for it."""
    canary = tmp_path / "canary"
    pickle.loads(b"\x80\x04" + trick(canary) + b".")
    assert canary.exists()


@pytest.mark.parametrize("place", ["magic", "protocol", "system", "keys"])
def test_hostile_pickle_in_any_part_of_the_old_format_runs_nothing(place: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    parts = {
        "magic": pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2),
        "protocol": pickle.dumps(1001, protocol=2),
        "system": pickle.dumps({"little_endian": True}, protocol=2),
        "value": WEIGHTS,
        "keys": pickle.dumps(["0"], protocol=2),
    }
    healthy = b"".join(parts.values()) + (2).to_bytes(8, "little") + TWO_FLOATS
    assert PickledCheckpoint(write(tmp_path / "healthy.pt", healthy)).read("w").tolist() == [1, 2]
    parts[place] = pickle.dumps(Runs(os.system, (f"touch {canary}",)), protocol=2)
    refused(write(tmp_path / "m.pt", b"".join(parts.values()) + (2).to_bytes(8, "little") + TWO_FLOATS))
    assert not canary.exists()


def test_torchscript_program_is_refused_by_name(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    for extra in ({"archive/code/__torch__.py": b"import os"}, {"archive/constants.pkl": b"\x80\x02)."}):
        refused(write(tmp_path / "m.pt", zip_file(WEIGHTS, records=extra)), "is a TorchScript program, not a file of weights")


# -- hostile claims ---------------------------------------------------------------------------------------------------------------

MANY = 2**40
#: the instructions that make the tensor, and words of the message
CLAIMS: dict[str, tuple[bytes, str]] = {
    "beyond-the-storage": (tensor((3,)), "tensor 'w' reaches to element 2 of its storage, which has 2"),
    "offset-beyond": (tensor((2,), offset=1), "reaches to element 2 of its storage"),
    "stride-beyond": (tensor((2,), (2,)), "reaches to element 2 of its storage"),
    "huge-offset": (tensor((1,), offset=2**62), "reaches to element"),
    "negative-offset": (tensor((1,), offset=-1), "whose shape, stride or offset are no whole numbers"),
    "negative-stride": (tensor((2,), (-1,), offset=1), "whose shape, stride or offset are no whole numbers"),
    "negative-size": (tensor((-1,), (1,)), "whose shape, stride or offset are no whole numbers"),
    "giant-size": (tensor((2**100,), (1,)), "whose shape, stride or offset are no whole numbers"),
    "expanded": (tensor((MANY,), (0,)), "repeats its 2 stored elements"),
    "overflowing-shape": (tensor((2**40, 2**40), (0, 0)), "more than can be counted"),
    "overflow-hidden-by-a-zero": (tensor((0, 2**40, 2**40), (0, 0, 0)), "more than can be counted"),
    "many-axes": (tensor((1,) * 65, (0,) * 65), "more than can be counted"),
    "ranks-differ": (tensor((2,), (1, 1)), "makes a tensor in a way that torch does not"),
    "shape-of-lists": (
        TENSOR.replace(b"K\x02\x85K\x01\x85", b"](K\x02e\x85K\x01\x85"),
        "whose shape, stride or offset are no whole numbers",
    ),
    "shape-of-truth": (TENSOR.replace(b"K\x02\x85K\x01\x85", b"\x88\x85K\x01\x85"), "no whole numbers"),
    "storage-too-long": (tensor((2,), numel=3), "should have 3 elements of 4 bytes, but its record has 8 bytes"),
    "storage-of-another-dtype": (tensor((2,), storage="DoubleStorage"), "should have 2 elements of 8 bytes, but its record has 8 bytes"),
    "storage-that-is-not-there": (tensor((2,), key="7"), "refers to the storage '7', which it does not hold"),
    "storage-elsewhere": (tensor((2,), key="../version"), "refers to the storage '../version', which it does not hold"),
    "negative-storage": (tensor((0,), (1,), numel=-1), "refers to a storage in a way that torch does not"),
    "no-storage": (b"ctorch._utils\n_rebuild_tensor_v2\n(K\x00K\x00))\x89}tR", "makes a tensor in a way that torch does not"),
    "too-few-arguments": (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "makes tensor in a way that torch does not"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_hostile_claim_is_refused_before_anything_is_allocated(name: str, tmp_path: Path) -> None:
    data, words = CLAIMS[name]
    path = write(tmp_path / "m.bin", zip_file(pickle_of("w", data)))
    tracemalloc.start()
    try:
        refused(path, words)
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", [name for name in CLAIMS if name not in ("storage-too-long", "storage-of-another-dtype")])
def test_hostile_claim_in_the_old_format_is_refused(name: str, tmp_path: Path) -> None:
    data, words = CLAIMS[name]
    path = write(tmp_path / "m.bin", stream_file(pickle_of("w", data)))
    refused(path, words if "storage-" not in name else "storage")


def test_one_storage_of_two_dtypes_is_refused(tmp_path: Path) -> None:
    data = b"\x80\x02}(" + text("a") + tensor((2,)) + text("b") + tensor((2,), storage="IntStorage") + b"u."
    refused(write(tmp_path / "m.bin", zip_file(data)), "calls the storage '0' by two dtypes or lengths")


BOMBS: dict[str, tuple[bytes, str]] = {
    "key-twice": (b"}(" + text("w") + TENSOR + text("w") + TENSOR + b"u", "has the key 'w' twice"),
    "key-twice-one-by-one": (b"}" + text("w") + TENSOR + b"s" + text("w") + TENSOR + b"s", "has the key 'w' twice"),
    "key-a-tuple": (b"}))s", "has a tuple as a key"),
    "doubled-tuples-as-a-key": (b"})" + b"q\x01h\x01\x86" * 100 + b"Ns", "has a tuple as a key"),
    "doubled-tuples": (b")" + b"q\x01h\x01\x86" * 100, "holds a tuple, not a dict of tensors"),
    "memo-far-away": (b"Nr\xff\xff\xff\x7f", "keeps a value at number 2147483647"),
    "memo-as-a-line": (b"Np99999999999999999999\n", "keeps a value at number 99999999999999999999"),
    "memo-negative": (b"Np-1\n", "keeps a value at number -1"),
    "memo-unknown": (b"h\x05", "recalls what it never kept"),
    "dup": (b"}2222", "uses the instruction DUP"),
    "deep": (b"(" * 50_000 + b"l" * 50_000, "holds a list, not a dict of tensors"),
    "deep-tuples": (b")" + b"\x85" * 100_000, "holds a tuple, not a dict of tensors"),
    "giant-text": (b"X\xff\xff\xff\x7fabc", "is cut off"),
    "giant-text-8": (b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc", "is cut off"),
    "impossible-text-8": (b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffabc", "is damaged"),
    "giant-bytes": (b"B\xff\xff\xff\x7fabc", "is cut off"),
    "giant-bytearray": (b"\x96\xff\xff\xff\xff\xff\xff\xff\x7fabc", "is cut off"),
    "giant-integer": (b"\x8b\xff\xff\xff\x7fabc", "is cut off"),
    "negative-length": (b"\x8b\xff\xff\xff\xffabc", "is damaged"),
    "odd-escape": (b"S'a\\u'\n", "holds a str, not a dict of tensors"),
    "giant-decimal": (b"L" + b"9" * 5000 + b"L\n", "is damaged"),
    "endless-line": (b"V" + b"a" * 20_000, "holds an endless line"),
    "frame-too-long": (b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f}", "holds a dict"),
    "unknown-instruction": (b"\xff", "is damaged"),
    "empty-stack": (b"0", "uses the instruction POP"),
    "no-mark": (b"t", "a mark is missing"),
    "mark-in-the-way": (b"}(s", "its stack is empty"),
    "append-to-a-dict": (b"}Na", "appends to a dict"),
    "items-of-a-list": (b"]NNs", "sets items of a list"),
    "odd-items": (b"}(Nu", "sets items of a dict"),
    "list-in-itself": (b"]q\x01h\x01a", "holds a list, not a dict of tensors"),
    "dict-in-itself": (b"}q\x01" + text("w") + b"h\x01s", "is no dict of tensors"),
    "odd-pairs": (b"ccollections\nOrderedDict\n](](NNNee\x85R", "makes an OrderedDict in a way that torch does not"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_refused_in_little_memory(name: str, tmp_path: Path) -> None:
    data, words = BOMBS[name]
    path = write(tmp_path / "m.bin", zip_file(b"\x80\x04" + data + b"."))
    tracemalloc.start()
    try:
        if name == "frame-too-long":
            assert PickledCheckpoint(path).names() == ()
        else:
            refused(path, words)
        assert tracemalloc.get_traced_memory()[1] < 40_000_000 + 10 * len(data)
    finally:
        tracemalloc.stop()


def test_numbers_that_fall_into_one_place_take_no_time(tmp_path: Path) -> None:
    """As keys of one dict, these integers all hash to zero: a dict of them would take hours."""
    keys = b"".join(number((2**61 - 1) * n) + b"N" for n in range(1, 60_000))
    path = write(tmp_path / "m.bin", zip_file(b"\x80\x02}(" + keys + b"u."))
    refused(path, "is no dict of tensors")


def test_a_list_that_is_copied_again_and_again_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelglue.checkpoint.formats.unpickle.MAX_PICKLE_BYTES", 5_000)
    pairs = b"](" + b"".join(b"](" + text(str(n)) + b"Ne" for n in range(100)) + b"eq\x010"
    data = b"\x80\x02" + pairs.replace(b"q\x010", b"q\x01") + b"(" + b"ccollections\nOrderedDict\nh\x01\x85R" * 60 + b"t."
    with pytest.raises(PickleError, match="copies the same list again and again"):
        read_pickle(BoundedReader(lambda begin, end: data[begin:end], 0, len(data)))


# -- hostile archives --------------------------------------------------------------------------------------------------------------


def changed(data: bytes, old: bytes, new: bytes, *, count: int = -1) -> bytes:
    assert old in data
    return data.replace(old, new, count)


def two_pickles() -> bytes:
    return zip_file(WEIGHTS, records={"other/data.pkl": WEIGHTS})


def deep_root() -> bytes:
    return zip_file(WEIGHTS, root="a/b")


def big_endian() -> bytes:
    return changed(zip_file(WEIGHTS), b"little", b"bigger")


def compressed() -> bytes:
    return zip_file(WEIGHTS, {"0": bytes(8)}, compression=zipfile.ZIP_DEFLATED)


def climbing_name() -> bytes:
    return zip_file(WEIGHTS, records={"archive/../../x": b""})


def absolute_name() -> bytes:
    return zip_file(WEIGHTS, records={"/etc/x": b""})


def backslash_name() -> bytes:
    return changed(zip_file(WEIGHTS, records={"archive/back/x": b""}), b"back/x", b"back\\x")


def record_twice() -> bytes:
    return changed(zip_file(WEIGHTS, records={"archive/datA/0": TWO_FLOATS}), b"archive/datA/0", b"archive/data/0")


def bytes_behind() -> bytes:
    return zip_file(WEIGHTS) + b"x"


def bytes_before_the_directory() -> bytes:
    data = zip_file(WEIGHTS)
    place = data.index(b"PK\1\2")
    return data[:place] + b"hole" + data[place:]


def cut_off() -> bytes:
    return zip_file(WEIGHTS)[:-30]


def other_name_at_the_record() -> bytes:
    return changed(zip_file(WEIGHTS), b"archive/data/0", b"archive/data/1", count=1)


def wrong_sum() -> bytes:
    return changed(zip_file(WEIGHTS), b"ctorch\nFloatStorage", b"ctorch\nFloatStoraga")


def entry(data: bytes, name: bytes) -> int:
    """Where the directory's entry of a record begins."""
    return data.rindex(name) - 46


def record_over_another() -> bytes:
    """The directory leads two names to one place; the header there can only say one of them."""
    data = bytearray(zip_file(WEIGHTS, records={"archive/data/1": TWO_FLOATS}))
    first, second = entry(data, b"archive/data/0"), entry(data, b"archive/data/1")
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    return bytes(data)


def record_longer_than_it_is() -> bytes:
    data = bytearray(zip_file(WEIGHTS))
    place = entry(data, b"archive/data/0")
    data[place + 20 : place + 28] = (40).to_bytes(4, "little") * 2
    return bytes(data)


def record_beyond_the_file() -> bytes:
    data = bytearray(zip_file(WEIGHTS))
    place = entry(data, b"archive/data/0")
    data[place + 42 : place + 46] = (10**8).to_bytes(4, "little")
    return bytes(data)


def record_of_terabytes() -> bytes:
    data = bytearray(zip_file(WEIGHTS))
    place = entry(data, b"archive/data/0")
    data[place + 20 : place + 28] = b"\xff" * 8
    return bytes(data)


def encrypted() -> bytes:
    data = bytearray(zip_file(WEIGHTS))
    data[entry(data, b"archive/data/0") + 8] |= 1
    return bytes(data)


def huge_directory() -> bytes:
    data = bytearray(zip_file(WEIGHTS))
    data[-10:-6] = (2**31).to_bytes(4, "little")
    return bytes(data)


def split_archive() -> bytes:
    data = bytearray(zip_file(WEIGHTS))
    data[-18] = 3
    return bytes(data)


def other_count() -> bytes:
    data = bytearray(zip_file(WEIGHTS))
    data[-14] = data[-12] = 3
    return bytes(data)


def long_end_without_one() -> bytes:
    data = bytearray(zip_file(WEIGHTS))
    data[-6:-2] = b"\xff" * 4
    return bytes(data)


ARCHIVES: list[tuple[Any, str]] = [
    (two_pickles, "is a zip archive, but not one of torch: it needs one data.pkl in one folder"),
    (deep_root, "is a zip archive, but not one of torch"),
    (big_endian, "was written big-endian"),
    (compressed, "compressed; weights are read where they stand"),
    (climbing_name, "has a record with the name 'archive/../../x', which leads elsewhere"),
    (absolute_name, "has a record with the name '/etc/x', which leads elsewhere"),
    (backslash_name, "which leads elsewhere"),
    (record_twice, "has two records 'archive/data/0'"),
    (bytes_behind, "has bytes after the end of its zip archive"),
    (bytes_before_the_directory, "which does not reach its end record"),
    (cut_off, "is cut off: it begins as a zip archive and has no end record"),
    (other_name_at_the_record, "has another record where its directory says that 'archive/data/0' stands"),
    (wrong_sum, "its pickle does not have the check sum that the archive says"),
    (record_over_another, "has another record where its directory says that 'archive/data/1' stands"),
    (record_longer_than_it_is, "has the record 'archive/version' over another one"),
    (record_beyond_the_file, "has the record 'archive/data/0' at 100,000,000, beyond its"),
    (record_of_terabytes, "lacks the 64-bit size of the record 'archive/data/0'"),
    (encrypted, "has the record 'archive/data/0' encrypted"),
    (huge_directory, "has a zip directory of 2,147,483,648 bytes"),
    (split_archive, "is one part of a zip archive that was split"),
    (other_count, "has a zip directory of 4 records, and its end record says 3"),
    (long_end_without_one, "lacks the 64-bit end record of its zip archive"),
    (lambda: b"", "is empty"),
    (lambda: b"PK\3\4", "has no end record"),
    (lambda: b"hello", "is not a file of torch.save"),
    (lambda: stream_file(WEIGHTS, little_endian=False), "was written big-endian"),
    (lambda: stream_file(WEIGHTS)[:-1], "ends behind its"),
    (lambda: stream_file(WEIGHTS) + b"x", "ends with 1 bytes that belong to no storage"),
    (lambda: stream_file(WEIGHTS, numel=3), "of 2 elements has 3 elements in the file"),
    (lambda: stream_file(WEIGHTS, {"0": TWO_FLOATS, "1": TWO_FLOATS}), "holds the storage '1', which no tensor uses"),
    (lambda: stream_file(WEIGHTS, {}), "refers to the storage '0', which it does not hold"),
]


@pytest.mark.parametrize(("make", "words"), ARCHIVES)
def test_hostile_archive_is_refused_by_name(make: Any, words: str, tmp_path: Path) -> None:
    assert PickledCheckpoint(write(tmp_path / "healthy.bin", zip_file(WEIGHTS))).read("w").tolist() == [1, 2]
    refused(write(tmp_path / "m.bin", make()), words)


def test_archive_beyond_4_gb_is_read(tmp_path: Path) -> None:
    """Sparse: sizes and offsets stand in the 64-bit fields, and the tensor behind the hole is found."""
    path = tmp_path / "m.bin"
    count = 2**30 + 16
    data = b"\x80\x02}(" + text("big") + tensor((count,), (1,), numel=count) + text("w") + tensor((2,), key="1") + b"u."
    with path.open("wb") as stream, zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a/data.pkl", data)
        with archive.open(zipfile.ZipInfo("a/data/0"), "w", force_zip64=True) as record:
            stream.seek(count * 4, os.SEEK_CUR)
            record._file_size = record._compress_size = count * 4  # type: ignore[attr-defined]
        archive.writestr("a/data/1", TWO_FLOATS)
    checkpoint = PickledCheckpoint(path)
    assert checkpoint.read("w").tolist() == [1, 2]
    assert checkpoint.read("big", count - 3).tolist() == [0, 0, 0]
    assert checkpoint.info("big").shape == (count,)


# -- damage ------------------------------------------------------------------------------------------------------------------------

HEALTHY = {"zip": zip_file(WEIGHTS), "stream": stream_file(WEIGHTS)}


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(sorted(HEALTHY)),
    changes=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6), st.integers(0, 6)), min_size=1, max_size=4),
)
def test_damaged_file_is_refused_or_read(
    kind: str, changes: list[tuple[float, bytes, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(HEALTHY[kind])
    for where, new, removed in changes:
        place = int(where * len(data))
        data[place : place + removed] = new
    path = write(tmp_path_factory.mktemp("damaged") / "m.bin", bytes(data))
    try:
        checkpoint = PickledCheckpoint(path)
    except CheckpointError as error:
        message = str(error)
    else:
        message = str(path)
        for name in checkpoint.names():
            assert checkpoint.tensor(name).shape == checkpoint.info(name).shape
    assert message.startswith(str(path))
