"""What people's code and scripts rest on, frozen as literals: public names, commands, options, exit codes of the error family.

A change here is a change for users: it belongs in the changelog.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

import modelglue
from modelglue import errors
from modelglue.cli.app import COMMANDS, app

NAMES = """
Checkpoint Mixture ModelGlueError RunError UserError __version__ check diff evaluate find_families glue load_into load_live merge method mix
open save select similarity stack
""".split()  # noqa: SIM905

FLOOR_NAMES = {
    "evaluation": "CandidateEvaluator FunctionEvaluator ScoreStore TaskSet VllmResident evaluate leak_check score_text_model",
    "search": """
        SEARCHERS STRATEGIES AverageSearch Budget CoefficientSearch Facts HeuristicSearch Needs Outcome Proposal Ranking ReplayError
        Round Rule SearchReport SearchSettings Searcher SelectResult Selection Study SyntheticEvaluator candidate_of progress_of
        read_settings recorded run_study select warm_start
    """,
    "methods": "Method Parameter PerModel Range all_methods get method per_model",
    "recipe": """
        DATA_FLOW FORMAT LEVELS WHOLE Candidate CheckReport Cost Document Evaluator Level Plan Recipe Request Scorer Scores Stack Status
        build build_with_warnings canonical check check_mergeable dump interval linear_recipe load_document merge paired_interval
        parse_document read_document read_recipe read_with_models stack validate vocabulary warnings_of
    """,
}

#: command -> its options, in the order of its help; words in capitals are arguments without a name
OPTIONS = {
    "demo": "--run --workers --overwrite --quiet --json",
    "glue": "--source --run --workers --overwrite --quiet --json",
    "merge": (
        "--recipe --out --workers --memory --device --executor --shard-size --seed --allow-mixed --truncate-vocabulary --strict "
        "--overwrite --quiet --json"
    ),
    "stack": (
        "MODELS --out --drop --copies --interleave --identity-start --layers --every --new-layers --spread --vocabulary "
        "--allow-pattern-break --print --workers --memory --shard-size --strict --overwrite --quiet --json"
    ),
    "train": (
        "--model TEXTS --out --tensors --context --batch --micro-batch --epochs --steps --rate --warm-up --decay --clip --precision "
        "--gating --device --seed --keep-every --overwrite --quiet --json"
    ),
    "mix": "--recipe --out --workers --memory --shard-size --strict --overwrite --quiet --json",
    "check": "--recipe --out --workers --memory --allow-mixed --truncate-vocabulary --strict --similarity --json --quiet",
    "convert": "--recipe --out --strict --overwrite --json",
    "methods": "--name --json",
    "inspect": "--model --tensors --identity --json",
    "diff": "--a --b --tensors --out --overwrite --workers --json --quiet",
    "verify": "--folder --quick --workers --json --quiet",
    "push": "--folder --repository --private --revision --message --json --quiet",
    "extract-lora": "--model --base --out --rank --energy --sv-epsilon --include --exclude --embed-lora --skip-others --scale-in-a --exact "
    "--dtype --base-name --workers --overwrite --json --quiet",
    "merge-adapters": "ADAPTERS --out --weights --mode --density --majority-sign --rank --clamp --seed --dtype --overwrite --json --quiet",
    "search run": "--source --out --workers --device --executor --store --quiet --json",
    "search resume": "--out --workers --device --executor --store --quiet --json",
    "search report": "--out --quiet --json",
    "search export": "--out --candidate --best --csv --optuna --tensorboard --workers --overwrite --quiet --json",
    "recommend": "--zoo --base --json --quiet",
    "similarity": "MODELS --zoo --mode --scope --base --threshold --linkage --out --overwrite --json --quiet",
    "eval": "MODELS --tasks --include --store --device --json --quiet",
    "generate": "--model PROMPTS --max-new-tokens --until --temperature --top-p --seed --beams --residency --dtype --json --quiet",
    "route": "--mixture TEXTS --json",
    "serve": "--model --host --port --name --api-key-file --residency --dtype --max-tokens --max-body --max-choices --rows --queue "
    "--timeout --json --quiet",
    "report": "--run --json --quiet",
}

EXIT_CODES = {
    "UserError": 2,
    "RecipeError": 2,
    "CheckpointError": 2,
    "MergeError": 2,
    "RunError": 1,
    "WorkerDiedError": 1,
    "ModelGlueError": 1,
}


def test_public_names() -> None:
    assert list(modelglue.__all__) == NAMES
    assert dir(modelglue) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(modelglue, name)
    assert isinstance(value, str) if name == "__version__" else callable(value)


def test_public_names_are_their_homes() -> None:
    """The door hands out what the floors have, under the same names; `open` is the one that is called otherwise inside."""
    from modelglue.checkpoint import open_checkpoint, save
    from modelglue.recipe import merge
    from modelglue.zoo import similarity

    assert modelglue.open is open_checkpoint
    assert (modelglue.save, modelglue.merge, modelglue.similarity) == (save, merge, similarity)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'merg'"):
        _ = modelglue.merg  # type: ignore[attr-defined]


@pytest.mark.parametrize("floor", FLOOR_NAMES)
def test_names_of_the_floors(floor: str) -> None:
    module = importlib.import_module(f"modelglue.{floor}")
    names = FLOOR_NAMES[floor].split()
    assert set(names) <= set(module.__all__)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    if floor in ("recipe", "methods", "search"):
        assert sorted(module.__all__) == sorted(names)


def test_exit_codes() -> None:
    family = {
        name: value.exit_code for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, errors.ModelGlueError)
    }
    assert family == EXIT_CODES


# -- the command line -------------------------------------------------------------------------------------------------------------


def arguments(command: str) -> Any:
    """Of a command, or of a part of one ("search run")."""
    found = app
    for name in command.split():
        found = found[name]
    return found.assemble_argument_collection(parse_docstring=True)


def test_commands() -> None:
    assert list(COMMANDS) == list(dict.fromkeys(command.partition(" ")[0] for command in OPTIONS))


@pytest.mark.parametrize("command", OPTIONS)
def test_options(command: str) -> None:
    assert [name for argument in arguments(command) for name in argument.names] == OPTIONS[command].split()


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_is_described(command: str) -> None:
    for argument in arguments(command):
        text = argument.parameter.help
        assert text, f"{command} {argument.names}: has no help"
        assert text[0].isupper(), f"{command} {argument.names}: {text}"
        assert text.endswith("."), f"{command} {argument.names}: {text}"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_list_of_commands_says_what_the_command_says(command: str) -> None:
    path, text = COMMANDS[command]
    module, _, function = path.partition(":")
    found = getattr(importlib.import_module(module), function)
    doc = found.help if command == "search" else inspect.getdoc(found)
    assert doc is not None
    assert " ".join(doc.split("\n\n")[0].split()).startswith(text.removesuffix("."))


@pytest.mark.parametrize("command", OPTIONS)
def test_flags_have_one_spelling(command: str) -> None:
    """No --no-json: a switch that is off by default needs no second name."""
    for argument in arguments(command):
        if argument.hint is bool:
            assert len(argument.names) == 1, argument.names
            assert argument.parameter.negative == (), argument.names


@pytest.mark.parametrize("command", OPTIONS)
def test_commands_have_machine_readable_output(command: str) -> None:
    assert "--json" in OPTIONS[command].split()


def test_every_method_is_documented_for_the_command_line() -> None:
    from modelglue.methods import all_methods

    assert [method.id for method in all_methods()] == [
        "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear", "karcher", "linear",
        "model_stock", "multislerp", "nearswap", "nuslerp", "passthrough", "ram", "ramplus_tl", "sce", "slerp", "task_arithmetic", "ties",
    ]  # fmt: skip
    for method in all_methods():
        assert method.summary.endswith("."), method.id
        assert method.source, method.id
        for parameter in method.parameters:
            assert parameter.doc, f"{method.id}: {parameter.name}"
