"""The application: the list of commands, loaded when they are called, and what errors become."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import traceback
from typing import NoReturn

from cyclopts import App, Parameter

from modelglue import __version__
from modelglue.errors import MENDABLE, ModelGlueError, RunError, UserError, did_you_mean

app = App(
    name="modelglue",
    version=__version__,
    help="From a zoo of fine-tuned language models to one stronger model: group, select, merge, route.\n\n"
    "Add `--traceback` to any command to see where an error came from.",
    help_format="markdown",
    default_parameter=Parameter(show_default=lambda value: None if value is None or value is False else str(value)),
    suppress_keyboard_interrupt=False,  # `main` answers Ctrl-C
)
app.register_install_completion_command()

#: name -> where the function is; a command's module is imported when the command is called or asked for help
COMMANDS = {
    "demo": ("modelglue.cli.demo:demo", "The whole recipe on the tiny zoo that comes with the repository."),
    "glue": ("modelglue.cli.glue:glue", "Turn a zoo into one model: group, select, merge, route, report."),
    "merge": ("modelglue.cli.merge:merge", "Merge models by a recipe."),
    "stack": ("modelglue.cli.stack:stack", "Make a deeper model of the layers of one or more models."),
    "train": ("modelglue.cli.train:train", "Train new layers, routers or all of a model on texts."),
    "mix": ("modelglue.cli.mix:mix", "Join models as experts of one model."),
    "check": ("modelglue.cli.check:check", "Say from headers alone whether a recipe will work and what it needs."),
    "convert": ("modelglue.cli.convert:convert", "Print a recipe of mergekit's as one of ours."),
    "methods": ("modelglue.cli.methods:methods", "List the merge methods, or explain one."),
    "inspect": ("modelglue.cli.inspect:inspect", "Show a model's layers, roles, dtypes, sizes and tensors."),
    "diff": ("modelglue.cli.diff:diff", "Show where two models differ, by layer and role."),
    "verify": ("modelglue.cli.verify:verify", "Hash every tensor of an output and compare it with its record."),
    "push": ("modelglue.cli.push:push", "Upload an output to the hub."),
    "extract-lora": ("modelglue.cli.extract_lora:extract_lora", "Extract a LoRA adapter from a model and its base."),
    "merge-adapters": ("modelglue.cli.merge_adapters:merge_adapters", "Combine LoRA adapters of one base into one adapter."),
    "search": ("modelglue.cli.search:search", "Search members, coefficients and layers by scoring candidates that are merged in memory."),
    "recommend": ("modelglue.cli.recommend:recommend", "Say which merge methods suit a zoo, and why."),
    "similarity": ("modelglue.cli.similarity:similarity", "Compare the weights of models and find the families."),
    "eval": ("modelglue.cli.eval:evaluate", "Score models on lm-evaluation-harness tasks."),
    "generate": ("modelglue.cli.generate:generate", "Continue prompts and print the continuations."),
    "route": ("modelglue.cli.route:route", "Say which expert of a mixture a text goes to, and why."),
    "serve": ("modelglue.cli.serve:serve", "Serve a model or a mixture in OpenAI's dialect."),
    "report": ("modelglue.cli.report:report", "Write the HTML report of a run."),
}
for _name, (_path, _help) in COMMANDS.items():
    app.command(_path, name=_name, help=_help)


def main(tokens: list[str] | None = None) -> None:
    """Run one command; exit code 2 for what the user can mend, 1 for failures, 130 for Ctrl-C. MODELGLUE_TRACEBACK=1 shows where."""
    if tokens is None:
        atexit.register(gc.freeze)  # the process ends: looking for garbage among all of torch once more would take a third of a second
    arguments = sys.argv[1:] if tokens is None else tokens
    shown = "--traceback" in arguments or bool(os.environ.get("MODELGLUE_TRACEBACK"))
    try:
        _run([argument for argument in arguments if argument != "--traceback"])
    except KeyboardInterrupt:
        print("interrupted; run it again to continue", file=sys.stderr)
        sys.exit(130)
    except ModelGlueError as error:
        _fail(error, shown)
    except MemoryError as error:
        _fail(RunError(f"out of memory ({error}). Use fewer --workers, or a smaller batch."), shown, error)
    except OSError as error:
        kind = UserError if error.errno in MENDABLE else RunError
        _fail(kind(f"{error.filename or 'the system'}: {error.strerror or error}."), shown, error)


def _run(arguments: list[str]) -> None:
    command = arguments[0] if arguments else ""
    if command in COMMANDS:
        if command != "search":  # which is a list of commands itself
            app[command].help = None  # the list of commands shows one line of help, the command itself its whole docstring
    elif command and not command.startswith("-"):
        raise UserError(f"there is no command '{command}'.{did_you_mean(command, COMMANDS)} Known: {', '.join(COMMANDS)}.")
    if command in ("merge", "mix"):
        arguments = _in_our_words(arguments)
    app(arguments)


def _in_our_words(arguments: list[str]) -> list[str]:
    """mergekit's flags become ours; what means nothing here is said, unless all should be quiet."""
    from modelglue.cli.mergekit_flags import translate

    ours, notes = translate(arguments, arguments[0])
    if "--quiet" not in ours:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    return ours


def _fail(error: ModelGlueError, shown: bool, cause: BaseException | None = None) -> NoReturn:
    if shown:
        traceback.print_exception(cause or error)
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
