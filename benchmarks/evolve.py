"""A search by mergekit's evolutionary command and ours over the same vectors: the same recipes, the same models, the same best one?

    python benchmarks/evolve.py --scratch /big/disk --trials 16

For every genome a plan of mergekit-evolve is written over the tiny zoo and imported as `modelglue search` does it. A CMA-ES without
bounds, from the genome's own start with a step of 1/6 as mergekit-evolve has it, asks for --trials vectors and is told the scores of our
candidates. The same vectors are then decoded by mergekit's own genome and merged by its own merge, in its bfloat16 and once more in
float32, and its models are scored on the same items by the same evaluator. mergekit is installed from the package index into
<scratch>/mergekit-environment when it is not there. The result is Markdown on stdout.

    python benchmarks/evolve.py --scratch /big/disk --record tests/search/files/mergekit_evolve.safetensors

does the same with small random models and nothing to score, and writes vectors, mergekit's recipes and its merged weights to a file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT / "examples" / "tiny-zoo"
MEMBERS = ("reverse", "sort", "generalist")
SKILLS = ("reverse", "sort", "next", "larger")

#: what is searched: name -> the genome's keys besides its models; `base` asks for a base model
GENOMES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear"},
    "linear, 4 groups": {"merge_method": "linear", "layer_granularity": 2},
    "task_arithmetic, signed": {"merge_method": "task_arithmetic", "allow_negative_weights": True, "base": True},
    "task_arithmetic, smooth": {"merge_method": "task_arithmetic", "layer_granularity": 2, "smooth": True, "base": True},
    "ties": {"merge_method": "ties", "base": True},
    "ties, 2 groups, filters": {"merge_method": "ties", "layer_granularity": 4, "filters": ["self_attn", "mlp"], "base": True},
    "dare_ties": {"merge_method": "dare_ties", "base": True},
    "slerp, 4 groups": {"merge_method": "slerp", "layer_granularity": 2},
}
#: weights that differ by more differ for a reason other than rounding
FAR = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs" / "benchmark", help="folder for mergekit and the models it merges")
    parser.add_argument("--trials", type=int, default=16, help="vectors of each genome")
    parser.add_argument("--items", type=int, default=40, help="items of each of the four skills that are scored")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="record a small random zoo in this file instead of measuring")
    parser.add_argument("--elsewhere", type=Path, help=argparse.SUPPRESS)  # in mergekit's environment: merge what this file asks for
    options = parser.parse_args()
    if options.elsewhere:
        merge_elsewhere(json.loads(options.elsewhere.read_text(encoding="utf-8")))
        return
    options.scratch.mkdir(parents=True, exist_ok=True)
    record(options) if options.record else measure(options)


# -- the search ---------------------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> None:
    from modelglue.checkpoint import open_checkpoint
    from modelglue.evaluation import CandidateEvaluator, ScoreStore, TaskSet

    models = {name: str(ZOO / "models" / name) for name in ("base", *MEMBERS)}
    opened = {name: open_checkpoint(path) for name, path in models.items()}
    tasks = cut(TaskSet.load([f"{skill}_proxy" for skill in SKILLS], ZOO / "tasks"), options.items)
    with ScoreStore(":memory:") as store:
        ours = CandidateEvaluator(opened, tasks, store)
        found: dict[str, tuple[Any, list[list[float]], list[float]]] = {}
        for name in GENOMES:
            space = imported(options.scratch, name, models)
            found[name] = (space, *search(space, ours, options))
        job = [
            {"name": str(number), "definition": definition(name, models), "vectors": found[name][1]} for number, name in enumerate(GENOMES)
        ]
        theirs = {dtype: elsewhere(options.scratch, dtype, job) for dtype in ("bfloat16", "float32")}
        rows = []
        for number, (name, (space, vectors, scores)) in enumerate(found.items()):
            folders = {dtype: [place / f"{number}-{k}" for k in range(len(vectors))] for dtype, place in theirs.items()}
            rows.append(compared(name, space, vectors, scores, folders, opened, models, tasks, store))
    report(options, rows)


def cut(tasks: Any, count: int) -> Any:
    """The first so many items of every skill in the fixed shuffled order."""
    from modelglue.evaluation import TaskSet

    chosen = {skill: set(tasks.order[skill][:count]) for skill in tasks.skills}
    return TaskSet({skill: tuple(item for item in items if item.id in chosen[skill]) for skill, items in tasks.skills.items()})


def definition(name: str, models: Mapping[str, str]) -> dict[str, Any]:
    """A genome as mergekit-evolve's plan has it."""
    keys = dict(GENOMES[name])
    base = {"base_model": models["base"]} if keys.pop("base", False) else {}
    return {"models": [path for alias, path in models.items() if alias != "base"], **base, **keys}


