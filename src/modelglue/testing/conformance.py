"""The conformance suite: what every merge method must do, whatever it computes.

Every check takes a `Method` and raises AssertionError with the parameters at fault. In a test file of yours:

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_conformance(check):
        check(modelglue.method("my_method"))

All checks go through the engine, as a merge does. They try the method's defaults and, one at a time, every switch and every
choice of its signature, so a new parameter is covered without a word here; a method that may take a base is tried with and without.
One method takes about a second on one core.
"""

from __future__ import annotations

import functools
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint import MergedCheckpoint, TensorsCheckpoint, save
from modelglue.errors import MergeError, UserError
from modelglue.methods import Method, get

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

#: names and shapes of the models that the checks merge: every rank, a length of no power of two, and an empty tensor
SHAPES: Mapping[str, tuple[int, ...]] = {
    "layers.0.matrix": (13, 29), "layers.0.vector": (53,), "layers.1.kernel": (5, 3, 7), "scale": (), "empty": (0, 4),
}  # fmt: skip
#: longer than one chunk of a survey, so that rounds meet more than one partial result
_LONG = 300_001
_PIECE = 37
_LONG_PIECE = 65_537


# -- examples -----------------------------------------------------------------------------------------------------------------


def parameter_sets(method: Method, models: int) -> Iterator[dict[str, Any]]:
    """Resolved parameters to try a method with: its defaults, a random-looking set, and that set with each switch and choice changed."""
    plain = _resolve(method, models, {}, uneven=False)
    if plain is not None:
        yield plain
    for change in [{}, *_changes(method)]:
        values = _resolve(method, models, change, uneven=True)
        if values is not None:
            yield values


def _changes(method: Method) -> Iterator[dict[str, Any]]:
    for parameter in method.parameters:
        if parameter.type is bool:
            yield {parameter.name: not parameter.default}
        elif parameter.optional:
            yield {parameter.name: _legal(parameter.range, 0.4)}
        for choice in parameter.choices:
            if choice != parameter.default:
                yield {parameter.name: choice}


def _resolve(method: Method, models: int, change: Mapping[str, Any], *, uneven: bool) -> dict[str, Any] | None:
    """Values for all parameters; None where the method's own check refuses them, also with any one per-model parameter at its default."""
    optional = [parameter.name for parameter in method.parameters if parameter.per_model and not parameter.required]
    for plain in [None, *(reversed(optional) if uneven else [])]:
        shared, each = _given(method, models, uneven, plain)
        values, faults = method.resolve({**shared, **change}, each, [f"model{number}" for number in range(models)])
        if not faults:
            return values
    return None


