"""mypy on programs of users: it accepts the correct program, rejects wrong lines, and finds every module."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import marlin_cy

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.sweep  # mypy reads the package and NumPy's stubs: ten seconds

# mypy is in the extra "test": without it, these tests fail rather than skip.
RIGHT = """\
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import marlin_cy
from marlin_cy import (
    Backend,
    Context,
    Linear,
    MarlinExpertStack,
    MoeLayer,
    Routing,
    SharedExpert,
    UnsupportedError,
    available_backends,
    get_backend,
    load_model,
    moe_align_block_size,
    open_checkpoint,
)


def backend_and_context(name: str) -> tuple[Backend, Context]:
    reasons: dict[str, str | None] = available_backends()
    if reasons[name] is not None:
        raise SystemExit(reasons[name])
    backend = get_backend(name)
    return backend, backend.new_context(num_threads=2, compute_dtype="int8")


def layer_of(folder: Path, backend: Backend) -> MoeLayer:
    with open_checkpoint(folder, backend=backend) as checkpoint:
        return checkpoint.moe_layer(checkpoint.moe_layers[0])


def layer_from(gate_up: MarlinExpertStack, down: MarlinExpertStack, bias: npt.NDArray[np.float32]) -> MoeLayer:
    shared = SharedExpert(gate_up, down, gate_weight=np.ones(gate_up.k, np.float32))
    return MoeLayer(
        gate_up, down, top_k=2, activation="gelu", shared_expert=shared, scoring="sigmoid", correction_bias=bias
    )


def products(backend: Backend, ctx: Context, stack: MarlinExpertStack, rows: npt.NDArray[np.float32]) -> Any:
    out = backend.empty((len(rows), stack.n_per_expert), np.float32)
    stack.gemm_phase_batched(ctx, backend.from_host(rows), [(0, 0, 0, len(rows))], out, stack.k)
    stack.gemm_phase_batched(ctx, rows, np.array([[0, 0, 0, 1]], np.int64), out, stack.k)
    ids, experts, padded = moe_align_block_size(np.zeros((len(rows), 1), np.int32), 8, stack.num_experts)
    stack.gemm_phase_vllm(ctx, rows, ids, experts, padded, out, len(rows), 8, 1)
    linear: Linear = stack.make_expert_linear(0, stack.n_per_expert)
    linear.forward(ctx, rows, out, len(rows))
    return backend.to_host(out)


def run(layer: MoeLayer, ctx: Context, tokens: npt.NDArray[np.float32], logits: npt.NDArray[np.float32]) -> Any:
    routing: Routing = layer.routing
    ids, weights = layer.route(ctx, logits)
    try:
        layer.forward_routed(ctx, tokens, ids, weights)
    except UnsupportedError as error:
        print(error, routing.top_k, marlin_cy.__version__)
    return layer(ctx, tokens, logits, out=np.empty_like(tokens))


def texts_of(folder: Path) -> list[str]:
    model = load_model(folder, context_length=512, num_threads=2)
    for piece in model.generate("def f(", max_new_tokens=20, temperature=0.7, stop=["end"]):
        print(piece.text, piece.tokens[0], piece.finish_reason)
    answer = model.chat([{"role": "user", "content": "Hello"}], top_p=0.9, template_options={"enable_thinking": False})
    print("".join(piece.text for piece in answer))
    answer.close()
    logits: npt.NDArray[np.float32] = model.forward([1, 2, 3])
    return model.generate_batch(["a", [1, 2]], seed=int(logits.argmax()))