def imported(scratch: Path, name: str, models: Mapping[str, str]) -> Any:
    """The search space of a plan of mergekit-evolve."""
    import yaml

    from modelglue.checkpoint import open_checkpoint
    from modelglue.recipe.dataflow import depth
    from modelglue.search.genome_space import GenomeSpace
    from modelglue.studies import read_search

    plan = scratch / "plan.yaml"
    tasks = [{"name": f"{skill}_proxy", "weight": 1.0} for skill in SKILLS]
    plan.write_text(yaml.safe_dump({"genome": definition(name, models), "tasks": tasks}), encoding="utf-8")
    genome = read_search(plan).file.space.genome
    assert genome is not None
    return GenomeSpace(genome, depth(open_checkpoint(next(iter(models.values())))))


def candidate(space: Any, vector: Sequence[float]) -> Any:
    """The candidate of a vector, which may leave the bounds that our own search keeps to."""
    return space.candidate({parameter.name: gene for parameter, gene in zip(space.space.parameters, vector, strict=True)})


def search(space: Any, evaluator: Any, options: argparse.Namespace) -> tuple[list[list[float]], list[float]]:
    """(vectors, scores of our candidates) of CMA-ES without bounds, as mergekit-evolve searches."""
    import numpy as np
    from cmaes import CMA

    start = space.genome.start()
    width = max(2, len(start))
    optimiser = CMA(np.resize(start, width), 1 / 6, seed=options.seed, population_size=8)
    vectors: list[list[float]] = [start.tolist()]
    scores: list[float] = [evaluator.evaluate(candidate(space, vectors[0])).mean]
    while len(vectors) < options.trials:
        generation = []
        for _ in range(optimiser.population_size):
            x = optimiser.ask()
            vectors.append(x[: len(start)].tolist())
            scores.append(evaluator.evaluate(candidate(space, vectors[-1])).mean)
            generation.append((x, -scores[-1]))
        optimiser.tell(generation)
    return vectors[: options.trials], scores[: options.trials]


