"""`modelglue search`: run, resume, report and export searches over merges."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from cyclopts.validators import Number

if TYPE_CHECKING:
    from modelglue.studies import Finished

search = App(name="search", help="Search members, coefficients and layers by scoring candidates that are merged in memory.")

Workers = Annotated[int | None, Parameter(validator=Number(gte=1))]
Flag = Annotated[bool, Parameter(negative=())]


@search.command
def run(
    source: Path, out: Path, *, workers: Workers = None, device: str = "cpu", executor: str = "local", store: Path | None = None,
    quiet: Flag = False, json: Flag = False,
) -> None:  # fmt: skip
    """Search as a file says; a search that is in the folder already goes on.

    Parameters
    ----------
    source
        A search file, or a plan of mergekit-evolve or mergenetic.
    out
        Folder of the search: its journal, scores, result and report.
    workers
        Processes that score candidates; they change no result. Default: one per device.
    device
        Where models are scored: cpu, cuda (every GPU, one worker each), cuda:0,cuda:1, mps or another device of torch.
    executor
        Where workers run: local (this machine), ray or ray://HOST:PORT (a Ray cluster on a shared disk; needs modelglue[ray]).
    store
        File of scores that several searches share. Default: one in the folder.
    quiet
        Print nothing.
    json
        Print the findings as JSON.
    """
    from modelglue.cli.console import stderr
    from modelglue.studies import limits_of, read_search, run_search

    found = read_search(source)
    if not quiet:
        for note in found.notes:
            stderr().print(f"note: {note}", soft_wrap=True, markup=False)
    from modelglue.cli.progress import search_progress

    with search_progress(limits_of(found.file), quiet=quiet or json) as listener:
        _show(
            run_search(source, out, workers=workers, device=device, executor=executor, store=store, on_event=listener),
            quiet=quiet,
            json=json,
        )


@search.command
def resume(
    out: Path, *, workers: Workers = None, device: str = "cpu", executor: str = "local", store: Path | None = None, quiet: Flag = False,
    json: Flag = False,
) -> None:  # fmt: skip
    """Go on with a search that was interrupted; nothing that was scored is scored again.

    Parameters
    ----------
    out
        Folder of the search.
    workers
        Processes that score candidates; they change no result. Default: one per device.
    device
        Where models are scored: cpu, cuda (every GPU, one worker each), cuda:0,cuda:1, mps or another device of torch.
    executor
        Where workers run: local (this machine), ray or ray://HOST:PORT (a Ray cluster on a shared disk; needs modelglue[ray]).
    store
        File of scores that was given when the search began.
    quiet
        Print nothing.
    json
        Print the findings as JSON.
    """
    from modelglue.cli.progress import search_progress
    from modelglue.studies import limits_of, resume_search

    with search_progress(limits_of(out), quiet=quiet or json) as listener:
        _show(resume_search(out, workers=workers, device=device, executor=executor, store=store, on_event=listener), quiet=quiet, json=json)


@search.command
def report(out: Path, *, quiet: Flag = False, json: Flag = False) -> None:
    """Write search.html: the course of the search, its best candidates, confirmation and cost; of a running search too.

    Parameters
    ----------
    out
        Folder of the search.
    quiet
        Print nothing.
    json
        Print the findings as JSON.
    """
    from modelglue.cli.console import print_json
    from modelglue.report.search import write_search_report
    from modelglue.search import recorded
    from modelglue.studies import read_result

    path = write_search_report(out)
    if json:
        print_json({"report": str(path), "result": read_result(out), **recorded(out).to_json()})
    elif not quiet:
        print(path)


@search.command
def export(
    out: Path,
    *,
    candidate: int | None = None,
    best: Path | None = None,
    csv: Path | None = None,
    optuna: Path | None = None,
    tensorboard: Path | None = None,
    workers: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    overwrite: Flag = False,
    quiet: Flag = False,
    json: Flag = False,
) -> None:
    """Write a candidate's model or recipe, or the course of the search for other tools. Without options: print the best recipe.

    Parameters
    ----------
    out
        Folder of the search.
    candidate
        Number of the candidate. Default: the best one.
    best
        Folder to write the candidate's model to.
    csv
        File for a table of all candidates.
    optuna
        SQLite file for a study that Optuna's dashboard opens.
    tensorboard
        Folder for TensorBoard event files.
    workers
        Processes that write the model. Default: one per core, one for small models.
    overwrite
        Replace an existing model folder.
    quiet
        No progress, no summary.
    json
        Print what was written as JSON.
    """
    from modelglue.checkpoint import write_bytes_atomic
    from modelglue.checkpoint.output.yaml_text import yaml_text
    from modelglue.cli.console import byte_progress, print_json, stderr
    from modelglue.search import recorded
    from modelglue.search.export import to_csv, to_optuna, to_tensorboard
    from modelglue.studies import best_of, recipe_of, write_candidate

    written: dict[str, Any] = {}
    if csv is not None:
        write_bytes_atomic(csv, to_csv(recorded(out)).encode())
        written["csv"] = str(csv)
    if optuna is not None:
        to_optuna(recorded(out), optuna, out.resolve().name)
        written["optuna"] = str(optuna)
    if tensorboard is not None:
        to_tensorboard(recorded(out), tensorboard)
        written["tensorboard"] = str(tensorboard)
    if best is not None:
        with byte_progress(best.name, quiet=quiet or json) as progress:
            saved = write_candidate(out, best, candidate, overwrite=overwrite, workers=workers, progress=progress)
        written["model"] = str(saved.directory)
    if not written or (candidate is not None and best is None):
        recipe = recipe_of(out, best_of(out, candidate))
        if json:
            written["recipe"] = recipe
        else:
            print(yaml_text(recipe), end="")
    if json:
        print_json(written)
    elif not quiet:
        for what, path in written.items():
            stderr().print(f"{what}  {path}", soft_wrap=True, markup=False)


def _show(found: Finished, *, quiet: bool, json: bool) -> None:
    from modelglue.cli.console import print_json, stdout
    from modelglue.cli.search_summary import print_search
    from modelglue.report.search import write_search_report

    page = write_search_report(found.folder)
    if json:
        print_json({"folder": str(found.folder), "report": str(page), "result": dict(found.result), **found.report.to_json()})
    elif not quiet:
        print_search(found, page, stdout())
