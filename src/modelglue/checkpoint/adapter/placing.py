"""Adapters laid on a base: for every changed tensor, what replaces it, what is added to it, which of its rows are replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from modelglue.checkpoint.adapter import names as naming
from modelglue.checkpoint.adapter.changes import Change, Layout, LowRank, Rows, Shift, equal_changes
from modelglue.checkpoint.adapter.folder import Adapter, Update
from modelglue.checkpoint.adapter.stacks import Fused, fused_parameters, lay_on_parameters, modules_of_experts
from modelglue.checkpoint.formats.header import shown
from modelglue.checkpoint.protocol import FLOATING, Checkpoint, TensorInfo
from modelglue.checkpoint.tensor_names import layer_of
from modelglue.errors import CheckpointError


@dataclass(frozen=True)
class Placement:
    """Every change, the fields of the config that they entail, and what the user should know."""

    changes: Mapping[str, Change]
    untied: bool
    vocabulary: tuple[int, int] | None
    warnings: Sequence[str]


def place(base: Checkpoint, adapters: Sequence[Adapter], scales: Sequence[float]) -> Placement:
    """Find where every tensor of the adapters belongs. Reads headers only, except of tensors that two adapters replace, or that are tied.

    One CheckpointError names all modules that the base lacks, all shapes that do not fit, and all dtypes that cannot be added to.
    """
    placing = _Placing(base)
    if len(adapters) > 1:
        placing.faults += [
            f"{adapter.path}: is a DoRA adapter, which sets the norms of the weights and cannot be added to others. Give it alone."
            for adapter in adapters
            if adapter.uses_dora
        ]
    for adapter, scale in zip(adapters, scales, strict=True):
        placing.lay(adapter, scale)
    if placing.faults:
        raise CheckpointError("\n".join(placing.faults))
    untied = placing.tie()
    vocabulary = placing.resized()
    if placing.faults:
        raise CheckpointError("\n".join(placing.faults))
    return Placement(dict(sorted(placing.changes.items())), untied, vocabulary, tuple(placing.warnings))


class _Placing:
    """The work of `place`: changes, faults and warnings as they are found."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.names = set(base.names())
        self.modules = {name.rpartition(".")[0] for name in self.names} | modules_of_experts(self.names)
        self.embedding = naming.input_embedding(base)
        self.head = naming.output_head(self.names)
        self.changes: dict[str, Change] = {}
        self.faults: list[str] = []
        self.warnings: list[str] = []

    # -- one adapter ----------------------------------------------------------------------------------------------------

    def lay(self, adapter: Adapter, scale: float) -> None:
        label = str(adapter.path)
        self._warn_of(adapter)
        if adapter.uses_dora and scale != 1:
            self.faults.append(
                f"{label}: is a DoRA adapter, whose strength cannot be scaled: it sets the norms of the weights. Use it at 1."
            )
            return
        try:
            called = self._called(adapter)
        except CheckpointError as error:
            self.faults.append(str(error))
            return
        for tensor, key in adapter.replaced.items():
            module, _, parameter = tensor.rpartition(".")
            name = f"{called[module]}.{parameter}" if called.get(module) else tensor
            self._replace(adapter, name, key)
        self._square: dict[Layout, str] = {}  # layout -> the first layer laid so, of square ones
        self._told: dict[Layout, str] = {}  # and of layers whose shape tells
        by_module: dict[str, list[Update]] = {}
        for update in adapter.updates.values():
            by_module.setdefault(update.module, []).append(update)
        for module, updates in by_module.items():
            self._update(adapter, called[module], updates, scale)
        self._warn_of_squares(adapter)
        for module, key in adapter.tokens.items():
            self._rows(adapter, module, called[module], key)

    def _warn_of(self, adapter: Adapter) -> None:
        trained_on, given = adapter.config.base_model_name_or_path, self.base.hub_id
        if trained_on and given and "/" in trained_on and trained_on.count("/") == 1 and trained_on.lower() != given.lower():
            self.warnings.append(f"{adapter.path}: was trained on {trained_on} and is laid on {given}.")
        if adapter.config.unknown:
            listed = ", ".join(map(shown, adapter.config.unknown))
            self.warnings.append(f"{adapter.path}: has settings that are not known here and are not obeyed: {listed}.")

    def _called(self, adapter: Adapter) -> dict[str, str]:
        """Module as the adapter calls it -> as the base does; modules of modules_to_save that the base lacks keep their name."""
        wanted = dict.fromkeys([*(update.module for update in adapter.updates.values()), *adapter.tokens])
        replaced = {tensor.rpartition(".")[0]: tensor for tensor in adapter.replaced if tensor not in self.names}
        own = {module for module, tensor in replaced.items() if adapter.config.is_saved(tensor) and module not in wanted}
        called = {module: naming.on_disk(module, self.modules) for module in [*wanted, *replaced]}
        tied = self._tied_head()
        there = self.modules | own | ({tied.removesuffix(".weight")} if tied is not None else set())
        missing = [module for module in called if called[module] not in there]
        if missing:
            called |= naming.with_other_prefix(missing, sorted(own), self.modules, str(adapter.path))
            self.warnings.append(
                f"{adapter.path}: its modules are called otherwise in the base: '{missing[0]}' is taken for '{called[missing[0]]}'"
                + (f", and {len(missing) - 1} more likewise." if len(missing) > 1 else ".")
            )
        if twice := sorted(place for place, count in Counter(called.values()).items() if count > 1) if missing else []:
            raise CheckpointError(f"{adapter.path}: adapts '{twice[0]}' of the base under two names. Rename the adapter's tensors.")
        return called

    def _tied_head(self) -> str | None:
        """What the adapter calls a head that the base does not hold, because it is its embedding."""
        tied = self.head is None and self.embedding is not None and naming.is_tied(self.base.config, head_on_disk=False)
        return naming.unwritten_head(self.base.config) if tied else None

    # -- what happens to a tensor ---------------------------------------------------------------------------------------

    def _change(self, name: str) -> Change:
        """What is known to happen to a tensor; a tied head that the base does not hold starts from the embedding."""
        if name not in self.changes:
            origin = name if name in self.names else self.embedding
            assert origin is not None, "only a tied head may be missing"
            self.changes[name] = Change(self.base.info(origin), origin)
        return self.changes[name]

    def _replace(self, adapter: Adapter, name: str, key: str) -> None:
        info = adapter.info(key)
        if name not in self.names and name != self._tied_head():
            if not adapter.config.is_saved(name):
                self.faults.append(
                    f"{adapter.path}: tensor '{key}' replaces '{name}', which the base does not have, and no module of modules_to_save "
                    "holds it. Give the base that the adapter was trained on."
                )
            elif name in self.changes:
                self._same(adapter, key, name)
            else:
                self.changes[name] = Change(info, None, (adapter, key))
                self.warnings.append(f"{adapter.path}: brings '{name}', which the base does not have; the config stays the base's.")
            return
        change = self._change(name)
        known = change.info
        if change.replaced is not None:
            self._same(adapter, key, name)
            return
        rows_may_differ = name in (self.embedding, self.head, self._tied_head()) or adapter.config.is_saved(name)
        fits = info.shape[1:] == known.shape[1:] if rows_may_differ else info.shape == known.shape
        if not fits or len(info.shape) != len(known.shape):
            self.faults.append(
                f"{adapter.path}: tensor '{key}' of shape {list(info.shape)} replaces '{name}' of shape {list(known.shape)}."
            )
        elif (info.dtype in FLOATING) != (known.dtype in FLOATING):
            self.faults.append(f"{adapter.path}: tensor '{key}' is {info.dtype} and replaces '{name}', which is {known.dtype}.")
        else:
            dtype = known.dtype if known.dtype in FLOATING else info.dtype
            self.changes[name] = replace(change, info=TensorInfo(info.shape, dtype), replaced=(adapter, key))

    def _same(self, adapter: Adapter, key: str, name: str) -> None:
        """Two adapters replace one tensor, which only makes sense with equal values."""
        import torch

        replaced = self.changes[name].replaced
        assert replaced is not None
        other, other_key = replaced
        if other.info(other_key) != adapter.info(key) or not torch.equal(other.read(other_key), adapter.read(key)):
            self.faults.append(
                f"{adapter.path} and {other.path}: both replace '{name}', by different values, which cannot be added. "
                "Use one of the adapters, or merge the two adapted models instead."
            )

    def _add(self, name: str, adapter: Adapter, one: LowRank | Shift) -> None:
        change = self._change(name)
        if change.info.dtype not in FLOATING:
            self.faults.append(
                f"{adapter.path}: changes '{name}', which is {change.info.dtype} in the base; allowed are {', '.join(sorted(FLOATING))}. "
                "Dequantise the base first."
            )
            return
        self.changes[name] = replace(change, added=(*change.added, one))

    def _update(self, adapter: Adapter, module: str, updates: Sequence[Update], scale: float) -> None:
        """The low-rank updates of one module: of its weight, or of parameters that the config targets."""
        name = f"{module}.weight"
        there = name in self.names or name == self._tied_head()
        if there and len(updates) == 1 and len(self._change(name).info.shape) != len(adapter.info(updates[0].A).shape) + 1:
            self._weight(adapter, name, updates[0], scale)
            return
        fused = fused_parameters(self.base, self.names, module)
        parameters = self._parameters(adapter, updates[0].module, module, [*self.names, *fused]) or ([name] if there else [])
        if len(parameters) != len(updates):
            self.faults.append(
                f"{adapter.path}: '{updates[0].module}' has {len(updates)} low-rank update{'s' * (len(updates) > 1)}, and "
                + (
                    f"target_parameters names {len(parameters)} tensors of it in the base. "
                    if parameters
                    else f"the base has no '{name}'. "
                )
                + "Give the base that the adapter was trained on."
            )
            return
        self._parameters_laid(adapter, parameters, fused, sorted(updates, key=lambda update: -update.depth), scale)

    def _weight(self, adapter: Adapter, name: str, update: Update, scale: float) -> None:
        info = self._change(name).info
        A, B = adapter.info(update.A).shape, adapter.info(update.B).shape
        out, into = B[0], A[1:]
        fits: dict[Layout, bool] = {
            "plain": info.shape == (out, *into) and not update.embedding,
            "transposed": len(into) == 1 and info.shape == (into[0], out),
        }
        # where shape and usual way differ the shape decides; a square matrix fits both ways
        usual = self._usual_layout(adapter, name, update)
        layout: Layout = usual if fits[usual] else "plain" if usual == "transposed" else "transposed"
        if len(into) == 1 and not update.embedding:
            (self._square if all(fits.values()) else self._told).setdefault(layout, name)
        if not fits[layout]:
            self._misfit(adapter, name, update, info)
        elif self._rank_fits(adapter, update, A[0], None):
            c = adapter.scale(update.name) * scale
            self._add(name, adapter, LowRank(adapter, update, c, layout))
            if update.magnitude is not None:
                self._check_vector(adapter, update.magnitude, out, name)
            if update.bias is not None:
                self._bias(adapter, name.removesuffix("weight") + "bias", update.bias, c, out)
        if update.embedding and update.bias is not None:
            self.faults.append(f"{adapter.path}: tensor '{update.bias}' is a bias of an embedding, which has none.")

    def _usual_layout(self, adapter: Adapter, name: str, update: Update) -> Layout:
        """How a layer is stored where its shape does not tell: as all blocks of its class are, else as the adapter's config says.

        What PEFT writes there is a setting of the last layer that it has met: of no use where one model has both kinds.
        """
        if update.embedding:
            return "transposed"
        if naming.is_transposed(self.base.config):
            return "transposed" if layer_of(name) is not None else "plain"
        return "transposed" if adapter.config.fan_in_fan_out else "plain"

    def _warn_of_squares(self, adapter: Adapter) -> None:
        """Square layers are laid as the config says, and other layers are stored the other way round."""
        if naming.is_transposed(self.base.config):
            return
        for layout, name in self._square.items():
            others = [other for way, other in self._told.items() if way != layout]
            if others and layout not in self._told:
                self.warnings.append(
                    f"{adapter.path}: '{name}' is square, so its shape does not tell how it is stored; it is taken as fan_in_fan_out says, "
                    f"but '{others[0]}' is stored the other way round. Check fan_in_fan_out in adapter_config.json."
                )

    def _bias(self, adapter: Adapter, name: str, key: str, c: float, size: int) -> None:
        if name not in self.names:
            self.faults.append(f"{adapter.path}: tensor '{key}' moves '{name}', which the base does not have.")
            return
        if not adapter.config.lora_bias:
            self.warnings.append(f"{adapter.path}: holds '{key}' though lora_bias is not set; the bias is moved all the same.")
        self._check_vector(adapter, key, size, name)
        self._add(name, adapter, Shift(adapter, key, c))

    def _check_vector(self, adapter: Adapter, key: str, size: int, name: str) -> None:
        if adapter.info(key).numel != size:
            shape = list(adapter.info(key).shape)
            self.faults.append(f"{adapter.path}: tensor '{key}' of shape {shape} should hold {size} numbers for '{name}'.")

    def _rank_fits(self, adapter: Adapter, update: Update, rank: int, parameter: str | None) -> bool:
        module = f"{update.module}.{parameter}" if parameter else update.module
        expected = adapter.config.rank(module)
        if rank != expected:
            self.faults.append(f"{adapter.path}: tensor '{update.A}' has rank {rank}, the config gives '{module}' {expected}.")
        return rank == expected

    def _misfit(self, adapter: Adapter, name: str, update: Update, info: TensorInfo) -> None:
        A, B = (list(adapter.info(key).shape) for key in (update.A, update.B))
        self.faults.append(
            f"{adapter.path}: '{update.name}' has factors of shapes {A} and {B}, which do not fit '{name}' of shape {list(info.shape)}. "
            "Give the base that the adapter was trained on."
        )

    def _rows(self, adapter: Adapter, module: str, called: str, key: str) -> None:
        name = f"{called}.weight"
        rows = adapter.config.tokens(module)
        info = adapter.info(key)
        if name not in self.names and name != self._tied_head():
            self.faults.append(f"{adapter.path}: tensor '{key}' replaces rows of '{name}', which the base does not have.")
            return
        change = self._change(name)
        known = change.info
        if rows is None:
            self.faults.append(
                f"{adapter.path}: tensor '{key}' replaces rows, but trainable_token_indices does not say which of '{module}'."
            )
        elif info.shape != (len(rows), *known.shape[1:]) or len(set(rows)) < len(rows) or max(rows) >= known.shape[0]:
            self.faults.append(
                f"{adapter.path}: tensor '{key}' of shape {list(info.shape)} should replace {len(rows)} different rows of '{name}' "
                f"({list(known.shape)}), up to row {max(rows)}."
            )
        elif known.dtype not in FLOATING or info.dtype not in FLOATING:
            self.faults.append(f"{adapter.path}: tensor '{key}' is {info.dtype} and replaces rows of '{name}', which is {known.dtype}.")
        elif taken := sorted({row for other in change.rows for row in other.rows} & set(rows)):
            self.faults.append(f"{adapter.path}: replaces row {taken[0]} of '{name}', and so does another adapter. Use one of them.")
        else:
            self.changes[name] = replace(change, rows=(*change.rows, Rows(adapter, key, tuple(rows))))

    # -- parameters that are no weights ---------------------------------------------------------------------------------

    def _parameters(self, adapter: Adapter, module: str, called: str, names: Sequence[str]) -> list[str]:
        """The tensors of a module that the config's target_parameters name, as the adapter calls them."""
        found = []
        for name in sorted(name for name in names if name.rpartition(".")[0] == called):
            theirs = f"{module}.{name.rpartition('.')[2]}"
            if any(theirs == target or theirs.endswith(f".{target}") for target in adapter.config.target_parameters):
                found.append(name)
        return found

    def _parameters_laid(
        self, adapter: Adapter, parameters: Sequence[str], fused: Mapping[str, Fused], updates: Sequence[Update], scale: float
    ) -> None:
        infos = {name: fused[name].info if name in fused else self._change(name).info for name in parameters}
        try:
            pairs, warning = lay_on_parameters(adapter, updates[0].module, updates, infos, fused.keys() & infos.keys())
        except CheckpointError as error:
            self.faults.append(str(error))
            return
        if warning is not None and warning not in self.warnings:
            self.warnings.append(warning)
        for update, (name, layout) in zip(updates, pairs, strict=True):
            parameter = name.rpartition(".")[2]
            experts = infos[name].shape[0] if layout.startswith("experts") else 1
            if update.bias is not None or update.magnitude is not None or update.embedding:
                self.faults.append(
                    f"{adapter.path}: '{update.name}' adapts the parameter '{name}'; only lora_A and lora_B are allowed there."
                )
            elif self._rank_fits(adapter, update, adapter.info(update.A).shape[0] // experts, parameter):
                c = adapter.scale(update.name, parameter) * scale
                if name not in fused:
                    self._add(name, adapter, LowRank(adapter, update, c, layout))
                for tensor, part in fused[name].pieces.items() if name in fused else ():
                    self._add(tensor, adapter, LowRank(adapter, update, c, "plain", part))

    # -- the whole model ------------------------------------------------------------------------------------------------

    def tie(self) -> bool:
        """Tied embedding and head change together; whether they had to be untied, because both were trained, differently."""
        head = self.head or self._tied_head()
        if self.embedding is None or head is None or not naming.is_tied(self.base.config, self.head is not None):
            return False
        ours, theirs = self.changes.get(self.embedding), self.changes.get(head)
        if ours is None and theirs is None:
            return False
        if ours is None or theirs is None:
            changed, other = (self.embedding, head) if ours is not None else (head, self.embedding)
            self.warnings.append(
                f"'{changed}' is adapted and tied to '{other}', which changes with it; "
                f"PEFT leaves '{other}' as it was while it runs the adapter."
            )
        elif not equal_changes(ours, theirs):
            self.warnings.append(f"'{self.embedding}' and '{head}' are tied and adapted differently: the output has both, untied.")
            return True
        change = ours or theirs
        assert change is not None
        self.changes[self.embedding] = replace(change, origin=self.embedding)
        if self.head is not None:
            self.changes[head] = replace(change, origin=head)
        else:
            self.changes.pop(head, None)
        return False

    def resized(self) -> tuple[int, int] | None:
        """(old, new) number of embedding rows if it changes; head and embedding must go on having equally many."""
        if self.embedding is None or self.embedding not in self.changes:
            return None
        old, new = self.base.info(self.embedding).shape[0], self.changes[self.embedding].info.shape[0]
        if self.head is not None:
            before = self.base.info(self.head).shape[0]
            after = self.changes[self.head].info.shape[0] if self.head in self.changes else before
            if before == old and after != new:
                self.faults.append(
                    f"the adapter gives '{self.embedding}' {new} rows and '{self.head}' {after}. Save the adapter with both of them."
                )
        return (old, new) if old != new else None
