"""What the documents promise is there: links, file names, commands, and recipes that can be read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from modelglue.cli.app import COMMANDS
from modelglue.glue import GlueFile
from modelglue.recipe import parse_document, read_recipe, validate
from tests.conftest import REPOSITORY

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
    used = set(re.findall(r"^modelglue (\w+)", README, re.MULTILINE))
    assert {"check", "merge", "glue", "similarity", "report", "generate"} <= used
    assert used <= set(COMMANDS)


def test_the_recipes_of_the_readme_can_be_read() -> None:
    merge, zoo = YAML_BLOCKS
    assert [entry.model for entry in read_recipe(parse_document(merge, "README.md").value).models] == [
        "HuggingFaceH4/zephyr-7b-beta",
        "./my-finetune",
    ]
    assert [model.alias for model in validate(parse_document(zoo, "README.md"), GlueFile).zoo.models] == ["chat", "code", "math"]