backend, ctx = backend_and_context("cpu")
layer = layer_of(Path("folder"), backend)
stack = layer.gate_up
"""

# Each line follows RIGHT, and is wrong in one way: mypy must report that line, with this kind of error.
WRONG = [
    ('stack.gemm_phase_batched(1, 2, 3, 4, "five")', "arg-type"),
    ("stack.gemm_phase_batched(ctx, tokens, [(0, 0, 0, 1)])", "call-arg"),
    ('stack.gemm_phase_batched(ctx, None, [("0", 0, 0, 1)], None, 8)', "list-item"),
    ('stack.make_expert_linear("0", 8)', "arg-type"),
    ('stack.make_expert_linear(0, 8).forward(ctx, None, None, "all")', "arg-type"),
    ("stack.no_such_method()", "attr-defined"),
    ("stack.k = 8", "misc"),
    ('MoeLayer("gate_up", "down", top_k=2)', "arg-type"),
    ('MoeLayer(stack, stack, top_k="2")', "arg-type"),
    ("MoeLayer(stack, stack)", "call-arg"),
    ('MoeLayer(stack, stack, top_k=2, scorring="sigmoid")', "call-arg"),
    ("MoeLayer(stack, stack, top_k=2, num_groups=None)", "arg-type"),
    ("MoeLayer(stack, stack, top_k=2, shared_expert=layer)", "arg-type"),
    ("SharedExpert(layer, stack)", "arg-type"),
    ("layer(backend, stack, stack)", "arg-type"),
    ("layer.route(None, stack)", "arg-type"),
    ("layer.top_k.upper()", "attr-defined"),
    ("open_checkpoint(3)", "arg-type"),
    ('open_checkpoint("folder", backend=3)', "arg-type"),
    ('open_checkpoint("folder").moe_layer("0")', "arg-type"),
    ('load_model("folder").generate(3)', "arg-type"),
    ('load_model("folder").generate("a", temperatur=1.0)', "call-arg"),
    ('load_model("folder").generate("a", temperature="warm")', "arg-type"),
    ('load_model("folder").chat("Hello")', "arg-type"),
    ("get_backend(3)", "arg-type"),
    ('available_backends()["cpu"].upper()', "union-attr"),
    ("backend.empty(3, np.float32)", "arg-type"),
    ("moe_align_block_size(np.zeros((1, 1), np.int32), 8.5, 4)", "arg-type"),
    ("marlin_cy.no_such_name", "attr-defined"),
    ("from marlin_cy.opencl import no_such_name", "attr-defined"),
]


PROGRAMS = {
    "right": RIGHT,
    "wrong": RIGHT + "\n".join(line for line, _ in WRONG) + "\n",
    "revealed": "import marlin_cy\n\n" + "".join(f"reveal_type(marlin_cy.{name})\n" for name in marlin_cy.__all__),
}


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    """The messages of ``mypy --strict`` on the programs: ``{(program, line): [message]}``.

    Errors inside the package are not shown, as for an installed package.
    """
    folder = tmp_path_factory.mktemp("types")
    for name, program in PROGRAMS.items():
        (folder / f"{name}.py").write_text(program)
    options = ["--strict", "--follow-imports=silent", f"--cache-dir={os.devnull}", f"--config-file={os.devnull}"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *(f"{name}.py" for name in PROGRAMS)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        timeout=600,
    )
    assert done.returncode == 1, done.stdout + done.stderr  # 0: nothing was refused; 2: mypy did not run
    found = {}
    for name, line, message in re.findall(r"^(\w+)\.py:(\d+): (?:error|note): (.*)$", done.stdout, re.MULTILINE):
        found.setdefault((name, int(line)), []).append(message)
    return found


def test_right_program_passes(messages):
    assert {place: found for place, found in messages.items() if place[0] == "right"} == {}


@pytest.mark.parametrize(("line", "code"), WRONG, ids=[line for line, _ in WRONG])
def test_wrong_line_is_refused(messages, line, code):
    place = "wrong", PROGRAMS["wrong"].splitlines().index(line) + 1
    assert any(message.endswith(f"[{code}]") for message in messages.get(place, [])), messages.get(place)


@pytest.mark.parametrize("name", marlin_cy.__all__)
def test_no_public_name_is_any(messages, name):
    place = "revealed", PROGRAMS["revealed"].splitlines().index(f"reveal_type(marlin_cy.{name})") + 1
    (message,) = messages[place]
    assert message.startswith('Revealed type is "')
    assert message not in ('Revealed type is "Any"', 'Revealed type is "builtins.object"')
