"""Licences of parents: where they are read from, and which of them do not go together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modelglue.checkpoint import MergedCheckpoint, SafetensorsCheckpoint, TensorsCheckpoint
from modelglue.checkpoint.output.licence import Licence, Parent, common_licence, licence_of, licence_warnings, parents
from modelglue.methods import get
from tests.checkpoint.files import write_single


def readme(folder: Path, front: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{front}\n---\n# Title\nlicense: mit\n")
    return folder


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: apache-2.0", Licence("apache-2.0")),
        ("license: Apache-2.0\ntags: [x]", Licence("apache-2.0")),
        ("license: [mit]", Licence("mit")),
        ("license: [mit, apache-2.0]", Licence("other", "mit and apache-2.0")),
        ("license: other\nlicense_name: mrl\nlicense_link: https://x.y/z", Licence("other", "mrl", "https://x.y/z")),
        ("license: mit\nlicense_name: nonsense", Licence("mit")),
        ("license:", Licence()),
        ("tags: [x]", Licence()),
        ("[a, b]", Licence()),
        ("a: [", Licence()),
    ],
)
def test_front_matter(tmp_path: Path, front: str, expected: Licence) -> None:
    assert licence_of(readme(tmp_path / "m", front)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("                 Apache License\n           Version 2.0, January 2004\n", "apache-2.0"),
        ("Licensed under the Apache License, Version 2.0 (the ...", "apache-2.0"),
        ("MIT License\n\nCopyright (c) X\n\nPermission is hereby granted, free of charge, to any", "mit"),
        ("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version Release Date", "llama3.1"),
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT", "llama3"),
        ("GNU AFFERO GENERAL PUBLIC LICENSE\n   Version 3, 19 November 2007", "agpl-3.0"),
        ("GNU GENERAL PUBLIC LICENSE\n   Version 2, June 1991", "gpl-2.0"),
        ("Creative Commons Attribution-NonCommercial 4.0 International", "cc-by-nc-4.0"),
        ("Gemma Terms of Use", "gemma"),
        ("All rights reserved.", "other"),
    ],
)
def test_licence_files(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "LICENSE").write_text(text)
    assert licence_of(tmp_path).id == expected


def test_the_front_matter_counts_more_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("MIT License. Permission is hereby granted, free of charge")
    assert licence_of(readme(tmp_path, "license: gemma")).id == "gemma"
    (tmp_path / "README.md").write_bytes(b"---\n\xff\xfe: \x00\n---\n")
    assert licence_of(tmp_path).id == "mit"


def test_nothing_to_read(tmp_path: Path) -> None:
    assert licence_of(tmp_path) == Licence()
    assert licence_of(tmp_path / "model.safetensors") == Licence()


def of(*ids: str | None) -> list[Parent]:
    """Parents a, b, ... under these licences ("other:x" is one named x)."""
    made = [Licence(*one.split(":")) if one else Licence() for one in ids]
    return [Parent("abcdef"[number], None, licence) for number, licence in enumerate(made)]


@pytest.mark.parametrize(
    ("ids", "common"),
    [
        (("apache-2.0", "apache-2.0"), "apache-2.0"),
        (("apache-2.0", "mit"), None),
        (("apache-2.0", None), None),
        ((None, None), None),
        (("other", "other"), None),
        (("other:mrl", "other:mrl"), "other (mrl)"),
        (("other:mrl", "other:x"), None),
    ],
)
def test_common_licence(ids: tuple[str | None, ...], common: str | None) -> None:
    found = common_licence(of(*ids))
    assert (None if found is None else str(found)) == common


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0"), []),
        (("llama3.1", "llama3.1"), []),
        (("cc-by-nc-4.0", "cc-by-nc-4.0"), []),
        ((None, None), []),
        (("mit", None, None), ["b, c name no licence: find out whether they may be merged and published."]),
        (("apache-2.0", None), ["b names no licence: find out whether it may be merged and published."]),
        (("other", "mit"), ["a has a licence of its own (other): read whether it may be merged and published."]),
        (("other", "other"), ["a, b have a licence of their own (other): read whether they may be merged and published."]),
        (
            ("apache-2.0", "cc-by-nc-4.0"),
            ["b is under cc-by-nc-4.0, for non-commercial use only; apache-2.0 beside it does not change that."],
        ),
        (
            ("other:mnpl", "mit"),
            ["a is under other (mnpl), for non-commercial use only; mit beside it does not change that."],
        ),
        (
            ("llama3.1", "apache-2.0"),
            ["a is under llama3.1, whose terms hold for the merge as well, beside apache-2.0."],
        ),
        (
            ("llama3", "gemma"),
            [
                "a is under llama3, whose terms hold for the merge as well, beside gemma.",
                "b is under gemma, whose terms hold for the merge as well, beside llama3.",
            ],
        ),
        (
            ("gpl-3.0", "apache-2.0"),
            ["a is under gpl-3.0, which asks that what is made from it be under the same, so the merge falls under it."],
        ),
        (
            ("gpl-2.0", "apache-2.0"),
            ["a is under gpl-2.0, which asks that what is made from it be under the same; apache-2.0 may not permit that."],
        ),
        (
            ("cc-by-nd-4.0", "cc-by-nd-4.0"),
            ["a, b are under cc-by-nd-4.0, which permits no derivatives; a merge is one."],
        ),
    ],
)  # fmt: skip
def test_warnings(ids: tuple[str | None, ...], expected: list[str]) -> None:
    assert licence_warnings(of(*ids)) == expected


def test_parents_of_an_expression(tmp_path: Path) -> None:
    """Hub snapshots with their commit, our own outputs with their record, models in memory by name, everything once."""
    snapshot = tmp_path / "models--org--one" / "snapshots" / "0123abcd"
    one = SafetensorsCheckpoint(write_single(snapshot, {"w": torch.ones(1)}), "org/one")
    readme(snapshot, "license: mit")
    ours = SafetensorsCheckpoint(write_single(tmp_path / "ours", {"w": torch.ones(1)}), "ours")
    (tmp_path / "ours" / "modelglue_record.json").write_bytes(b"{}")
    memory = TensorsCheckpoint({"w": torch.ones(1)}, label="made")
    inner = MergedCheckpoint(get("linear"), [one, memory], None, {"weight": [1.0, 1.0], "normalize": True})
    merged = MergedCheckpoint(get("linear"), [inner, ours, one], None, {"weight": [1.0] * 3, "normalize": True})
    assert parents(merged, {"ours": "../ours"}) == [
        Parent("org/one", "org/one", Licence("mit"), "0123abcd", None),
        Parent("made", None, Licence(), None, None),
        Parent("../ours", None, Licence(), None, "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"),
    ]
