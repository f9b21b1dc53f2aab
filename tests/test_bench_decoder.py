"""``python -m bench decoder``: runs in turns with stand-ins for llama.cpp, bars judged, pictures drawn."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # bench is not installed

from bench.__main__ import main as bench_main  # noqa: E402
from bench.common.processes import Child, module_command, module_environment  # noqa: E402
from bench.models import decoder_cases, start_up  # noqa: E402
from bench.models.decoder_cases import Measurement, Settings  # noqa: E402
from bench.models.decoder_worker import DecoderWorker  # noqa: E402
from bench.models.head import HeadStep, write_head  # noqa: E402
from bench.models.llama import LlamaBatchedBench, LlamaBench  # noqa: E402
from bench.models.synthetic import QWEN3_30B_A3B, TINY, num_weights, write_qwen3_moe  # noqa: E402
from bench.models.synthetic_gguf import BLOCKS, has_more_bits, random_blocks, write_qwen3_moe_gguf  # noqa: E402
from bench.report import decoder_bars, decoder_pictures, pictures  # noqa: E402
from marlin_cy import open_checkpoint  # noqa: E402
from marlin_cy.decoder.load import load_model  # noqa: E402
from marlin_cy.decoder.model import Model  # noqa: E402
from marlin_cy.decoder.text import Tokenizer  # noqa: E402

SPREAD = {"median", "p10", "p90"}
LINES = {"1", "2", "3", "4a", "4b", "5", "6", "7a", "7b", "8", "9a", "9b", "9c", "10a", "10b"}

STAND_IN = f"""#!{sys.executable}
import json, os, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(os.environ["STAND_IN_CALLS"], "a") as file:
    print(json.dumps(options), file=file)
if options["-m"] == "damaged.gguf":
    print("cannot load the model", file=sys.stderr)
    sys.exit(1)
if "-npl" in options:
    print("a line of the log")
    print(json.dumps({{"t_pp": 1.0, "t_tg": 0.5}}))
