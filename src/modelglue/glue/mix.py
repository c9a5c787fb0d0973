"""Steps 7 to 9: join the experts, confirm that it was worth it, and measure on items that no decision has seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelglue.errors import UserError
from modelglue.glue.bench import Bench, prompts_of, without_prompts
from modelglue.glue.decide import Representative, references_from
from modelglue.glue.experts import Verdict
from modelglue.glue.levels import OneModel
from modelglue.glue.replay import MixturePlan, PlannedExpert, path_of
from modelglue.glue.router_scores import scored_items
from modelglue.glue.run_folder import RunFolder
from modelglue.mixture import Mixture, load_report, oracle_gap
from modelglue.mixture.recorded import RecordedRouter
from modelglue.mixture.routing import Fit, learn_router
from modelglue.recipe import Candidate, Scores, interval, paired_interval


def plan_mixture(bench: Bench, run: RunFolder, kept: Sequence[tuple[Representative, Verdict]]) -> MixturePlan:
    """Which experts with which prompts, behind which router; all that `mixture/` is made of."""
    references = references_from(bench, run.root)
    experts = []
    for representative, verdict in kept:
        members = representative.candidate.members
        prompts = prompts_of(bench, members, verdict.won)
        if not prompts["positive"] and bench.file.router.source == "prompts":
            raise without_prompts(members)
        path = f"representatives/{representative.name}" if bench.is_written(representative.candidate) else references[members[0]]
        domains = dict.fromkeys(tag for alias in members for tag in bench.models[alias].domain)
        experts.append(
            PlannedExpert(
                name=representative.name,
                model=path,
                domain=tuple(domains),
                positive=tuple(prompts["positive"]),
                negative=tuple(prompts["negative"]),
            )
        )
    options = bench.file.router
    largest = max(range(len(kept)), key=lambda i: (len(kept[i][0].members), -i))
    encoder: str | None = None
    if options.encoder != "auto":
        encoder = experts[largest].model if options.encoder is None else references[options.encoder]
    return MixturePlan(
        experts=tuple(experts), encoder=encoder, gate_mode=options.gate_mode, router_layer=options.router_layer,
        temperature=options.temperature, route_span=options.route_span, seed=bench.file.seed, pack=bench.file.mixture.pack,
    )  # fmt: skip


def learn(bench: Bench, run: RunFolder, kept: Sequence[tuple[Representative, Verdict]], plan: MixturePlan) -> MixturePlan:
    """The plan with a router that was learned from the experts' proxy scores, where that is wanted and better; see `learn_router`.

    Scores nothing: the search has scored every representative on the proxy items. `router.json` keeps what was found. Raises UserError if
    neither scores nor prompts make a router.
    """
    options = bench.file.router
    if options.source == "prompts":
        return plan
    step = run.step("router.json", lambda: _learned(bench, run, kept, plan))
    if step["router"] is not None:
        return plan.model_copy(update={"learned": RecordedRouter.model_validate(step["router"])})
    if options.source == "scores":
        raise UserError(f"router.source is 'scores': {step['message']} Give more proxy items, or source: auto.")
    for expert, (representative, _) in zip(plan.experts, kept, strict=True):
        if not expert.positive:
            raise without_prompts(representative.candidate.members)
    return plan


def how_learned(run: RunFolder) -> dict[str, Any] | None:
    """What came of learning, without the router itself; None where it was not asked for."""
    found = run.read_json("router.json")
    return None if found is None else {key: value for key, value in found.items() if key != "router"}


def _learned(bench: Bench, run: RunFolder, kept: Sequence[tuple[Representative, Verdict]], plan: MixturePlan) -> dict[str, Any]:
    """router.json: what was found, and the router if it is to be used."""
    options, mixture = bench.file.router, bench.file.mixture
    items = scored_items(bench.tasks["proxy"], {r.name: bench.score(r.candidate, "proxy") for r, _ in kept})
    specs = plan.specs(run.root)
    encoder = None if plan.encoder is None else path_of(run.root, plan.encoder)
    fit = Fit(kind=mixture.router, objective=options.objective, hidden=options.hidden, seed=bench.file.seed)
    found = learn_router(specs, items, plan.router, fit, encoder=encoder, always=options.source == "scores")
    router = None
    if found.router is not None and found.used:
        places = {spec.path: expert.model for spec, expert in zip(specs, plan.experts, strict=True)}
        router = RecordedRouter.of(found.router, places.get(found.router.encoder) or str(plan.encoder))
    return {**found.to_json(), "router": router.model_dump(mode="json") if router is not None else None}


def diagnose(bench: Bench, mixture: Mixture, scores: Scores, experts: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The router's self-test, its load on the proxy items, and what a perfect router would add."""
    proxy = bench.tasks["proxy"]
    contexts = {skill: proxy.contexts(skill) for skill in proxy.skills}
    described = self_test_of(mixture)
    load = load_report(mixture, contexts)
    return {
        **described,
        "load": load.load,
        "warnings": [*described["warnings"], *load.warnings],
        "oracle_gap": oracle_gap(experts, scores.tasks()),
    }


def self_test_of(mixture: Mixture) -> dict[str, Any]:
    """What the router makes of the experts' own prompts; nothing where there are none, which only a learned router can do without."""
    try:
        return mixture.self_test().to_json()
    except UserError:
        manifest = mixture.manifest
        return {
            "gate_mode": manifest.gate_mode, "router_layer": manifest.router_layer, "encoder": manifest.encoder, "self_test": None,
            "condition_number": {"gate": None}, "margin": None, "warnings": [],
        }  # fmt: skip


