"""Tables of what benchmarks/search.py has run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scipy.stats import t as student

Rows = Sequence[Mapping[str, Any]]


def markdown(found: Mapping[str, Any]) -> str:
    """All tables that the runs allow."""
    rows: Rows = found["runs"]
    sizes = [budget for budget in found["options"]["budgets"] if any(row["budget"] == budget for row in rows)]
    parts = []
    if sizes:
        parts.append(_budgets(found, rows, sizes))
    if any(row["budget"] is None for row in rows):
        parts.append(_racing(rows))
    if any(row["budget"] == "200 trials" for row in rows):
        parts.append(_start(rows))
    return "\n\n".join(filter(None, parts)) + "\n"


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % interval of paired differences, in points, by Student's t; of one difference itself alone."""
    low, high = bounds(values)
    if len(values) < 2:
        return f"{100 * values[0]:+.1f}"
    return f"{100 * statistics.fmean(values):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def bounds(values: Sequence[float]) -> tuple[float, float]:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, mean
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def _budgets(found: Mapping[str, Any], rows: Rows, sizes: Sequence[int]) -> str:
    largest = max(sizes)
    uniform, best = found["uniform"], max(found["members"].values())
    head = ["searcher", "racing", *(f"test at {size:,}" for size in sizes), "area", "items", "candidates", "given up"]
    head += ["area against random", "area against uniform"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    same = " | ".join(f"{100 * uniform:.1f}" for _ in sizes)
    lines.append(f"uniform average | | {same} | {100 * uniform:.1f} | 0 | 0 | 0 | |")
    same = " | ".join(f"{100 * best:.1f}" for _ in sizes)
    lines.append(f"best member (by test) | | {same} | {100 * best:.1f} | 0 | 0 | 0 | |")
    kinds = dict.fromkeys((row["searcher"], row["racing"]) for row in rows if row["budget"] in sizes)
    for name, racing in kinds:
        own = [row for row in rows if (row["searcher"], row["racing"]) == (name, racing)]
        at = {size: [row["test"] for row in own if row["budget"] == size] for size in sizes}
        last = [row for row in own if row["budget"] == largest]
        random = {
            row["seed"]: row["area"] for row in rows if row["searcher"] == "random" and row["racing"] == racing and row["budget"] == largest
        }
        pairs = [row["area"] - random[row["seed"]] for row in last if row["seed"] in random]
        against = "" if name == "random" or not pairs else interval(pairs)
        cells = [name, "yes" if racing else "no", *(f"{100 * statistics.fmean(values):.1f}" for values in at.values())]
        cells += [f"{100 * statistics.fmean(row['area'] for row in last):.1f}"]
        cells += [f"{statistics.fmean(row[what] for row in last):.0f}" for what in ("items", "candidates", "pruned")]
        lines.append(" | ".join([*cells, against, interval([row["area"] - uniform for row in last])]))
    return "\n".join(f"| {line} |" for line in lines) + f"\n\nSeeds: {found['seeds']}. Losing cases: " + "; ".join(_losers(lines)) + "."


def _losers(lines: Sequence[str]) -> Iterator[str]:
    """Who is surely below random search or the uniform average: the upper end of the interval is below 0."""
    found = False
    for line in lines[2:]:
        cells = [cell.strip() for cell in line.split("|")]
        for place, what in ((-2, "random search"), (-1, "the uniform average")):
            if cells[place] and cells[place].rstrip(")").partition(" to ")[2].startswith("-"):
                found = True
                yield f"{cells[0]} ({'racing' if cells[1] == 'yes' else 'everything'}) against {what} {cells[place]}"
    if not found:
        yield "none for sure"


def _racing(rows: Rows) -> str:
    head = ["searcher", "items without", "items with racing", "share", "test, racing against everything"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    own = [row for row in rows if row["budget"] is None]
    by_seed: dict[int, list[float]] = {}
    totals = {False: 0.0, True: 0.0}
    strategies: dict[bool, float] = {False: 0.0, True: 0.0}
    for name in dict.fromkeys(row["searcher"] for row in own):
        runs = {racing: {row["seed"]: row for row in own if (row["searcher"], row["racing"]) == (name, racing)} for racing in (False, True)}
        seeds = sorted(runs[False].keys() & runs[True].keys())
        if not seeds:
            continue
        items = {racing: statistics.fmean(runs[racing][seed]["items"] for seed in seeds) for racing in runs}
        gaps = {seed: runs[True][seed]["test"] - runs[False][seed]["test"] for seed in seeds}
        for seed, gap in gaps.items():
            by_seed.setdefault(seed, []).append(gap)
        for racing, count in items.items():
            totals[racing] += count
            if name in ("average", "coefficient", "similarity_highest", "similarity_lowest", "all"):
                strategies[racing] += count
        lines.append(
            f"{name} | {items[False]:.0f} | {items[True]:.0f} | {100 * items[True] / items[False]:.0f} % | {interval(list(gaps.values()))}"
        )
    means = [statistics.fmean(gaps) for gaps in by_seed.values()]
    if not means:
        return ""
    if strategies[False]:
        share = f"{100 * strategies[True] / strategies[False]:.0f} %"
        lines.append(f"*the heuristics of Model-GLUE* | {strategies[False]:.0f} | {strategies[True]:.0f} | {share} | ")
    share = f"{100 * totals[True] / totals[False]:.0f} %"
    lines.append(f"*all* (interval over seeds) | {totals[False]:.0f} | {totals[True]:.0f} | {share} | {interval(means)}")
    return "\n".join(f"| {line} |" for line in lines)


def _start(rows: Rows) -> str:
    head = ["seed", "best of vanilla", "reached after", "heuristic start as good after", "its best", "reached after"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    own = [row for row in rows if row["budget"] == "200 trials"]
    for seed in sorted({row["seed"] for row in own}):
        runs = {row["searcher"]: row["trials"] for row in own if row["seed"] == seed}
        if len(runs) < 2:
            continue
        vanilla, heuristic = runs["cma"], runs["cma, heuristic start"]
        after, best = vanilla[-1]
        equal = next((str(trial) for trial, value in heuristic if value >= best), "never")
        lines.append(f"{seed} | {100 * best:.1f} | {after} | {equal} | {100 * heuristic[-1][1]:.1f} | {heuristic[-1][0]}")
    return "\n".join(f"| {line} |" for line in lines)