else:
    seconds = (int(options["-p"]) + int(options["-n"])) * (2 if options["-fa"] == "1" else 3)
    print(json.dumps([{{"avg_ns": seconds * 10**9, "build_commit": "abc", "build_number": 7, "model_type": "tiny",
                       "model_n_params": int(os.environ["STAND_IN_WEIGHTS"])}}]))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A program that answers as llama-bench and llama-batched-bench do; gives its path and a reader of its calls."""
    program, calls = tmp_path / "llama-stand-in", tmp_path / "calls"
    program.write_text(STAND_IN)
    program.chmod(0o755)
    calls.touch()
    monkeypatch.setenv("STAND_IN_CALLS", str(calls))
    weights = num_weights({**TINY, "num_hidden_layers": 2, "vocab_size": 1024})
    monkeypatch.setenv("STAND_IN_WEIGHTS", str(int(1.001 * weights)))
    return program, lambda: [json.loads(line) for line in calls.read_text().splitlines()]


def bench(*arguments, timeout=300):
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


# ---------------------------------------------------------------------------------------------
# The command


@pytest.mark.sweep
def test_every_part_is_measured(tmp_path, stand_in):
    program, calls = stand_in
    output = tmp_path / "result.json"
    llama = ["--llama-bench", program, "--llama-batched-bench", program, "--gguf", "tiny.gguf"]
    done = bench("decoder", "--quick", "--no-torch", "--threads", 1, *llama, "--json", output)
    assert done.returncode == 0, done.stderr
    document = json.loads(output.read_text())
    assert document["mode"] == "decoder"
    assert document["machine"]["threads"] == 1
    assert document["model"]["layers"] == 2
    assert document["sides"]["llama.cpp"] == "abc (7)"
    cases = {(case["part"], case["depth"], case["sequences"], case["tokens"]): case for case in document["cases"]}
    assert set(cases) == {("decode", 0, 1, 2), ("decode", 20, 1, 2), ("prefill", 0, 1, 24), ("decode", 16, 2, 2)}
    for key, case in cases.items():
        assert {"int16", "int8", "llama.cpp"} <= case["tokens_per_second"].keys() == case["us_a_layer"].keys()
        assert ("kernels, int16" in case["us_a_layer"]) == (key == ("decode", 0, 1, 2))
        assert case["skipped"] == {"transformers": "left out"}
        for figures in (case["tokens_per_second"], case["us_a_layer"], *case["ratio"].values()):
            for spread in figures.values():
                assert spread.keys() == SPREAD
                assert 0 < spread["p10"] <= spread["median"] <= spread["p90"]
    assert "kernels, int8" not in cases["decode", 0, 1, 2]["ratio"]["int16"]
    # The stand-in takes 2 s a token with flash attention, 3 s without; the faster one is llama.cpp's figure.
    assert cases["prefill", 0, 1, 24]["llama_options"] == "-fa 1"
    assert cases["prefill", 0, 1, 24]["tokens_per_second"]["llama.cpp"]["median"] == pytest.approx(0.5)
    assert cases["decode", 16, 2, 2]["tokens_per_second"]["llama.cpp"]["median"] == pytest.approx(2 * 2 / 0.5)
    lines = {line["line"]: line for line in document["show"]}
    assert set(lines) == LINES
    assert lines["1"]["measured"]["median"] > 0
    for number in ("1", "3", "7a", "8", "9a", "9b", "10a", "10b"):
        assert lines[number]["measured"]["median"] > 0, number
        assert lines[number]["what"] in done.stdout
    for number in ("2", "4a", "5", "6"):
        assert lines[number]["skipped"] == "not measured", "no such case with --quick"
    made = calls()
    assert len([call for call in made if "-npl" in call]) == 2, "a round that counts and one before"
    assert {(call["-p"], call["-n"], call["-d"]) for call in made if "-fa" in call} == {
        ("0", "2", "0"),
        ("0", "2", "20"),
        ("24", "0", "0"),
    }
    assert {call["-t"] for call in made} == {"1"}


def test_a_part_alone_without_llama(tmp_path):
    output, folder = tmp_path / "result.json", tmp_path / "model"
    options = ["--quick", "--no-torch", "--threads", 1, "--compute-dtypes", "int8", "--output", output]
    for _ in range(2):  # the second run finds the checkpoint
        done = bench("decoder", *options, "--only", "prefill", "--folder", folder)
        assert done.returncode == 0, done.stderr
    document = json.loads(output.read_text())
    (case,) = document["cases"]
    assert case["skipped"] == {"llama.cpp": "no --llama-bench", "transformers": "left out"}
    assert set(case["tokens_per_second"]) == {"int8"}
    assert document["figures"] == {}
    lines = {line["line"]: line for line in document["show"]}
    assert all(line["measured"] is None for line in lines.values())
    assert "no --llama-bench" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--llama-bench", "/bin/true"], "--llama-bench: needs --gguf"),
        (["--llama-batched-bench", "/bin/true"], "--llama-batched-bench: needs --gguf"),
        (["--only", "nap"], "--only: got nap, expected some of decode, prefill"),
        (["--depths", "-1"], "--depths: got -1, expected at least 0"),
        (["--prompts", "0"], "--prompts: got 0, expected at least 1"),
        (["--compute-dtypes", "int4"], "--compute-dtypes: got int4"),
    ],
)
def test_wrong_options_are_refused(capsys, arguments, message):
    with contextlib.suppress(SystemExit):
        assert bench_main(["decoder", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_with_too_short_a_context_is_refused(tmp_path):
    write_qwen3_moe(tmp_path / "model", 1, TINY, max_position_embeddings=30)
    options = ["--quick", "--no-torch", "--only", "decode", "--depths", "29", "--threads", 1]
    done = bench("decoder", *options, "--folder", tmp_path / "model")
    assert done.returncode == 2
    assert "--folder: the model has a context of 30 tokens, but a run needs 31" in done.stderr


# ---------------------------------------------------------------------------------------------
# The sides


def settings(tmp_path, **changes):
    values = {
        "folder": tmp_path / "model",
        "num_weights": num_weights({**TINY, "num_hidden_layers": 2, "vocab_size": 1024}),
        "threads": 1,
        "rounds": 2,
        "pause_seconds": 0.0,
        "compute_dtypes": ("int16",),
        "tokens": 4,
        "depths": (0,),
        "prompts": (16,),
        "sequences": (),
        "head": (64, 128),
        "quick": True,
    }
    return Settings(**{**values, **changes})


class FakeChild:
    """A side that takes a second a token, twice as long for its products alone."""

    def __init__(self):
        self.requests = []

    def ask(self, request):
        self.requests.append(dict(request))
        return {"seconds": float(request["tokens"]) * (2 if request["do"] == "kernels" else 1)}


def measured(tmp_path, llama=None, **changes):
    child = FakeChild()
    found = Measurement(settings(tmp_path, **changes), child, None, llama, None, {"transformers": "left out"}, layers=2)
    return found, child


def test_sides_take_turns(tmp_path, stand_in):
    program, _ = stand_in
    measurement, child = measured(tmp_path, LlamaBench(program, Path("tiny.gguf"), 1))
    measurement.decode()
    assert [request["do"] for request in child.requests] == [
        "decode",
        "kernels",
        "kernels",
        "decode",
        "decode",
        "kernels",
    ]
    (case,) = measurement.cases
    assert case["tokens_per_second"]["int16"]["median"] == 1.0
    assert case["us_a_layer"]["int16"]["median"] == 0.5e6
    ratios = {name: ratio["median"] for name, ratio in case["ratio"]["int16"].items()}
    assert ratios == {"kernels, int16": 2, "llama.cpp, -fa 0": 3, "llama.cpp, -fa 1": 2, "llama.cpp": 2}


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ("damaged.gguf", None, "ended with 1: cannot load the model"),
        ("tiny.gguf", 10**6, "the file has 0.87 times the weights of the checkpoint"),
    ],
)
def test_a_side_that_fails_is_skipped_with_the_reason(tmp_path, stand_in, monkeypatch, model, weights, message):
    if weights is not None:
        monkeypatch.setenv("STAND_IN_WEIGHTS", str(weights))
    program, calls = stand_in
    measurement, _ = measured(tmp_path, LlamaBench(program, Path(model), 1))
    measurement.prefill()
    (case,) = measurement.cases
    assert set(case["tokens_per_second"]) == {"int16"}
    assert message in case["skipped"]["llama.cpp, -fa 0"]
    assert len(calls()) == 2, "each side is tried once"
    document = {"cases": measurement.cases, "figures": {}, "machine": {"threads": 2}}
    document["cases"][0]["tokens"] = 512
    line = next(line for line in decoder_bars.judge(document) if line["line"] == "4b")
    assert message in line["skipped"]


def test_programs_that_do_not_start_or_answer_otherwise(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        LlamaBench(tmp_path / "absent", Path("m"), 1).seconds("decode", 1, 0, False)
    with pytest.raises(ValueError, match="unexpected output"):
        LlamaBench(Path("/bin/echo"), Path("m"), 1).seconds("decode", 1, 0, False)
    with pytest.raises(ValueError, match="unexpected output"):
        LlamaBatchedBench(Path("/bin/echo"), Path("m"), 1).seconds(2, 1, 16)


def test_batched_bench_gets_room_for_its_sequences(stand_in):
    program, calls = stand_in
    assert LlamaBatchedBench(program, Path("tiny.gguf"), 3).seconds(16, 64, 16) == 0.5
    (call,) = calls()
    assert (call["-c"], call["-npp"], call["-ntg"], call["-npl"]) == (str(16 * 256), "16", "64", "16")


def test_worker_runs_what_is_asked(monkeypatch):
    worker = DecoderWorker()
    loaded = worker.load(None, ["int16", "int8"], 1, 600)
    assert (loaded["layers"], loaded["context_length"]) == (4, 1024)
    calls, forward = [], Model.forward_batch

    def record(model, pairs, **options):
        calls.append([(sequence.length, len(tokens)) for sequence, tokens in pairs])
        return forward(model, pairs, **options)

    monkeypatch.setattr(Model, "forward_batch", record)
    assert worker.decode("int16", 0, 1, 3)["seconds"] > 0
    assert calls == [[(0, 1)], [(1, 1)], [(2, 1)]]
    calls.clear()
    for _ in range(2):
        assert worker.prefill("int8", 40, 2, 5)["seconds"] > 0
    assert calls == [[(0, 40), (0, 40)], [(40, 5), (40, 5)], [(40, 5), (40, 5)]], "filled once"
    calls.clear()
    for dtype in ("int8", "int16"):
        assert worker.decode(dtype, 7, 3, 1)["seconds"] > 0
    assert calls == [[(0, 7)] * 3, [(7, 1)] * 3] * 2
    assert worker.kernels("int16", 2)["seconds"] > 0
    assert {model.free_tokens for model in worker._models.values()} == {608 - 3 * 16}, "runs free their sequences"


def test_a_request_that_fails_is_an_error():
    child = Child("marlin_cy", module_command("bench.models.decoder_worker"), module_environment())
    try:
        with pytest.raises(ValueError, match="marlin_cy: CheckpointError"):
            child.ask({"do": "load", "folder": "/nonexistent", "compute_dtypes": [], "threads": 1, "cache_tokens": 1})
        assert child.ask({"do": "read", "threads": 1, "quick": True})["bytes_per_second"] > 1e8
    finally:
        child.close()


@pytest.mark.sweep
def test_transformers_runs_what_is_asked(tmp_path):
    pytest.importorskip("transformers")
    write_qwen3_moe(tmp_path, 1, TINY)
    child = decoder_cases.start_transformers(tmp_path, 1)
    try:
        for do in ("decode", "prefill"):
            for depth in (0, 9, 9):
                assert child.ask({"do": do, "depth": depth, "sequences": 2, "tokens": 3})["seconds"] > 0
    finally:
        child.close()


def test_the_head_is_the_matrix_in_the_file(tmp_path):
    write_head(tmp_path / "head", 1500, 128)
    matrix = np.fromfile(tmp_path / "head", np.uint16).reshape(1500, 128)
    assert np.isfinite(matrix.view(ml_dtypes.bfloat16).astype(np.float32)).all()
    assert np.array_equal(matrix[:476], matrix[1024:])
    step = HeadStep(tmp_path / "head", 1500, 128, 1, "generic")
    assert step.seconds() > 0
    assert step._program.step(step._batch).shape == (1, 1500)


@pytest.mark.sweep
def test_a_command_that_fails_before_its_first_token(tmp_path):
    with pytest.raises(ValueError, match="marlin-cy generate: ended with"):
        start_up.first_token_seconds(tmp_path / "absent", 1)
    with pytest.raises(ValueError, match="marlin-cy bench: ended with"):
        start_up.memory_share(tmp_path / "absent", 1, 8)
    with pytest.raises(ValueError, match="marlin-cy pack: ended with"):
        decoder_cases.pack(tmp_path / "absent", tmp_path / "packed")


# ---------------------------------------------------------------------------------------------
# Models


def test_a_longer_context(tmp_path):
    write_qwen3_moe(tmp_path, 1, TINY, max_position_embeddings=9000)
    assert load_model(tmp_path, cache_tokens=16, num_threads=1).context_length == 9000


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_gguf(kind):
    gguf = pytest.importorskip("gguf")
    blocks = random_blocks(np.random.default_rng(0), kind, 6, 40, 256)
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert (BLOCKS[kind].weights, BLOCKS[kind].nbytes) == (block, nbytes)
    assert (blocks.dtype, blocks.shape) == (np.uint8, (6, 40, 256 // block * nbytes))
    values = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert 0.8 < values.std() * 16 < 1.25, "rows of about norm 1"
    assert abs(values.mean()) < 0.2 * values.std()


def test_half_of_the_layers_have_more_bits():
    assert [layer for layer in range(8) if has_more_bits(layer, 8)] == [0, 3, 6, 7]
    assert sum(has_more_bits(layer, 48) for layer in range(48)) == 24


def test_a_gguf_file_of_mixed_types(tmp_path):
    """The decoder and the tokenizer take it."""
    pytest.importorskip("gguf")

    path = tmp_path / "model.gguf"
    write_qwen3_moe_gguf(path, 8, {**TINY, "hidden_size": 256}, types="Q4_K_M")
    with open_checkpoint(path) as checkpoint:
        types = {checkpoint.tensor_info(name).dtype for name in checkpoint.tensor_names}
    assert types == {"Q4_K", "Q6_K", "Q5_0", "Q8_0", "F32"}
    tokens = Tokenizer(path).encode("def <300>")
    assert len(tokens) == 8
    assert np.isfinite(load_model(path, num_threads=1, cache_tokens=64, context_length=64).forward(tokens)).all()


def test_a_gguf_file_has_the_weights_of_the_checkpoint(tmp_path):
    gguf = pytest.importorskip("gguf")
    write_qwen3_moe_gguf(tmp_path / "model.gguf", 2, TINY)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    weights = sum(int(tensor.n_elements) for tensor in tensors.values())
    share = weights / num_weights({**TINY, "num_hidden_layers": 2, "vocab_size": 1024})
    assert decoder_cases.LEAST_WEIGHTS < share < decoder_cases.MOST_WEIGHTS
    experts = tensors["blk.1.ffn_down_exps.weight"]
    assert experts.tensor_type == gguf.GGMLQuantizationType.Q4_0
    assert list(experts.shape) == [TINY["moe_intermediate_size"], TINY["hidden_size"], TINY["num_experts"]]
    dense = gguf.dequantize(experts.data, experts.tensor_type)
    assert 0.5 < np.linalg.norm(dense) / np.sqrt(TINY["num_experts"] * TINY["hidden_size"]) < 2, "rows of about norm 1"


# ---------------------------------------------------------------------------------------------
# Bars and pictures


def spread(median):
    return {"median": median, "p10": 0.9 * median, "p90": 1.1 * median}


def made_up_case(part, tokens, depth=0, sequences=1):
    """A case whose ratios are 2 to llama.cpp, 20 to transformers, 0.9 to the products alone."""
    others = {"llama.cpp": 2.0, "transformers": 20.0}
    if part == "decode" and sequences == 1 and depth == 0:
        others |= {"kernels, int16": 0.9}
    rates = {"int16": 60.0, "int8": 80.0, **{name: 60.0 / ratio for name, ratio in others.items()}}
    return {
        "part": part,
        "tokens": tokens,
        "depth": depth,
        "sequences": sequences,
        "skipped": {},
        "tokens_per_second": {name: spread(rate * sequences) for name, rate in rates.items()},
        "us_a_layer": {name: spread(1e6 / rate) for name, rate in rates.items()},
        "ratio": {dtype: {name: spread(ratio) for name, ratio in others.items()} for dtype in ("int16", "int8")},
    }


def made_up(threads=2):
    return {
        "mode": "decoder",
        "date": "2000-01-01",
        "machine": {"cpu": "a CPU", "threads": threads, "isa": "avx2", "load_average": 0.0},
        "model": {"layers": 8, **QWEN3_30B_A3B},
        "sides": {"marlin_cy": "0", "llama.cpp": "1", "transformers": None},
        "cases": [
            *(made_up_case("decode", 64, depth) for depth in (0, 4096)),
            *(made_up_case("prefill", tokens) for tokens in (512, 4096)),
            *(made_up_case("decode", 64, 16, sequences) for sequences in (4, 16)),
        ],
        "figures": {
            "head": spread(0.9),
            "head, avx2": "no AVX2 here",
            "built-in decode, tokens/s": spread(1999.0),
            "start, packed": spread(1.5),
        },
    }


def test_bars_of_few_and_of_many_cores():
    few, many = ({line["line"]: line for line in decoder_bars.judge(made_up(threads))} for threads in (2, 16))
    assert set(few) == set(many) == LINES
    passed = {number: line["passed"] for number, line in few.items()}
    assert passed == {
        **dict.fromkeys(("1", "2", "3", "5", "6", "7a", "9b"), True),
        **dict.fromkeys(("4a", "4b", "8"), False),
        **dict.fromkeys(("7b", "9a", "9c", "10a", "10b")),
    }
    assert few["7b"]["skipped"] == "no AVX2 here"
    assert few["9a"]["skipped"] == "not measured"
    assert few["3"]["measured"]["median"] == pytest.approx(1 / 0.9)
    assert few["3"]["measured"]["p10"] < few["3"]["measured"]["median"] < few["3"]["measured"]["p90"]
    assert {number: many[number]["bar"] for number in ("1", "2", "3", "4a", "4b", "5", "6")} == {
        "1": 1.4,
        "2": None,
        "3": 1.2,
        "4a": 12.0,
        "4b": None,
        "5": None,
        "6": 3.0,
    }
    assert many["2"]["passed"] is None
    assert many["2"]["measured"]["median"] == 2.0


def test_pictures_are_files(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    document = made_up()
    del document["cases"][0]["tokens_per_second"]["transformers"]
    paths = decoder_pictures.draw(document, tmp_path / "pictures")
    expected = {f"{name}.{kind}" for name in decoder_pictures.PICTURES for kind in ("png", "svg")}
    assert {path.name for path in paths} == expected
    for path in paths:
        if path.suffix == ".png":
            pixels = np.asarray(Image.open(path).convert("RGBA"))
            assert (pixels[0, 0, 3], pixels[40, 40, 3]) == (0, 255), "a card on a transparent page"
            assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 50


def test_pictures_of_a_saved_document(tmp_path):
    pytest.importorskip("matplotlib")
    document = made_up()
    document["cases"] = document["cases"][:2]
    file = tmp_path / "saved.json"
    file.write_text(json.dumps(document))
    done = bench("pictures", file, "--into", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {Path(line).name for line in done.stdout.split()} == {"decoder-depth.png", "decoder-depth.svg"}
    document["cases"] = []
    with pytest.raises(ValueError, match="no runs"):
        decoder_pictures.draw(document, tmp_path)
    assert set(decoder_pictures.PICTURES).isdisjoint(pictures.PICTURES)