def compared(
    name: str, space: Any, vectors: Sequence[Sequence[float]], scores: Sequence[float], folders: Mapping[str, Sequence[Path]],
    opened: Mapping[str, Any], models: Mapping[str, str], tasks: Any, store: Any,
) -> dict[str, Any]:  # fmt: skip
    """Their recipes, weights and scores against ours, vector by vector."""
    import torch

    from modelglue.checkpoint import open_checkpoint
    from modelglue.evaluation import CandidateEvaluator
    from modelglue.evaluation.members import Members
    from modelglue.recipe import Candidate

    references = dict(zip(models.values(), opened, strict=True))
    merged = {dtype: [open_checkpoint(folder) for folder in places] for dtype, places in folders.items()}
    theirs = CandidateEvaluator({f"theirs-{k}": one for k, one in enumerate(merged["bfloat16"])}, tasks, store)
    elsewhere = [theirs.evaluate(Candidate.single(f"theirs-{k}")).mean for k in range(len(vectors))]
    recipes, largest, apart, rounded, total = 0, 0.0, 0, 0, 0
    for number, vector in enumerate(vectors):
        ours = candidate(space, vector)
        wide, stored = (Members(opened, dtype).expression(ours) for dtype in ("float32", "bfloat16"))
        read_back = their_recipe(folders["bfloat16"][number].with_suffix(".yaml"), references, opened)
        recipes += all(torch.equal(wide.tensor(one), read_back.tensor(one)) for one in wide.names())
        for one in wide.names():
            gap = (wide.tensor(one) - merged["float32"][number].tensor(one)).abs()
            largest = max(largest, float(gap.max()))
            apart += int((gap > FAR).sum())
            rounded += int((stored.tensor(one) != merged["bfloat16"][number].tensor(one)).sum())
            total += stored.info(one).numel
    gaps = [abs(a - b) for a, b in zip(scores, elsewhere, strict=True)]
    other = None
    if space.definition.merge_method == "dare_ties":  # how much chance alone moves a score
        evaluator = CandidateEvaluator(opened, tasks, store)
        again = [evaluator.evaluate(Candidate.of({**candidate(space, vector).recipe, "seed": 1})).mean for vector in vectors]
        other = max(abs(a - b) for a, b in zip(scores, again, strict=True))
    best = {k for k in range(len(vectors)) if elsewhere[k] == max(elsewhere)}
    first = scores.index(max(scores))
    return {
        "name": name, "vectors": len(vectors), "recipes": recipes, "largest": largest, "apart": apart / total, "rounded": rounded / total,
        "equal": gaps.count(0.0), "gap": max(gaps), "chance": other, "best": first, "theirs": min(best), "shared": first in best,
        "score": max(scores), "their_score": max(elsewhere),
    }  # fmt: skip


def their_recipe(path: Path, references: Mapping[str, str], opened: Mapping[str, Any]) -> Any:
    """mergekit's own recipe, read by us, in float32."""
    import yaml

    from modelglue.recipe import build, read_recipe

    value = {**yaml.safe_load(path.read_text(encoding="utf-8")), "dtype": "float32"}
    return build(read_recipe(value), resolve=lambda reference: opened[references[reference]])


