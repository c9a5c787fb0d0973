"""What the documents promise is there: links, file names, commands, and recipes that can be read."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from modelglue.cli.app import COMMANDS, app
from modelglue.glue import GlueFile
from modelglue.recipe import canonical, parse_document, read_recipe, validate
from tests.conftest import REPOSITORY

FROM_MERGEKIT = (REPOSITORY / "docs" / "from-mergekit.md").read_text(encoding="utf-8")
DOCUMENTS = sorted(
    path for folder in (REPOSITORY, REPOSITORY / "docs", REPOSITORY / "examples" / "tiny-zoo") for path in folder.glob("*.md")
)
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
YAML_BLOCKS = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(path: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", path.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_architecture_names_files_that_exist() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`((?:[\w-]+/)*[\w-]+\.py)`", text))
    places = [REPOSITORY, REPOSITORY / "src" / "modelglue"]
    found = {path.name for path in (REPOSITORY / "src" / "modelglue").rglob("*.py")}
    missing = [name for name in names if not any((place / name).is_file() for place in places) and ("/" in name or name not in found)]
    assert len(names) > 30
    assert missing == []


def test_the_readme_uses_commands_that_exist() -> None:
    used = set(re.findall(r"^modelglue ([\w-]+)", README, re.MULTILINE))
    assert {"check", "merge", "glue", "similarity", "report", "generate"} <= used
    assert used <= set(COMMANDS)


def test_the_recipes_of_the_readme_can_be_read() -> None:
    merge, zoo = YAML_BLOCKS
    assert [entry.model for entry in read_recipe(parse_document(merge, "README.md").value).models] == [
        "HuggingFaceH4/zephyr-7b-beta",
        "./my-finetune",
    ]
    assert [model.alias for model in validate(parse_document(zoo, "README.md"), GlueFile).zoo.models] == ["chat", "code", "math"]


def test_the_recipes_of_the_documents_can_be_read() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) > 5
    for block in blocks:
        recipe = read_recipe(parse_document(block, "recipes.md").value)
        assert recipe.warnings == ()
        assert read_recipe(canonical(recipe)) == recipe


# -- docs/from-mergekit.md ----------------------------------------------------------------------------------------------------------


def test_recipes_in_both_dialects_say_the_same() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", FROM_MERGEKIT, re.DOTALL)
    theirs = [block for block in blocks if "merge_method" in block]
    ours = [block for block in blocks if "merge_method" not in block]
    assert len(theirs) == len(ours) == 2
    for there, here in zip(theirs, ours, strict=True):
        assert canonical(read_recipe(yaml.safe_load(there))) == canonical(read_recipe(yaml.safe_load(here)))


def test_every_flag_and_key_of_mergekit_is_mapped() -> None:
    from modelglue.cli.mergekit_flags import FLAGS

    assert [flag for flag in FLAGS if f"`--{flag}" not in FROM_MERGEKIT] == []
    keys = "merge_method base_model models slices modules parameters dtype out_dtype tokenizer_source tokenizer chat_template name".split()  # noqa: SIM905
    assert [key for key in keys if f"`{key}" not in FROM_MERGEKIT] == []


def commands_in(text: str) -> list[list[str]]:
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    found = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("modelglue ")]
    return found + [shlex.split(code)[1:] for code in re.findall(r"\| `(modelglue [^`]*)`", text)]


@pytest.mark.parametrize("name", ["README.md", "docs/from-mergekit.md", "docs/architecture.md", "docs/performance.md"])
def test_commands_are_called_as_they_can_be(name: str) -> None:
    """Every line that begins with modelglue is parsed; nothing is run."""
    for tokens in commands_in((REPOSITORY / name).read_text(encoding="utf-8")):
        if tokens[1:]:
            app.parse_args(tokens, exit_on_error=False, print_error=False)
        else:
            assert tokens[0] in (*COMMANDS, "--help")
