"""The expression of a recipe: its models are opened and made to agree, its merges planned, made and joined."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from modelglue.checkpoint import FLOATING, STORE_DTYPES, Checkpoint, JoinedCheckpoint, MergedCheckpoint
from modelglue.checkpoint.engine.fit import promoted
from modelglue.checkpoint.vocabulary import AlignmentReport, chat_template, dressed
from modelglue.errors import RecipeError
from modelglue.methods import get
from modelglue.recipe.canonical import canonical, written_out
from modelglue.recipe.checks import Checks
from modelglue.recipe.dataflow import along_hops
from modelglue.recipe.document import Place
from modelglue.recipe.inputs import Inputs, merged_fields, replacing
from modelglue.recipe.into import put_into
from modelglue.recipe.parts import rest_of
from modelglue.recipe.plan import Piece, Plan, plan
from modelglue.recipe.schema import Dtype, Into, Recipe
from modelglue.recipe.settings import distinct_values

_LONG = {short: name for name, short in STORE_DTYPES.items()}


@dataclass(frozen=True)
class Built:
    """The expression of a recipe, and what was found on the way.

    `passes`: how often a method reads its inputs at most, here or in a nested recipe; parts that are looked at again do not count.
    """

    checkpoint: Checkpoint
    warnings: tuple[str, ...] = ()
    alignment: AlignmentReport | None = None
    passes: int = 1


def assemble(recipe: Recipe, resolve: Callable[[str], Checkpoint], *, strict: bool = False) -> Built:
    """Turn a recipe into an expression. RecipeError names every fault that only the models' headers show; `strict`: warnings, too."""
    if not recipe.was_read:
        checks = Checks(recipe.origin.document).run(recipe)
        if checks.faults:
            raise RecipeError("\n".join(checks.faults))
    context = _Context(resolve)
    checkpoint, alignment = context.assembled(recipe, recipe.dtype.store)
    warnings = tuple(dict.fromkeys(context.warnings))
    if strict and warnings:
        raise RecipeError("\n".join(warnings))
    return Built(checkpoint, warnings, alignment, context.passes)


def _as_stored(recipe: Recipe) -> Recipe:
    """A merge whose layers are taken over as they are: it is rounded as if it had been written."""
    return recipe if recipe.dtype.store is not None else recipe.model_copy(update={"dtype": Dtype(store="donor")})


@dataclass
class _Context:
    """What nested recipes share: every reference is opened once, every nested recipe that stands there twice is built once."""

    resolve: Callable[[str], Checkpoint]
    opened: dict[str, Checkpoint] = field(default_factory=dict)
    nested: dict[str, Checkpoint] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    passes: int = 1

    def open(self, reference: str) -> Checkpoint:
        if reference not in self.opened:
            self.opened[reference] = self.resolve(reference)
        return self.opened[reference]

    def build(self, recipe: Recipe) -> Checkpoint:
        key = json.dumps(canonical(recipe))
        if key not in self.nested:
            self.nested[key], _ = self.assembled(recipe, recipe.dtype.store or ("donor" if recipe.hops else "float32"))
        return self.nested[key]

    def assembled(self, recipe: Recipe, store: str | None) -> tuple[Checkpoint, AlignmentReport | None]:
        if not recipe.hops:
            return _Assembly(self, recipe, store).run()
        folded = along_hops(recipe, lambda node: self.open(node) if isinstance(node, str) else self.build(_as_stored(node)), store)
        self.warnings += [recipe.origin.fault(("hops",), text) for text in folded.warnings]
        return folded.checkpoint, None