def _given(method: Method, models: int, uneven: bool, plain: str | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a recipe says: the parameters for all models and those of each; the one called `plain` is left to its default."""
    shared: dict[str, Any] = {}
    each: list[dict[str, Any]] = [{} for _ in range(models)]
    for parameter in method.parameters:
        if parameter.type is bool or parameter.choices or parameter.optional or parameter.name == plain:
            continue
        if parameter.per_model and (uneven or parameter.required):
            for number in range(models):
                wanted = 0.4 + 0.2 * number if uneven else 1.0
                each[number][parameter.name] = _legal(parameter.range, wanted)
        elif parameter.required:
            shared[parameter.name] = _legal(parameter.range, 0.4 if uneven else 1.0)
    return shared, each


def _legal(range_: Any, wanted: float) -> float:
    return wanted if range_ is None or wanted in range_ else next(v for v in (1.0, 0.5, 0.1, 0.0) if v in range_)


def example_models(count: int, *, dtype: str = "float32", long: bool = False) -> tuple[Tensors, list[Tensors]]:
    """A base and `count` models that moved a little from it, each its own way; the same every time."""
    import torch

    generator = torch.Generator().manual_seed(20)
    shapes = {"long": (_LONG,)} if long else SHAPES
    kind = getattr(torch, dtype)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    models = [{name: values + 0.1 * torch.randn(values.shape, generator=generator) for name, values in base.items()} for _ in range(count)]
    return _cast(base, kind), [_cast(model, kind) for model in models]


def _cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: values.to(dtype) for name, values in tensors.items()}


@dataclass(frozen=True)
class _Constant:
    """The same uniform number everywhere."""

    value: float

    def numbers(self, name: str, stream: int, start: int, stop: int) -> torch.Tensor:
        import torch

        return torch.full((stop - start,), self.value)

    def describe(self) -> Any:
        return self.value


def merged(method: Method, base: Tensors, models: Sequence[Tensors], parameters: Mapping[str, Any], **options: Any) -> MergedCheckpoint:
    """The merge of tensors in memory, with the base only where the method needs one."""
    checkpoints = [TensorsCheckpoint(model, label=f"model{number}") for number, model in enumerate(models)]
    return MergedCheckpoint(
        method, checkpoints, TensorsCheckpoint(base, label="base") if method.needs_base else None, parameters, **options
    )


def _counts(method: Method) -> list[int]:
    """Numbers of models to try: the least, and three where that many are taken."""
    return sorted({method.min_models, min(3, method.max_models or 3)})


def _cases(method: Method) -> Iterator[tuple[int, dict[str, Any]]]:
    for count in _counts(method):
        for parameters in parameter_sets(method, count):
            yield count, parameters


def _tensors(checkpoint: MergedCheckpoint) -> Tensors:
    return {name: checkpoint.tensor(name).clone() for name in checkpoint.names()}


def _assert_equal(found: Tensors, expected: Mapping[str, torch.Tensor], what: str) -> None:
    import torch

    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{what}: '{name}' differs"


def _assert_close(found: Tensors, expected: Mapping[str, torch.Tensor], what: str) -> None:
    """Equal up to a few roundings of float32."""
    import torch

    for name, value in expected.items():
        try:
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-6)
        except AssertionError as error:
            raise AssertionError(f"{what}: '{name}': {error}") from None


# -- checks -------------------------------------------------------------------------------------------------------------------


def check_declaration(method: Method) -> None:
    """The method says what it is, what each parameter means and where it comes from, and pickles by its id."""
    assert method.summary, f"{method.id}: no summary"
    assert method.summary.endswith("."), f"{method.id}: the docstring's first line ends with a full stop"
    assert method.source, f"{method.id}: no source"
    for parameter in method.parameters:
        assert parameter.doc, f"{method.id}: the docstring says nothing about '{parameter.name}'"
        if not parameter.required:
            assert parameter.fault(parameter.default) is None, f"{method.id}: the default of '{parameter.name}' is not legal"
    assert pickle.loads(pickle.dumps(method)) is method
    assert get(method.id) is method


def check_shape_and_dtype(method: Method) -> None:
    """Every tensor keeps its shape, and the dtype of the donor or the one that is asked for."""
    import torch

    for dtype in ("float32", "bfloat16", "float16", "float64"):
        for count, parameters in _cases(method):
            base, models = example_models(count, dtype=dtype)
            found = _tensors(merged(method, base, models, parameters))
            assert sorted(found) == sorted(SHAPES)
            for name, value in found.items():
                assert value.shape == SHAPES[name], f"{method.id} {parameters}: '{name}' comes out as {tuple(value.shape)}"
                assert value.dtype == getattr(torch, dtype), f"{method.id} {parameters}: '{name}' comes out as {value.dtype}"
                assert bool(torch.isfinite(value).all())


def check_rounds_once(method: Method) -> None:
    """Low-precision inputs are merged in float32 and rounded once at the end."""
    import torch

    for count, parameters in _cases(method):
        base, models = example_models(count, dtype="bfloat16")
        exact = _tensors(merged(method, base, models, parameters, store="float32"))
        rounded = _tensors(merged(method, base, models, parameters))
        _assert_equal(rounded, _cast(exact, torch.bfloat16), f"{method.id} {parameters}")


def check_wide_inputs(method: Method) -> None:
    """float64 inputs are merged in float64: close to the float32 result, and not equal to it."""
    import torch

    for count, parameters in _cases(method):
        base, models = example_models(count)
        narrow = _tensors(merged(method, base, models, parameters))
        wide = _tensors(merged(method, _cast(base, torch.float64), [_cast(m, torch.float64) for m in models], parameters))
        _assert_close(narrow, _cast(wide, torch.float32), f"{method.id} {parameters}")


def check_single_model(method: Method) -> None:
    """One model at full weight, nothing left out, is returned; where one model is allowed, and taken whole."""
    if method.min_models > 1 or method.selective:
        return
    base, models = example_models(1)
    parameters = _resolve(method, 1, {}, uneven=False)
    assert parameters is not None, f"{method.id}: refuses its own defaults"
    _assert_close(_tensors(merged(method, base, models, parameters)), models[0], f"{method.id} {parameters}")


def check_fixed_point(method: Method) -> None:
    """Identical models, the base among them if there is one, come back. Without a base only the defaults promise it."""
    for count in _counts(method):
        base, _ = example_models(0)
        for number, parameters in enumerate(parameter_sets(method, count)):
            if method.needs_base or number < 2:
                found = _tensors(merged(method, base, [base] * count, parameters))
                _assert_close(found, base, f"{method.id} {parameters}")


def check_zero_delta(method: Method) -> None:
    """Models that equal the base give the base to the last bit, in stored precision too."""
    if not method.needs_base:
        return
    for dtype in ("float32", "bfloat16"):
        for count, parameters in _cases(method):
            base, _ = example_models(0, dtype=dtype)
            found = _tensors(merged(method, base, [base] * count, parameters))
            if method.symmetric or method.needs_uniform or dtype == "bfloat16":
                _assert_equal(found, base, f"{method.id} {parameters}")
            else:
                _assert_close(found, base, f"{method.id} {parameters}")


def check_permutation(method: Method) -> None:
    """Where it is declared: models in another order, with their parameters (and random streams), give the same merge."""
    if not (method.symmetric or method.needs_uniform):
        return
    for count, parameters in _cases(method):
        base, models = example_models(count)
        order = list(range(count))[::-1]
        each = {p.name for p in method.parameters if p.per_model}
        turned = {name: value[::-1] if name in each else value for name, value in parameters.items()}
        first = _tensors(merged(method, base, models, parameters))
        second = _tensors(merged(method, base, [models[i] for i in order], turned, streams=order))
        _assert_close(second, first, f"{method.id} {parameters}")


def check_inputs_untouched(method: Method) -> None:
    """No input changes, whatever its dtype (float32 inputs are handed to the method without a copy)."""
    for dtype in ("float32", "bfloat16", "float64"):
        for count, parameters in _cases(method):
            base, models = example_models(count, dtype=dtype)
            before = [{name: value.clone() for name, value in tensors.items()} for tensors in [base, *models]]
            _tensors(merged(method, base, models, parameters))
            for tensors, copy in zip([base, *models], before, strict=True):
                _assert_equal(tensors, copy, f"{method.id} {parameters}: an input was changed")


def check_chunks(method: Method) -> None:
    """Read in small odd pieces, in any order, a tensor has the same bits as read whole; and again when it is read twice."""
    import torch

    for long, piece in ((False, _PIECE), (True, _LONG_PIECE)):
        for count, parameters in _cases(method):
            base, models = example_models(count, long=long)
            whole = _tensors(merged(method, base, models, parameters))
            other = merged(method, base, models, parameters)
            for name, value in whole.items():
                flat = value.reshape(-1)
                starts = list(range(0, flat.numel(), piece))
                for start in [*starts[::-1], *starts[:1]]:
                    stop = min(start + piece, flat.numel())
                    out = torch.empty(stop - start, dtype=flat.dtype)
                    assert other.read(name, start, stop, out=out) is out
                    assert torch.equal(out, flat[start:stop]), f"{method.id} {parameters}: '{name}' differs in pieces"
                for start, stop in other.pieces(name, piece):
                    assert torch.equal(other.read(name, start, stop), flat[start:stop]), f"{method.id} {parameters}: '{name}'"


def check_workers(method: Method) -> None:
    """One process or two write the same bytes."""
    count = _counts(method)[-1]
    parameters = list(parameter_sets(method, count))[-1]
    base, models = example_models(count, dtype="bfloat16")
    base |= {f"more.{i}": values for i, values in enumerate(example_models(0, dtype="bfloat16", long=True)[0].values())}
    for number, model in enumerate(models):
        model["more.0"] = base["more.0"] * (1 + 0.01 * number)
    written = []
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as scratch:
            save(merged(method, base, models, parameters), Path(scratch) / "out", workers=workers, shard_bytes=700, chunk=4099)
            files = sorted((Path(scratch) / "out").glob("*.safetensors*"))
            written.append({file.name: file.read_bytes() for file in files})
    assert written[0] == written[1], f"{method.id} {parameters}: the bytes depend on the number of workers"
    assert len(written[0]) > 2, "several shards and an index"


def check_randomness(method: Method) -> None:
    """Random numbers come from (seed, name, stream, position) alone, and can be replaced."""
    if not method.needs_uniform:
        return
    for count, parameters in _cases(method):
        base, models = example_models(count)
        first, again, other = (_tensors(merged(method, base, models, parameters, seed=seed)) for seed in (3, 3, 4))
        _assert_equal(again, first, f"{method.id} {parameters}: one seed, two results")
        density = parameters.get("density", [1.0])
        if min(density) < 0.9:
            assert any(not other[name].equal(first[name]) for name in first), f"{method.id} {parameters}: the seed is ignored"
        nothing_dropped = _tensors(merged(method, base, models, parameters, uniform_source=_Constant(0.0)))
        full = {**parameters, "density": [1.0] * len(density)}
        if parameters.get("rescale_by", "length") == "length":
            _assert_close(nothing_dropped, _tensors(merged(method, base, models, full)), f"{method.id} {parameters}")
    if (method.max_models or 3) >= 3:  # dropping a member shifts nobody: with its weight 0 it is as if it were not there
        parameters = next(iter(parameter_sets(method, 3)))
        base, models = example_models(3)
        silent = {**parameters, "weight": [0.0, *parameters["weight"][1:]]}
        without = {key: value[1:] if isinstance(value, list) else value for key, value in parameters.items()}
        with_it = _tensors(merged(method, base, models, silent))
        _assert_close(_tensors(merged(method, base, models[1:], without, streams=[1, 2])), with_it, method.id)


def check_refusals(method: Method) -> None:
    """NaN, other shapes, missing tensors, too few models: an error that names model and tensor, never a result."""
    import torch

    count = _counts(method)[-1]
    parameters = next(values for values in parameter_sets(method, count) if not method.copies(values))
    base, models = example_models(count)
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = {name: tensor.clone() for name, tensor in models[-1].items()}
        bad["layers.0.vector"][7] = value
        _refused(method, base, [*models[:-1], bad], parameters, ("layers.0.vector", f"model{count - 1}"))
    reshaped = {**models[-1], "layers.0.vector": torch.zeros(54)}
    missing = {name: tensor for name, tensor in models[-1].items() if name != "scale"}
    if method.needs_base or count > 1:
        _refused(method, base, [*models[:-1], reshaped], parameters, ("layers.0.vector", f"model{count - 1}", "54", "53"))
        _refused(method, base, [*models[:-1], missing], parameters, ("scale", f"model{count - 1}"))
    _, faults = method.resolve({"no_such_parameter": 1}, [{} for _ in range(count)], [f"model{i}" for i in range(count)])
    assert any("no_such_parameter" in fault for fault in faults), f"{method.id}: an unknown parameter is accepted"
    if method.min_models > 1:
        _, faults = method.resolve({}, [{}], ["model0"])
        assert any("at least" in fault or "exactly" in fault for fault in faults), f"{method.id}: too few models are accepted"


def check_copies(method: Method) -> None:
    """What is declared to be copied is copied byte by byte, whatever its dtype and values."""
    import torch

    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
    numbers = torch.tensor([1.5, float("nan"), -0.0, 448.0, 0.0, 1e-3])
    tensors = {str(kind): numbers.to(kind) for kind in kinds}
    tensors |= {"int": torch.arange(-3, 4), "bool": torch.tensor([True, False]), "infinity": torch.tensor([float("inf"), 1.0])}
    for parameters in parameter_sets(method, 1):
        if method.copies(parameters):
            found = _tensors(merged(method, tensors, [tensors], parameters))
            for name, value in tensors.items():
                assert found[name].dtype == value.dtype, f"{method.id}: '{name}' comes out as {found[name].dtype}"
                assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), f"{method.id}: '{name}' is not copied"


def _refused(method: Method, base: Tensors, models: Sequence[Tensors], parameters: Mapping[str, Any], words: Sequence[str]) -> None:
    try:
        _tensors(merged(method, base, models, parameters))
    except MergeError as error:
        assert isinstance(error, UserError)
        for word in words:
            assert word in str(error), f"{method.id}: the message does not name {word}: {error}"
        return
    raise AssertionError(f"{method.id}: accepts what it must refuse ({', '.join(words)})")


def _with_and_without_base(check: Callable[[Method], None]) -> Callable[[Method], None]:
    """The check, and once more with a base for a method that takes one and does not need it."""

    @functools.wraps(check)
    def both(method: Method) -> None:
        check(method)
        if method.takes_base and not method.needs_base:
            check(replace(method, needs_base=True))

    return both


_ON_MERGES: tuple[Callable[[Method], None], ...] = (
    check_shape_and_dtype,
    check_single_model,
    check_fixed_point,
    check_zero_delta,
    check_permutation,
    check_inputs_untouched,
    check_chunks,
    check_rounds_once,
    check_wide_inputs,
    check_workers,
    check_randomness,
    check_copies,
    check_refusals,
)
#: every check, in the order in which a failure is most telling
CHECKS: tuple[Callable[[Method], None], ...] = (check_declaration, *map(_with_and_without_base, _ON_MERGES))
