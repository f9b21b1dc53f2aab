"""lm-eval on models whose layers run packed: ``tests/engines.sh`` runs this."""

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from marlin_cy import cli
from marlin_cy.commands.run import BUILT_IN

pytestmark = pytest.mark.engines

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

FOLDER = str(files("marlin_cy") / BUILT_IN)
QUESTIONS = [("def f(", "self", "xyzw"), ("import ", "numpy", "qqqqq"), ("class A(", "object", "zzzzzz")]
TASK = """
task: own_lines
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""
PROGRAM = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer
from marlin_cy.integrations.transformers import MarlinCyConfig, load, register

folder, packed, tasks = sys.argv[1:]
register("gptq")

def evaluated(**options):
    manager = TaskManager(include_path=tasks, include_defaults=False)
    model = HFLM(device="cpu", batch_size=1, **options)
    found = simple_evaluate(model=model, tasks=["own_lines"], task_manager=manager, bootstrap_iters=0, log_samples=True)
    answers = [sample["resps"] for sample in found["samples"]["own_lines"]]
    return {"accuracy": found["results"]["own_lines"]["acc,none"], "answers": answers}

tokenizer = AutoTokenizer.from_pretrained(folder)
config = MarlinCyConfig.for_folder(folder, decoder=True)
decoder = AutoModelForCausalLM.from_pretrained(folder, config=config)
found = {
    "load": evaluated(pretrained=load(folder, dtype="bfloat16"), tokenizer=tokenizer),
    "path": evaluated(pretrained=folder, dtype="bfloat16"),
    "packed": evaluated(pretrained=packed, dtype="bfloat16"),
    "decoder": evaluated(pretrained=decoder, tokenizer=tokenizer),
}
print("RESULT", json.dumps(found))
"""


def test_a_task_of_its_own_files(tmp_path):
    """The same log-likelihoods by paths and by ``load``, and the decoder's; nothing is downloaded."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    data = tmp_path / "lines.json"
    lines = [{"question": question, "choices": choices, "answer": 0} for question, *choices in QUESTIONS]
    data.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "own_lines.yaml").write_text(TASK.format(data=data))
    assert cli.main(["pack", FOLDER, str(tmp_path / "packed")]) == 0
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, FOLDER, str(tmp_path / "packed"), str(tmp_path)]
    done = subprocess.run(
        command, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    found = json.loads(line.removeprefix("RESULT "))
    assert found["path"] == found["load"] == found["packed"]
    assert found["load"]["accuracy"] == found["decoder"]["accuracy"] == 1.0
    assert len(found["load"]["answers"]) == len(QUESTIONS)
    for one, other in zip(scores_of(found["decoder"]), scores_of(found["load"]), strict=True):
        assert one == pytest.approx(other, abs=0.2)  # activations of the other model are rounded to bfloat16


def scores_of(found):
    """The log-likelihood of each choice."""
    return [float(choice[0][0]) for sample in found["answers"] for choice in sample]