class _Assembly:
    """One recipe; the recipes inside it are assembled by their own."""

    def __init__(self, context: _Context, recipe: Recipe, store: str | None) -> None:
        self._context = context
        self._recipe = recipe
        self._store = None if store == "donor" else store
        self._method = get(recipe.method)
        self._inputs = Inputs(recipe, context.open, context.build)

    def run(self) -> tuple[Checkpoint, AlignmentReport | None]:
        with self._placed(("tokenizer",)):
            alignment = self._inputs.align(widen=self._store in STORE_DTYPES)
        planned = plan(self._recipe, self._inputs, self._method)
        self._context.warnings += [*self._inputs.odd_parts(), *alignment.warnings, *planned.warnings]
        if planned.faults:
            raise RecipeError("\n".join(dict.fromkeys(planned.faults)))
        values = [found for piece in planned.pieces for found in distinct_values(piece.values)]
        rounds = [self._method.rounds(found) for found in values]
        self._context.passes = max(self._context.passes, *(1 + sum(one.ranges is None for one in found) for found in rounds))
        if len(planned.pieces) > 1 and any(one.scope == "model" for found in rounds for one in found):
            text = f"{self._method.id} looks at a whole model at once; here it looks at each slice or module by itself."
            self._context.warnings.append(self._recipe.origin.fault((), text))
        layers = merged_fields(*planned.fields)
        merged = dressed(self._join(planned), config=merged_fields(self._inputs.fields, layers), files=alignment.files)
        if self._recipe.into is not None:
            merged = self._put_into(self._recipe.into, merged, layers)
        if self._recipe.chat_template is not None:
            with self._placed(("chat_template",)):
                made = chat_template(self._inputs.models(), merged, self._recipe.chat_template)
            self._context.warnings += made.warnings
            merged = dressed(merged, files=made.files)
        return merged, alignment.report

    @contextlib.contextmanager
    def _placed(self, place: Place) -> Iterator[None]:
        """Faults that only the models show get the file and line of what they are about."""
        try:
            yield
        except RecipeError as error:
            faults = [self._recipe.origin.fault(place, line.removeprefix(f"{place[-1]}: ")) for line in str(error).split("\n")]
            raise RecipeError("\n".join(faults)) from error

    def _join(self, planned: Plan) -> Checkpoint:
        """The merges side by side, under the donor's config; a merge of whole models is the output itself."""
        description = written_out(self._recipe)
        donor = self._inputs.view(self._inputs.donor)
        if [piece.whole for piece in planned.pieces] == [True]:
            return self._merged(planned.pieces[0], self._donor_of_dtypes(), description)
        parts = [self._merged(piece, None, None) for piece in planned.pieces]
        joined = JoinedCheckpoint(
            [("", one) for one in [*parts, *map(self._stored, planned.copied)]], donor.config, description, donors=[donor]
        )
        return dressed(joined, config=self._dtype_field(joined, donor), files=replacing(joined, donor))

    def _dtype_field(self, output: Checkpoint, donor: Checkpoint) -> dict[str, Any]:
        """The field of the donor's config that names the stored dtype, where the recipe says which, or where the donor's was widened."""
        store = _LONG.get(promoted(output, donor) or "") if self._store == "widest" else self._store
        config = donor.config
        if store not in STORE_DTYPES or not config:
            return {}
        return {"torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype": store}

    def _donor_of_dtypes(self) -> Checkpoint:
        """Whose dtypes the output has: the donor's; those of the model on disk behind it, where it is itself a merge in float32."""
        donor = self._inputs.view(self._inputs.donor)
        root = self._inputs.root()
        if root is None:
            return donor
        if (same := self._inputs.dressed_root()) is not None:
            return same
        kinds = {root.info(name).dtype for name in root.names()} & FLOATING
        if self._store is None and len(kinds) == 1:
            self._store = _LONG[kinds.pop()]
        return donor

    def _merged(self, piece: Piece, donor: Checkpoint | None, description: Mapping[str, Any] | None) -> MergedCheckpoint:
        recipe = self._recipe
        merged = MergedCheckpoint(
            self._method, piece.models, piece.base, piece.values,
            labels=piece.stretch.labels(), store=self._store, seed=recipe.seed, donor=donor, description=description,
            least=self._method.min_models, missing=recipe.missing, shape_mismatch=recipe.shape_mismatch,
        )  # fmt: skip
        self._context.warnings += merged.warnings
        return merged

    def _stored(self, model: Checkpoint) -> Checkpoint:
        """What is copied, in the dtype of the output."""
        if self._store not in STORE_DTYPES or not model.names():
            return model
        return MergedCheckpoint(get("linear"), [model], None, {"weight": [1.0], "normalize": False}, store=self._store)

    def _put_into(self, into: Into, merged: Checkpoint, layers: Mapping[str, Any]) -> Checkpoint:
        whole = self._inputs.node(into.model)
        label = into.model if isinstance(into.model, str) else f"the {into.model.method} merge"
        rest = self._stored(rest_of(whole, into.part, label))
        aligned = self._recipe.tokenizer is not None or self._recipe.vocabulary_mismatch == "truncate"
        found, odd = put_into(whole, into.part, merged, rest, label, aligned=aligned, layers=layers)
        self._context.warnings += odd
        config = {**found.config, **self._dtype_field(found, whole)}
        return JoinedCheckpoint([("", found)], config, written_out(self._recipe), files=found.files, donors=[whole])