def report(options: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    items = len(SKILLS) * options.items
    print(f"{options.trials} vectors of each genome, {items} items ({', '.join(SKILLS)}), seed {options.seed}.\n")
    print(
        "| genome | same recipe | float32: largest difference, weights that differ by 1e-4 | bf16: weights that differ | same score | "
        "largest difference of a score | best vector, ours / mergekit | its score, ours / mergekit |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        chance = "" if row["chance"] is None else f" (another seed of ours: {100 * row['chance']:.1f})"
        print(
            f"| {row['name']} | {row['recipes']} of {row['vectors']} | {row['largest']:.0e}, {100 * row['apart']:.2f} % | "
            f"{100 * row['rounded']:.1f} % | "
            f"{row['equal']} of {row['vectors']} | {100 * row['gap']:.1f}{chance} | {row['best']} / "
            f"{row['best'] if row['shared'] else row['theirs']} | {100 * row['score']:.1f} / {100 * row['their_score']:.1f} |"
        )
    same = sum(row["shared"] for row in rows)
    print(f"\nThe best vector is the same for {same} of {len(rows)} genomes.")


# -- mergekit -----------------------------------------------------------------------------------------------------------------------


def elsewhere(scratch: Path, dtype: str, genomes: Sequence[Mapping[str, Any]]) -> Path:
    """The folder of mergekit's recipes and models of all vectors: NAME-K.yaml and NAME-K/."""
    sys.path.insert(0, str(Path(__file__).parent))
    from merge import mergekit_command

    place = scratch / f"evolved-{dtype}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    job = scratch / "job.json"
    job.write_text(json.dumps({"genomes": genomes, "dtype": dtype, "out": str(place)}), encoding="utf-8")
    python = Path(mergekit_command(scratch)).with_name("python")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    subprocess.run([str(python), __file__, "--elsewhere", str(job)], check=True, env=environment)
    return place


def merge_elsewhere(job: Mapping[str, Any]) -> None:
    """Runs in mergekit's environment: its genome decodes, its merge merges."""
    import numpy as np
    from mergekit.common import ModelReference
    from mergekit.evo.genome import ModelGenome, ModelGenomeDefinition
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    out = Path(job["out"])
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, random_seed=0, quiet=True)
    for one in job["genomes"]:
        said = dict(one["definition"])
        for key in ("models", "base_model"):
            if key in said:
                listed = said[key] if isinstance(said[key], list) else [said[key]]
                references = [ModelReference.model_validate(path) for path in listed]
                said[key] = references if isinstance(said[key], list) else references[0]
        genome = ModelGenome(ModelGenomeDefinition(**said))
        for number, vector in enumerate(one["vectors"]):
            config = genome.genotype_merge_config(np.array(vector))
            target = out / f"{one['name']}-{number}"
            target.with_suffix(".yaml").write_text(config.to_yaml(), encoding="utf-8")
            run_merge(config.model_copy(update={"dtype": job["dtype"]}), str(target), options)
            for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copy(Path(one["definition"]["models"][0]) / name, target)


# -- a record for tests ---------------------------------------------------------------------------------------------------------------


def record(options: argparse.Namespace) -> None:
    """Small random models, two vectors of every genome, and what mergekit makes of them."""
    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file

    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_hidden_layers": 4, "vocab_size": 11, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
        "torch_dtype": "float32",
    }  # fmt: skip
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    models = {}
    base = LlamaForCausalLM(LlamaConfig(**config)).state_dict()
    tensors: dict[str, Any] = {}
    for number, alias in enumerate(("base", "a", "b", "c")):
        weights = {name: (value + 0.05 * number * torch.randn_like(value)).contiguous() for name, value in base.items()}
        place = options.scratch / "small-zoo" / alias
        place.mkdir(parents=True, exist_ok=True)
        save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
        models[alias] = str(place)
        tensors |= {f"models/{alias}/{name}": value for name, value in weights.items()}
    generator = np.random.default_rng(options.seed)
    job: list[dict[str, Any]] = []
    for number, name in enumerate(GENOMES):
        start = imported(options.scratch, name, models).genome.start()
        vectors = start + generator.normal(0, 1 / 2, (2, len(start)))
        job.append({"name": str(number), "definition": definition(name, models), "vectors": [v.tolist() for v in vectors]})
    place = elsewhere(options.scratch, "float32", job)
    recipes = {}
    for one in job:
        for k in range(len(one["vectors"])):
            text = place.joinpath(f"{one['name']}-{k}.yaml").read_text(encoding="utf-8")
            for alias, path in models.items():
                text = text.replace(path, alias)
            recipes[f"{one['name']}-{k}"] = text
            merged = load_file(place / f"{one['name']}-{k}" / "model.safetensors")
            if not GENOMES[list(GENOMES)[int(one["name"])]]["merge_method"].startswith("dare"):  # its random numbers are its own
                tensors |= {f"merged/{one['name']}-{k}/{name}": value for name, value in merged.items()}
    aliases = {path: alias for alias, path in models.items()}
    genomes = [
        {**one, "definition": {
            key: [aliases[path] for path in value] if key == "models" else aliases[value] if key == "base_model" else value
            for key, value in one["definition"].items()
        }} for one in job
    ]  # fmt: skip
    options.record.parent.mkdir(parents=True, exist_ok=True)
    about = {"genomes": json.dumps(genomes), "recipes": json.dumps(recipes), "config": json.dumps(config), "made_with": "mergekit 0.1.5"}
    save_file(tensors, options.record, metadata=about)


if __name__ == "__main__":
    main()
