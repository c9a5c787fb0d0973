"""The zoo file: defaults, unique aliases, and errors that name the line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

from modelglue.errors import RecipeError
from modelglue.zoo import Zoo, ZooFile, ZooModel, read_zoo

if TYPE_CHECKING:
    from pathlib import Path

FULL = """\
format: modelglue/1
zoo:
  name: my-zoo
  base: org/base-model
  models:
    - id: org/model-a
      alias: a
      revision: main
      adapter: null
      dtype: bfloat16
      domain: [chat, code]
      prompts: {positive: [hello], negative: [bye]}
      scores: {arc: 0.55}
    - id: ./models/b/
    - id: org/model-c@refs
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "zoo.yaml"
    path.write_text(text)
    return path


def test_every_field_and_every_default(tmp_path: Path) -> None:
    zoo = read_zoo(write(tmp_path, FULL))
    assert (zoo.name, zoo.base) == ("my-zoo", "org/base-model")
    a, b, c = zoo.models
    assert a.model_dump() == {
        "id": "org/model-a", "alias": "a", "revision": "main", "adapter": None, "dtype": "bfloat16",
        "domain": ["chat", "code"],
        "prompts": {"positive": ["hello"], "negative": ["bye"]}, "prompts_from": None, "scores": {"arc": 0.55},
    }  # fmt: skip
    assert b == ZooModel(id="./models/b/", alias="b")
    assert (b.domain, b.prompts, b.scores, b.revision) == ([], None, {}, None)
    assert c.alias == "model-c"
    assert [model.reference for model in zoo.models] == ["org/model-a@main", "./models/b/", "org/model-c@refs"]
    assert ZooModel(id="org/m", revision="v1", adapter="lora").reference == "org/m@v1+lora"


def test_python_mappings_and_glue_files_are_read_too(tmp_path: Path) -> None:
    assert [model.alias for model in read_zoo({"zoo": {"models": [{"id": "x/y"}]}}).models] == ["y"]
    glue = write(tmp_path, FULL + "tasks: {proxy: [t]}\nselect: {strategy: all}\n")
    assert read_zoo(glue) == read_zoo(write(tmp_path, FULL))
    assert Zoo(models=[ZooModel(id="x/y")]).name == "zoo"
    assert ZooFile(zoo=Zoo(models=[ZooModel(id="x/y")])).format == "modelglue/1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "zoo:\n  models:\n    - {id: a/x}\n    - {id: b/x}\n",
            r"zoo\.yaml:2: zoo\.models: two models have the alias 'x'.*another alias",
        ),
        ("zoo:\n  models:\n    - id: a\n      aliass: b\n", r"zoo\.yaml:4: .*unknown key\. Did you mean 'alias'\?"),
        ("zoo:\n  models: []\n", r"zoo\.yaml:2: zoo\.models"),
        ("zoo:\n  name: z\n", r"zoo\.models: is required"),
        ("zoo:\n  models:\n    - {id: a, alias: x/y}\n", r"zoo\.yaml:3: .*alias 'x/y'.*is no name"),
        ("zoo:\n  models:\n    - {id: ..}\n", r"alias '\.\.'.*Give the model an alias"),
        ("zoo:\n  models:\n    - {id: a, dtype: int8}\n", r"zoo\.yaml:3: zoo\.models\[0\]\.dtype"),
        ("zoo:\n  models:\n    - {id: a, scores: {t: .nan}}\n", r"zoo\.yaml:3: .*scores\.t"),
        ("zoo:\n  models:\n    - {id: a}\nselect: {}\n", r"zoo\.yaml:4: select: unknown key"),
    ],
)
def test_faults_name_line_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_zoo(write(tmp_path, text))


def test_models_are_frozen() -> None:
    with pytest.raises(ValidationError):
        ZooModel(id="a").alias = "b"  # type: ignore[misc]
