"""Which merge methods suit a zoo, by what published comparisons agree on and what was measured; every line says why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from modelglue.zoo.measure import Measured

Verdict = Literal["first", "try", "reference", "avoid"]

#: changes this long, relative to the base, are those of continued pretraining rather than of a fine-tune
LARGE_CHANGE = 0.2
#: changes this alike pull in one direction; below the other bound they have little to do with each other
KIN, STRANGERS = 0.5, 0.15
#: so many models crowd each other out
MANY = 8
#: domains whose loss is not seen in scores of skills
SAFETY = frozenset({"safety", "alignment", "harmlessness", "refusal", "toxicity"})
#: parameters from which the choice of the method matters little
BIG = 20_000_000_000


@dataclass(frozen=True)
class Recommendation:
    """A method (or a command) and what speaks for or against it here."""

    verdict: Verdict
    method: str
    why: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def recommendations(zoo: Measured) -> list[Recommendation]:
    """What to do with this zoo, the most promising first. At least the references stand there always."""
    found: list[Recommendation] = []
    largest = max(zoo.change.values(), default=0.0)
    large = largest > LARGE_CHANGE
    count = len(zoo.models)

    def say(verdict: Verdict, method: str, why: str) -> None:
        found.append(Recommendation(verdict, method, why))

    if count < 2:
        say("avoid", "any merge", "there is one model, and nothing to merge it with.")
        return found
    if zoo.proxy:
        say("first", "search, linear with searched members and coefficients",
            "there are tasks to score on: greedy selection of members before any clever method is what pays for fine-tunes of unknown "
            "or overlapping skills; expect about a point over the best member.")  # fmt: skip
    elif zoo.parameters >= BIG or not zoo.has_base:
        without = "" if zoo.has_base else ", and without a base there are no task vectors"
        say("first", "linear", f"there are no tasks to search on{without}: the plain average is the safest choice.")
    if zoo.parameters >= BIG:
        say("try", "linear", "at this size methods differ little; spend the effort on choosing members.")
    if zoo.has_base and not large:
        _on_task_vectors(zoo, say)
    if large:
        name = max(zoo.change, key=lambda alias: zoo.change[alias])
        say("avoid", "dare_linear, dare_ties", f"{name} changed its base by {100 * largest:.0f} %, as continued pretraining does; dropping "
            "entries of changes that large destroys them.")  # fmt: skip
        say("try", "slerp, linear", "large changes are better interpolated than added to the base.")
    if count > MANY:
        say("avoid", "sums of all task vectors", f"{count} models crowd each other out: what each can do falls with their number. Choose "
            "members by search, prefer children of a stronger (instruction-tuned) base, or join them with `modelglue glue`.")  # fmt: skip
    if safety := sorted(set(zoo.domains) & SAFETY):
        say("try", "linear or task_arithmetic, the safety model as a member", f"there is a model for {', '.join(safety)}: merging models "
            "of one objective each loses less of it than training on mixed data; measure refusals after the merge, too.")  # fmt: skip
    if zoo.adapters:
        _on_adapters(zoo, say)
    if zoo.distinct_domains:
        say("try", "glue (a mixture)", "every model has a domain of its own: if requests can be told apart and all weights may be kept, "
            "routing loses less than any static merge.")  # fmt: skip
    if zoo.cosine is not None and zoo.cosine < 0.9:
        say("avoid", "any merge of all models", f"their weights have a mean cosine of {zoo.cosine:.2f}: models of different origin. See "
            "`modelglue similarity` for families that may be merged.")  # fmt: skip
    origin = ", the base" if zoo.has_base else ""
    say("reference", f"linear (plain average), every member{origin}", "the least that a merge has to beat; report its gain over the best "
        "member, on items that chose nothing.")  # fmt: skip
    order: tuple[Verdict, ...] = ("first", "try", "reference", "avoid")
    return sorted(found, key=lambda one: order.index(one.verdict))


def _on_adapters(zoo: Measured, say: Any) -> None:
    """Low-rank changes."""
    count = len(zoo.adapters)
    if not zoo.all_adapters:
        say("try", "any method over base+adapter", f"{count} of {len(zoo.models)} models are adapters: they are folded into their base "
            "when they are read, so every method takes them beside whole models, and the result is a whole model.")  # fmt: skip
        say("try", "extract-lora, then merge-adapters", "the other models can be made adapters, where a small result counts more than an "
            "exact one.")  # fmt: skip
        return
    say("try", "merge-adapters --mode cat, or svd", f"all {count} models are adapters: joined along their rank (cat) the result is exactly "
        f"the weighted sum and has rank {sum(zoo.ranks.values())}; svd makes the nearest one of a smaller rank.")  # fmt: skip
    ranks = sorted(set(zoo.ranks.values()))
    why = "they combine the factors A and B for themselves, and the product of the sums is not the sum of the products."
    if len(ranks) > 1:
        why = f"ranks differ ({', '.join(map(str, ranks))}): modes that combine the factors themselves need adapters of one rank."
    say("avoid", "merge-adapters --mode linear, ties, dare_*", why)


def _on_task_vectors(zoo: Measured, say: Any) -> None:
    """Changes that are small enough to be added."""
    kinship, agreement = zoo.kinship, zoo.agreement
    if kinship is None or agreement is None:
        say("avoid", "methods on task vectors", "at most one model differs from the base, so there are no changes to combine.")
        return
    first: Verdict = "try" if zoo.proxy or zoo.parameters >= BIG else "first"
    seen = f"changes have a mean cosine of {kinship:.2f} and {100 * agreement:.0f} % of their signs agree"
    if kinship >= KIN:
        say(first, "model_stock, linear", f"{seen}: the models are close kin, averages keep what they share and lose little.")
        say("avoid", "sums of task vectors with weight 1", f"{seen}: what they share would be added several times over. Use "
            "task_arithmetic with weights of about 1 / n.")  # fmt: skip
    elif kinship <= STRANGERS:
        say(first, "task_arithmetic, then ties", f"{seen}: experts that learned different things; their changes can be added, and the "
            "sum's scale is worth searching (about 0.3 to 1.5).")  # fmt: skip
    else:
        say(first, "ties", f"{seen}: they partly pull in different directions, and electing signs keeps them from cancelling.")
        say("try", "task_arithmetic with a searched scale", f"{seen}: simple, and often as good.")
    if kinship < KIN:
        say("try", "dare_ties, della", "changes are small and partly redundant, so most entries can be dropped; compare several seeds.")
