"""How close the weights of models are to each other, and to merges of them that nobody has built."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from modelglue.checkpoint import Checkpoint, SafetensorsCheckpoint, TensorsCheckpoint, tensor_file, write_bytes_atomic
from modelglue.errors import CheckpointError, UserError, did_you_mean
from modelglue.zoo.counted import Scope, counted_tensors
from modelglue.zoo.gram import Floats, column_products, columns_of, cosines, pair_number
from modelglue.zoo.signature import architecture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

Mode = Literal["column", "tensor", "global"]
MODES = ("column", "tensor", "global")
SCOPES = ("all", "attn", "mlp")
FORMAT = "modelglue-similarity/1"

#: pairs that share less of the elements that are looked at are not comparable
_SHARED = 0.99


@dataclass(frozen=True)
class GramOf:
    """Inner products of one tensor: [pairs, columns] stored as `tensor`; pairs i <= j of `members` (model indices)."""

    tensor: str
    members: tuple[int, ...]
    columns: int


@dataclass(frozen=True, eq=False)
class Similarity:
    """Similarities of a list of models: `matrix` [n, n] float64, symmetric, 1 on the diagonal, NaN = not comparable."""

    matrix: Floats
    labels: tuple[str, ...]
    mode: str
    scope: str
    delta: bool
    warnings: tuple[str, ...]
    gram: tuple[GramOf, ...] | None
    """What similarities to merges are computed from, when it was kept."""
    store: Checkpoint

    def to_merge(self, weights: Mapping[int, float], other: int) -> float:
        """Similarity between a linear merge (model index -> weight) and model `other`, from inner products alone.

        m = sum_i a_i w_i, so per column <m, w_j> = sum_i a_i G[i, j] and |m|^2 = a' G a, with a normalised to sum 1.
        Equals the similarity to the merge computed in float32 up to rounding. NaN if any two of the models are not
        comparable.
        Reads (k + 1)(k + 2) / 2 rows of the kept inner products per tensor for k models.
        """
        if self.gram is None:
            raise UserError("the inner products were not kept, so similarities to merges are unknown. Use keep_gram=True.")
        kept = {index: float(weight) for index, weight in weights.items() if weight}
        total = sum(kept.values())
        outside = [index for index in [*kept, other] if not 0 <= index < len(self.labels)]
        if outside or not kept or not total > 0:
            raise UserError(
                f"weights {dict(weights)} and model {other}: allowed are indices 0 to {len(self.labels) - 1} "
                "and weights with a positive sum."
            )
        involved = list(dict.fromkeys([*kept, other]))
        if np.isnan(self.matrix[np.ix_(involved, involved)]).any():
            return float("nan")
        if involved == [other]:
            return 1.0
        alpha = {index: weight / total for index, weight in kept.items()}
        rows = (_merged_products(self.store, gram, alpha, other) for gram in self.gram if set(involved) <= set(gram.members))
        return _mean_cosine(rows, self.mode)

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically; equal content gives equal bytes."""
        tensors = {name: self.store.tensor(name) for name in self.store.names()}
        metadata = {
            "format": FORMAT,
            "models": json.dumps(list(self.labels), ensure_ascii=False),
            "mode": self.mode,
            "scope": self.scope,
            "delta": json.dumps(self.delta),
            "warnings": json.dumps(list(self.warnings), ensure_ascii=False),
            "gram": json.dumps(None if self.gram is None else [asdict(gram) for gram in self.gram], sort_keys=True),
        }
        write_bytes_atomic(path, _with_metadata(tensor_file(TensorsCheckpoint(tensors)), metadata))

    @classmethod
    def load(cls, path: Path) -> Similarity:
        """Open what `save` wrote. The inner products stay on disk and are mapped when asked for."""
        store = SafetensorsCheckpoint(path)
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        try:
            metadata = header["__metadata__"]
            if metadata["format"] != FORMAT:
                raise ValueError(f"format {metadata['format']!r}")
            gram = json.loads(metadata["gram"])
            labels = tuple(str(label) for label in json.loads(metadata["models"]))
            matrix = np.array(store.tensor("similarity").numpy(), dtype=np.float64)
            if matrix.shape != (len(labels), len(labels)):
                raise ValueError(f"a matrix of shape {matrix.shape} for {len(labels)} models")
            return cls(
                matrix,
                labels,
                metadata["mode"],
                metadata["scope"],
                bool(json.loads(metadata["delta"])),
                tuple(json.loads(metadata["warnings"])),
                None if gram is None else tuple(GramOf(one["tensor"], tuple(one["members"]), one["columns"]) for one in gram),
                store,
            )
        except (KeyError, ValueError, TypeError, CheckpointError) as error:
            raise CheckpointError(f"{path}: is no {FORMAT} file ({error!r}). Compute it again.") from error


