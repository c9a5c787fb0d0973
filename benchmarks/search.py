"""What a search finds for the items it may score: strategies and searchers on the tiny zoo, with racing and without.

    python benchmarks/search.py --seeds 5 --budgets 500,2000,8000

One row per searcher and racing: mean test score at each budget, items scored, candidates given up, and the area under the test score of
the best so far over items, divided by the largest budget. `uniform` scores nothing. Test scores choose nothing. Scores are
kept in --store, so that a second call only adds what is missing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path

from modelglue.evaluation import CandidateEvaluator
from modelglue.evaluation.places import Place
from modelglue.recipe import Candidate
from modelglue.search import SearchReport, run_study
from modelglue.search.settings import BudgetSettings, FitnessSettings, SearcherSettings
from modelglue.studies.bench import Bench, open_bench
from modelglue.studies.facts import facts_of
from modelglue.studies.schema import SearchFile

ZOO = Path(__file__).parents[1] / "examples" / "tiny-zoo"
#: they need no number of trials: the budget ends them
SEARCHERS: Mapping[str, dict[str, object]] = {
    "random": {"trials": 10_000}, "average": {}, "coefficient": {}, "similarity_highest": {}, "similarity_lowest": {},
    "cma": {"trials": 10_000}, "cma heuristic": {"init": "heuristic"}, "evolution": {},
    "recycling": {"trials": 10_000}, "kinship_greedy": {},
}  # fmt: skip


def bench_of(skills: list[str], members: list[str], items: int | None) -> Bench:
    tasks: dict[str, object] = {
        "include": "tasks",
        "proxy": [f"{skill}_proxy" for skill in skills],
        "test": [f"{skill}_test" for skill in skills],
    }
    return open_bench(SearchFile.model_validate({"zoo": "zoo.yaml", "members": members, "tasks": {**tasks, "proxy_items": items}}), ZOO)


def area(report: SearchReport, test: CandidateEvaluator, start: float, budget: int) -> float:
    """Mean over items of the test score of the candidate that was best by then; `start` before there is one."""
    total, before, current, best = 0.0, 0, start, float("-inf")
    for outcome, row in zip(report.outcomes, report.history(), strict=True):
        items = min(row["items"], budget)
        total += current * (items - before)
        before = items
        candidate = outcome.proposal.candidate
        if candidate is not None and outcome.whole and outcome.value > best:
            best, current = outcome.value, test.evaluate(candidate).mean
    return (total + current * (budget - before)) / budget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budgets", default="500,2000,8000")
    parser.add_argument("--skills", default="reverse,sort,next,larger")
    parser.add_argument("--members", default="reverse,sort,next,larger,generalist")
    parser.add_argument("--searchers", default=",".join(SEARCHERS))
    parser.add_argument("--items", type=int, default=None, help="items per proxy task; default all")
    parser.add_argument("--store", type=Path, default=None)
    options = parser.parse_args()
    budgets = [int(budget) for budget in options.budgets.split(",")]
    bench = bench_of(options.skills.split(","), options.members.split(","), options.items)
    store = options.store or Path(tempfile.mkdtemp()) / "scores.sqlite"
    print(f"| searcher | racing | {' | '.join(f'test at {budget}' for budget in budgets)} | items | given up | area |")
    print(f"|---|---|{'---|' * (len(budgets) + 3)}")
    with bench.scoring(store, Place(workers=1)) as evaluators:
        proxy, test = evaluators["proxy"], evaluators["test"]
        uniform = test.evaluate(Candidate.linear(dict.fromkeys(bench.settings.members, 1.0))).mean
        singles = {alias: test.evaluate(Candidate.single(alias)).mean for alias in bench.settings.members}
        cells = " | ".join(f"{100 * uniform:.1f}" for _ in budgets)
        print(f"| uniform average | | {cells} | 0 | 0 | {100 * uniform:.1f} |")
        cells = " | ".join(f"{100 * max(singles.values()):.1f}" for _ in budgets)
        print(f"| best member (by test) | | {cells} | | | |", flush=True)
        for name in options.searchers.split(","):
            for kind in ("everything", "racing"):
                at: dict[int, list[float]] = {budget: [] for budget in budgets}
                items, pruned, areas = [], [], []
                for seed in range(options.seeds):
                    for budget in budgets:
                        searcher = SearcherSettings.model_validate({"name": name.partition(" ")[0], **SEARCHERS[name]})
                        changes = {"searcher": searcher, "seed": seed, "fitness": FitnessSettings.model_validate({"kind": kind}),
                                   "budget": BudgetSettings(items=budget)}  # fmt: skip
                        settings = bench.settings.model_copy(update=changes)
                        report = run_study(settings, proxy, None, facts=facts_of(settings, bench.checkpoints))
                        best = report.best.proposal.candidate if report.best is not None else None
                        at[budget].append(uniform if best is None else test.evaluate(best).mean)
                        if budget == max(budgets):
                            items.append(report.spent["items"])
                            pruned.append(report.counts["pruned"])
                            areas.append(area(report, test, uniform, budget))
                cells = " | ".join(f"{100 * statistics.mean(values):.1f}" for values in at.values())
                print(
                    f"| {name} | {'yes' if kind == 'racing' else 'no'} | {cells} | {statistics.mean(items):.0f} | "
                    f"{statistics.mean(pruned):.1f} | {100 * statistics.mean(areas):.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