def confirm(
    bench: Bench, representatives: Sequence[Representative], mixture: Mixture | OneModel | None
) -> tuple[dict[str, Any], Scores | None]:
    """The outcome: the mixture, or the best representative where there is none; unless a candidate is better by more than chance.

    Candidates are the representatives and all single models: what won on the proxy may have won by luck. Judged on confirmation items
    where there are some, else on the proxy, by the paired interval.
    """
    split = "confirmation" if "confirmation" in bench.tasks else "proxy"
    singles = {alias: bench.score(Candidate.single(alias), split) for alias in bench.members}
    best_single = max(bench.members, key=lambda alias: singles[alias].mean)
    scored = {r.name: bench.score(r.candidate, split) for r in representatives}
    kinds = {r.name: "merge" if r.is_merge else "single" for r in representatives}
    name = max(scored, key=lambda name: scored[name].mean)
    proxy: Scores | None = None
    if mixture is not None:
        proxy = bench.score_text_model(mixture, mixture.identity, "proxy")
        final = bench.score_text_model(mixture, mixture.identity, split)
        outcome = {"kind": "mixture", "name": "mixture", "reason": "every expert answers what it is best at"}
    else:
        final = scored[name]
        reason = "one representative is best at everything" if len(representatives) > 1 else "the zoo is one family"
        outcome = {"kind": kinds[name], "name": name, "reason": reason}
    candidates = scored | singles
    best = max(candidates, key=lambda name: candidates[name].mean)
    difference, low, high = paired_interval(final, candidates[best])
    if high < 0:
        what = f"the {outcome['kind']} {outcome['name']}" if mixture is None else "the mixture"
        why = "it won on the proxy by luck" if mixture is None else "look at the router"
        reason = f"{what} is worse than {best} by {-difference:.3f} ({-high:.3f} to {-low:.3f}); {why}"
        outcome = {"kind": kinds.get(best, "single"), "name": best, "reason": reason}
        final = candidates[best]
    return {
        **outcome,
        "split": split,
        "score": final.mean,
        "best_single": best_single,
        "interval_vs_best_single": list(paired_interval(final, singles[best_single])),
    }, proxy


def final_results(
    bench: Bench,
    representatives: Sequence[Representative],
    verdicts: Sequence[Verdict],
    mixture: Mixture | OneModel | None,
    outcome: Mapping[str, Any],
) -> dict[str, Any]:
    """results.json: every single model, uniform averages, representatives and the result, on test items."""
    split = next(name for name in ("test", "confirmation", "proxy") if name in bench.tasks)
    rows: list[tuple[str, str, int | None, Scores]] = []
    family_of = {alias: r.id for r in representatives for alias in r.members}
    if bench.base is not None:
        rows.append((bench.base, "base", None, bench.score(Candidate.single(bench.base), split)))
    for alias in bench.members:
        rows.append((alias, "single", family_of[alias], bench.score(Candidate.single(alias), split)))
    for r in representatives:
        if len(r.members) > 1:
            uniform = Candidate.linear(dict.fromkeys(r.members, 1.0))
            rows.append((f"average of family {r.id}", "average", r.id, bench.score(uniform, split)))
        if r.is_merge:
            rows.append((r.name, "representative", r.id, bench.score(r.candidate, split)))
    if mixture is not None:
        rows.append(("mixture", "mixture", None, bench.score_text_model(mixture, mixture.identity, split)))
    by_name = {name: scores for name, _, _, scores in rows}
    singles = [name for name, kind, _, _ in rows if kind == "single"]
    final = by_name[str(outcome["name"])]
    best = max(singles, key=lambda name: by_name[name].mean)
    comparisons = [_comparison("result", final, best, by_name[best], bench.skills(split))]
    for r, verdict in zip(representatives, verdicts, strict=True):
        if r.is_merge and verdict.won:
            own = by_name[r.name].only(verdict.won)
            member = max(r.members, key=lambda alias: by_name[alias].only(verdict.won).mean)
            average = f"average of family {r.id}"
            comparisons.append(_comparison(r.name, own, member, by_name[member].only(verdict.won), verdict.won))
            comparisons.append(_comparison(r.name, own, average, by_name[average].only(verdict.won), verdict.won))
    routing = None
    if mixture is not None and not isinstance(mixture, OneModel):
        tasks = bench.tasks[split]
        routing = load_report(mixture, {skill: tasks.contexts(skill) for skill in tasks.skills}).load
    return {
        "split": split,
        "skills": bench.skills(split),
        "models": [_row(name, kind, family, scores, final) for name, kind, family, scores in rows],
        "comparisons": comparisons,
        "routing": routing,
    }


def _row(name: str, kind: str, family: int | None, scores: Scores, final: Scores) -> dict[str, Any]:
    """One model: its scores with their intervals, and the result minus this model (difference, low, high), paired over items."""
    tasks = {
        task: {
            "score": value,
            "items": len(scores.items[task]),
            "interval": list(interval(scores.only([task]))),
            "result_minus": list(paired_interval(final.only([task]), scores.only([task]))),
        }
        for task, value in scores.tasks().items()
    }
    return {
        "name": name,
        "kind": kind,
        "family": family,
        "tasks": tasks,
        "mean": scores.mean,
        "interval": list(interval(scores)),
        "result_minus": list(paired_interval(final, scores)),
    }


def _comparison(a: str, ours: Scores, b: str, theirs: Scores, skills: Sequence[str]) -> dict[str, Any]:
    difference, low, high = paired_interval(ours, theirs)
    return {"a": a, "b": b, "skills": list(skills), "difference": difference, "interval": [low, high]}