def similarity(
    checkpoints: Sequence[Checkpoint],
    *,
    labels: Sequence[str] | None = None,
    mode: Mode = "column",
    scope: Scope = "all",
    base: Checkpoint | None = None,
    keep_gram: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Similarity:
    """Compare the attention and feed-forward weights of every pair of models.

    `column`: cosine of each column along the output dimension, mean over columns, then unweighted mean over tensors
    (Model-GLUE, arXiv 2410.05357). `tensor`: cosine of the flattened tensor, mean over tensors. `global`: one cosine
    over everything. `scope` keeps attention or feed-forward tensors only. With `base`, its weights are subtracted from
    all models first (task vectors). Models of different class or sizes are not comparable: NaN.

    Columns that are zero in both models are left out, zero in one counts as 0. A tensor that one of the two lacks is
    skipped and reported; with less than 99 % of the elements shared the pair is not comparable.

    Every counted tensor of every model is read once (expressions are computed chunk by chunk); time n^2/2 multiply-adds
    per element; memory 512 kB per model plus about 100 MB, and with `keep_gram` (which `Similarity.to_merge` needs)
    4 bytes per column and pair in `column` mode. `progress(done, total)` counts bytes.
    """
    names = [f"model {number}" for number in range(len(checkpoints))] if labels is None else list(labels)
    _check(checkpoints, names, mode, scope)
    count = len(checkpoints)
    buckets: dict[str, list[int]] = {}
    for number, checkpoint in enumerate(checkpoints):
        buckets.setdefault(json.dumps(architecture(checkpoint), sort_keys=True, default=str), []).append(number)
    plan = [_plan(checkpoints, names, bucket, scope) for bucket in buckets.values() if len(bucket) > 1]
    for number in sorted({member for part in plan for one in part for member in one.members}):
        checkpoints[number].prepare(None)
    if base is not None:
        base.prepare(None)
    total = sum(one.bytes for part in plan for one in part)

    table = _Table.zeros(count)
    kept: dict[str, torch.Tensor] = {}
    grams: list[GramOf] = []
    warnings: list[str] = []
    done = 0
    for part in plan:
        without_base: list[str] = []
        for tensor in part:
            done += tensor.bytes
            table.count(tensor)
            if base is not None and not _has(base, tensor):
                without_base.append(tensor.name)
            elif len(tensor.members) > 1:
                products = _compare(checkpoints, names, tensor, base, mode, table, keep=keep_gram)
                if products is not None:
                    name = f"gram.{len(grams):05d}.{tensor.name}"
                    kept[name] = products
                    grams.append(GramOf(name, tensor.members, products.shape[1]))
            if progress is not None:
                progress(done, total)
        warnings += _part_warnings(part, names, without_base)
    matrix, incomparable = table.result(mode, [one.members for part in plan for one in part])
    warnings += [
        f"'{names[a]}' and '{names[b]}' share {share:.1%} of the elements that are compared, at least {_SHARED:.0%} "
        "are needed: not comparable."
        for a, b, share in incomparable
    ]
    import torch

    store = TensorsCheckpoint({"similarity": torch.from_numpy(matrix.copy()), **kept}, label="similarity")
    return Similarity(matrix, tuple(names), mode, scope, base is not None, tuple(warnings), tuple(grams) if keep_gram else None, store)


@dataclass(frozen=True)
class _Tensor:
    """One tensor name and shape, and the models that have it so."""

    name: str
    shape: tuple[int, ...]
    members: tuple[int, ...]
    numel: int
    bytes: int


@dataclass(frozen=True)
class _Table:
    """Running sums over tensors, one number per pair of models."""

    sums: Floats
    tensors: Floats
    products: Floats
    squares: Floats
    """[i, j]: squared norm of model i over what it shares with j."""
    shared: Floats
    """Elements that both have; on the diagonal, elements of the model."""

    @classmethod
    def zeros(cls, count: int) -> _Table:
        return cls(*(np.zeros((count, count)) for _ in range(5)))

    def count(self, tensor: _Tensor) -> None:
        """Note which elements the members share; sharing with a base comes with `add`."""
        for member in tensor.members:
            self.shared[member, member] += tensor.numel

    def add(self, tensor: _Tensor, value: Floats, says: NDArray[np.bool_], totals: Floats) -> None:
        """Per pair i <= j of members: mean cosine, whether there is one, and inner product."""
        count = len(tensor.members)
        i, j = np.triu_indices(count)

        def both(packed: Floats) -> Floats:
            """[n, n] of a packed triangle, 0 on the diagonal."""
            full = np.zeros((count, count))
            full[i, j] = full[j, i] = packed
            np.fill_diagonal(full, 0.0)
            return full

        place = np.ix_(tensor.members, tensor.members)
        squares = totals[[pair_number(k, k, count) for k in range(count)]]
        self.sums[place] += both(np.where(says, value, 0.0))
        self.tensors[place] += both(says.astype(np.float64))
        self.products[place] += both(totals)
        self.squares[place] += np.where(np.eye(count), 0.0, squares[:, None])
        self.shared[place] += both(np.full(len(totals), float(tensor.numel)))

    def result(self, mode: str, together: Sequence[tuple[int, ...]]) -> tuple[Floats, list[tuple[int, int, float]]]:
        """The matrix, and the pairs of one architecture that share too little (a, b, share)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            if mode == "global":
                norms = np.sqrt(self.squares * self.squares.T)
                matrix = np.where(self.squares + self.squares.T > 0, self.products / np.maximum(norms, 1e-8), np.nan)
            else:
                matrix = self.sums / self.tensors  # 0 / 0: nothing to compare
            own = np.diag(self.shared)
            share = self.shared / np.maximum(own[:, None], own[None, :])
        matrix = np.clip(matrix, -1.0, 1.0)
        matrix[~(share >= _SHARED)] = np.nan
        np.fill_diagonal(matrix, 1.0)
        asked = sorted({(a, b) for members in together for a in members for b in members if a < b})
        return matrix, [(a, b, float(share[a, b])) for a, b in asked if share[a, b] < _SHARED]


def _plan(checkpoints: Sequence[Checkpoint], names: Sequence[str], bucket: list[int], scope: Scope) -> list[_Tensor]:
    """What is compared among the models of one architecture, sorted by tensor name."""
    counted = counted_tensors([checkpoints[number] for number in bucket], [names[number] for number in bucket], scope)
    homes: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for number, tensors in zip(bucket, counted, strict=True):
        for name in tensors:
            homes.setdefault((name, checkpoints[number].info(name).shape), []).append(number)
    found = []
    for (name, shape), members in sorted(homes.items()):
        infos = [checkpoints[member].info(name) for member in members]
        found.append(_Tensor(name, shape, tuple(members), infos[0].numel, sum(info.nbytes for info in infos)))
    return found


def _compare(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    tensor: _Tensor,
    base: Checkpoint | None,
    mode: str,
    table: _Table,
    *,
    keep: bool,
) -> torch.Tensor | None:
    """Read one tensor of its members and add it to the table; returns the inner products [pairs, columns] to keep."""
    import torch

    count = len(tensor.members)
    pairs = count * (count + 1) // 2
    columns = columns_of(tensor.shape)[0] * columns_of(tensor.shape)[2]
    wide = torch.empty(pairs, columns) if keep and mode == "column" else None
    totals, sums, says = np.zeros(pairs), np.zeros(pairs), np.zeros(pairs)
    members = [checkpoints[member] for member in tensor.members]
    position = 0
    for products in column_products(members, [names[member] for member in tensor.members], tensor.name, base):
        totals += products.sum(axis=1)
        if mode == "column":
            values, counts = cosines(products, count)
            sums += np.where(counts, values, 0.0).sum(axis=1)
            says += counts.sum(axis=1)
        if wide is not None:
            wide[:, position : position + products.shape[1]] = torch.from_numpy(products)
        position += products.shape[1]
    if mode != "column":
        values, counts = cosines(totals[:, None], count)
        sums, says = values[:, 0], counts[:, 0].astype(np.float64)
    table.add(tensor, sums / np.maximum(says, 1), says > 0, totals)
    if not keep:
        return None
    return torch.from_numpy(totals[:, None].copy()) if wide is None else wide


def _merged_products(store: Checkpoint, gram: GramOf, alpha: Mapping[int, float], other: int) -> tuple[Floats, Floats, Floats]:
    """(<m, w>, <m, m>, <w, w>), each [columns] float64, of the merge m and model `other`."""
    local = {member: position for position, member in enumerate(gram.members)}

    def row(a: int, b: int) -> Floats:
        number = pair_number(local[a], local[b], len(gram.members))
        values = store.read(gram.tensor, number * gram.columns, (number + 1) * gram.columns)
        return np.asarray(values.numpy(), dtype=np.float64)

    members = list(alpha)
    inner, square = np.zeros(gram.columns), np.zeros(gram.columns)
    for position, a in enumerate(members):
        inner += alpha[a] * row(a, other)
        square += alpha[a] ** 2 * row(a, a)
        for b in members[position + 1 :]:
            square += 2 * alpha[a] * alpha[b] * row(a, b)
    return inner, np.maximum(square, 0.0), row(other, other)


def _mean_cosine(rows: Iterator[tuple[Floats, Floats, Floats]], mode: str) -> float:
    """The similarity that the matrix would show, from (<a, b>, <a, a>, <b, b>) per tensor."""
    values = []
    totals = np.zeros(3)
    for inner, ours, theirs in rows:
        says = (ours > 0) | (theirs > 0)
        if says.any():
            values.append(float((inner / np.maximum(np.sqrt(ours * theirs), 1e-8))[says].mean()))
        totals += [inner.sum(), ours.sum(), theirs.sum()]
    if not values:
        return float("nan")
    value = totals[0] / max(np.sqrt(totals[1] * totals[2]), 1e-8) if mode == "global" else np.mean(values)
    return float(np.clip(value, -1.0, 1.0))


def _has(base: Checkpoint, tensor: _Tensor) -> bool:
    return tensor.name in base.names() and base.info(tensor.name).shape == tensor.shape


def _part_warnings(part: Sequence[_Tensor], names: Sequence[str], without_base: Sequence[str]) -> list[str]:
    found = []
    everybody = sorted({member for tensor in part for member in tensor.members})
    partial = [tensor for tensor in part if len(tensor.members) < len(everybody)]
    if partial:
        have = ", ".join(f"'{names[member]}'" for member in partial[0].members)
        found.append(
            f"{len(partial)} tensors are not in all models with the same shape and are compared only where they are, "
            f"'{partial[0].name}' ({' x '.join(map(str, partial[0].shape))}) in {have} only."
        )
    if without_base:
        found.append(
            f"the base lacks {len(without_base)} tensors of these models, or has them in another shape, "
            f"among them '{without_base[0]}'; they are left out."
        )
    return found


def _with_metadata(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """The same safetensors file with more in its header; offsets count from the header's end, so they stay true."""
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    header["__metadata__"] = {**header.get("__metadata__", {}), **metadata}
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _check(checkpoints: Sequence[Checkpoint], names: Sequence[str], mode: str, scope: str) -> None:
    if not checkpoints:
        raise UserError("no models were given; a similarity needs at least one.")
    if len(names) != len(checkpoints):
        raise UserError(f"{len(names)} labels for {len(checkpoints)} models; give one label per model.")
    for what, value, allowed in (("mode", mode, MODES), ("scope", scope, SCOPES)):
        if value not in allowed:
            raise UserError(f"{what} is '{value}'; allowed are {', '.join(allowed)}.{did_you_mean(value, allowed)}")
