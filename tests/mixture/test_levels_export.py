"""A mixture's folder needs torch and transformers and nothing else: it is loaded where modelglue cannot be imported."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modelglue.checkpoint import open_checkpoint
from modelglue.mixture.levels import mix
from modelglue.models import LiveTextModel, load_live, load_tokenizer
from tests.evaluation.task_files import CHOICE, write_task
from tests.mixture.levels_making import left_pads, some_ids
from tests.models.tiny import letters, saved_model

#: folder -> (class of the experts, level, what else the file says)
MIXTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "token": ("llama", "ffn", {"top_k": 2, "export": "own"}),
    "sample": ("llama", "ffn", {"routing": "sample", "merged_layers": 1}),
    "block": ("gpt_neox", "block", {"top_k": 2}),
    "whole": ("llama-tied", "model", {"share_io": True}),
}

STRANGER = """
import json, sys
sys.modules["modelglue"] = None  # whoever imports it fails
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

root, names = sys.argv[1], sys.argv[2:]
given, found = load_file(f"{root}/given.safetensors"), {}
for name in names:
    model, info = AutoModelForCausalLM.from_pretrained(f"{root}/{name}", trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    options = {"attention_mask": given["mask"], "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        found[f"{name}.logits"] = model(given["ids"], attention_mask=given["mask"]).logits
        found[f"{name}.cached"] = model.generate(given["ids"], use_cache=True, **options)
        found[f"{name}.uncached"] = model.generate(given["ids"], use_cache=False, **options)
    half = AutoModelForCausalLM.from_pretrained(f"{root}/{name}", trust_remote_code=True, dtype=torch.bfloat16)
    assert {str(value.dtype) for part, value in half.named_parameters() if "router" in part} == {"torch.float32"}
    found[f"{name}.half"] = half(given["ids"]).logits.float()
save_file(found, f"{root}/found.safetensors")

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

runner = HFLM(pretrained=f"{root}/token", tokenizer=f"{root}/token", trust_remote_code=True, batch_size=4, device="cpu", dtype="float32")
manager = TaskManager(include_path=f"{root}/tasks", include_defaults=False)
results = simple_evaluate(model=runner, tasks=["choice"], task_manager=manager, bootstrap_iters=0, log_samples=True)
samples = sorted(results["samples"]["choice"], key=lambda sample: sample["doc_id"])
with open(f"{root}/samples.json", "w") as file:
    json.dump([[sample["arguments"], [reply[0] for reply in sample["resps"]]] for sample in samples], file)
assert "modelglue" not in {name.partition(".")[0] for name, module in sys.modules.items() if module is not None}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every mixture, and what the stranger found in it."""
    pytest.importorskip("accelerate")
    root = tmp_path_factory.mktemp("exports")
    for name, (kind, level, more) in MIXTURES.items():
        models = [saved_model(root / f"{kind}-{seed}", kind, seed, tokenizer=letters()) for seed in range(3)]
        experts = [{"model": str(path), "prompts": {"positive": [path.name[-1]]}} for path in models]
        mix({"level": level, "experts": experts, **more}, root / name)
    ids = some_ids()
    from safetensors.torch import save_file

    save_file({"ids": ids, "mask": left_pads(ids, [3, 0, 1])}, root / "given.safetensors")
    (root / "tasks").mkdir()
    write_task(root / "tasks", "choice", CHOICE, [{"prompt": f"{a} is", "choices": [" x", " yes"], "gold": 0} for a in ("ab", "c", "def")])
    environment = {**os.environ, "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": ""}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STRANGER, str(root), *MIXTURES],
        env=environment,
        cwd=root / "tasks",
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return root


@pytest.mark.parametrize("name", MIXTURES)
def test_a_stranger_gets_the_same_logits_and_texts(name: str, root: Path) -> None:
    found, given = load_file(root / "found.safetensors"), load_file(root / "given.safetensors")
    live = load_live(open_checkpoint(root / name))
    with torch.no_grad():
        torch.testing.assert_close(found[f"{name}.logits"], live(given["ids"], attention_mask=given["mask"]).logits, rtol=1e-5, atol=1e-5)
        plain = live(given["ids"]).logits
    assert float((found[f"{name}.half"] - plain).abs().mean()) < 0.1 * float(plain.abs().mean())
    assert found[f"{name}.cached"].shape == (3, given["ids"].shape[1] + 6)
    assert torch.equal(found[f"{name}.cached"], found[f"{name}.uncached"])


def test_the_harness_scores_it_as_we_do(root: Path) -> None:
    checkpoint = open_checkpoint(root / "token")
    text = LiveTextModel(load_live(checkpoint), load_tokenizer(checkpoint))
    samples = json.loads((root / "samples.json").read_text())
    assert len(samples) == 3
    for arguments, replies in samples:
        for (value, greedy), (theirs, theirs_greedy) in zip(text.loglikelihood([tuple(pair) for pair in arguments]), replies, strict=True):
            assert value == pytest.approx(theirs, abs=1e-4)
            assert greedy == theirs_greedy


@pytest.mark.parametrize("name", MIXTURES)
def test_two_small_files_import_torch_and_transformers_alone(name: str, root: Path) -> None:
    files = sorted(path.name for path in (root / name).glob("*.py"))
    assert files == ["configuration_mixture.py", "modeling_mixture.py"]
    found = set()
    for file in files:
        for node in ast.walk(ast.parse((root / name / file).read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).partition(".")[0])
    assert found - set(sys.stdlib_module_names) == {"torch", "transformers"}
