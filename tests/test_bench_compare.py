"""``python -m bench``: peers that run here are compared, bars judged, pictures drawn, costs predicted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # bench is not installed

from bench import peers  # noqa: E402
from bench.common.shapes import MODELS, TINY, ModelShape, quantised_normal_weight  # noqa: E402
from bench.common.timing import median_interval  # noqa: E402
from bench.cpu import cost_model as cost  # noqa: E402
from bench.peers import PEERS, WrongResult, bound, check, check_moe, check_routed, compare, pair  # noqa: E402
from bench.peers.numpy_dense import NumpyDense  # noqa: E402
from bench.peers.ours import OURS  # noqa: E402
from bench.peers.settings import PARTS, PairSettings  # noqa: E402
from bench.peers.stand_ins import CallPerExpert  # noqa: E402
from bench.report import bars, pictures, tables  # noqa: E402
from marlin_cy.commands.output import console  # noqa: E402
from marlin_cy.errors import UnsupportedError  # noqa: E402

SPREAD = {"median", "p10", "p90"}


def bench(*arguments, environment=None):
    return subprocess.run(
        [sys.executable, "-m", "bench", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        timeout=120,
    )


# ---------------------------------------------------------------------------------------------
# The comparison


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The document and the output of one quick run with NumPy and a peer that cannot run."""
    output = tmp_path_factory.mktemp("bench") / "result.json"
    done = bench(
        "--quick",
        "--show",
        "--peers=numpy_dense,ggml_q4_0",
        "--threads=1",
        "--output",
        output,
        environment={"GGML_LIBRARY_DIR": str(output.parent)},
    )
    assert done.returncode == 0, done.stderr
    return output, done.stdout


@pytest.mark.sweep
def test_every_case_has_the_times_of_ours_and_the_peer(compared):
    document = json.loads(compared[0].read_text())
    cases = document["cases"]
    assert sorted((case["part"], case["m"]) for case in cases) == sorted((part, m) for part in PARTS for m in (1, 16))
    for case in cases:
        assert case["peer"] == "numpy_dense"
        assert case["us"].keys() == {"int16", "int8", "numpy_dense"}
        assert case["ratio"].keys() == {"int16", "int8"}
        for spread in (*case["us"].values(), *case["ratio"].values()):
            assert spread.keys() == SPREAD
            assert 0 < spread["p10"] <= spread["median"] <= spread["p90"]
        k, n = TINY.projections["gate_up"]
        products = k * n + (TINY.intermediate * TINY.hidden if case["part"] == "layer" else 0)
        assert case["flop"] == 2 * products * case["m"] * (1 if case["part"] == "projection" else TINY.top_k)
    weights = {(case["part"], case["m"]): case["weight_bytes"] for case in cases}
    assert weights["routed", 1] == TINY.top_k * weights["projection", 1]


def test_what_a_document_says_of_machine_and_sides(compared):
    document = json.loads(compared[0].read_text())
    assert (document["schema"], document["mode"]) == (compare.SCHEMA_VERSION, "compare")
    assert document["machine"]["threads"] == 1
    assert document["machine"]["cpu"]
    measured = document["pairs"]["numpy_dense projection"]
    assert measured["read_bytes_per_second"] > 1e8
    assert measured["pause_check"].keys() == {"right_after", "after_pause"}
    sides = document["sides"]
    assert sides.keys() == {"int16", "int8", "numpy_dense", "ggml_q4_0"}
    for name in ("int16", "int8", "numpy_dense"):
        assert sides[name]["version"]
        assert sides[name]["skipped"] == {}
        for part, error in sides[name]["errors"].items():
            assert error < 3 * bound(sides[name]["accuracy"], TINY.hidden), (name, part)
    assert sides["numpy_dense"]["fused"] == {"projection": True, "routed": False, "layer": False}
    assert sides["int8"]["fused"] == dict.fromkeys(PARTS, True)


def test_a_peer_that_cannot_run_says_why(compared):
    output, printed = compared
    skipped = json.loads(output.read_text())["sides"]["ggml_q4_0"]["skipped"]
    assert skipped.keys() == set(PARTS)
    assert len(set(skipped.values())) == 1
    assert f"ggml_q4_0: {skipped['layer']}" in printed


def test_saved_tables_are_those_that_were_printed(compared):
    output, printed = compared
    again = bench("tables", "--show", output)
    assert again.returncode == 0, again.stderr
    assert len(again.stdout) > 1000
    assert again.stdout in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "nobody"], "got nobody, expected some of numpy_dense"),
        (["--rows", "0"], "got 0, expected at least 1"),
        (["--parts", "head"], "got head"),
        (["--isa", "mmx", "--quick"], "isa: got 'mmx'"),
        (["--threads", "100000"], "--threads: got 100000"),
        (["tables", "/nonexistent"], "/nonexistent"),
        (["pictures", str(ROOT / "pyproject.toml")], "pyproject.toml"),
    ],
)
@pytest.mark.sampled(3)
def test_wrong_options_are_refused(arguments, message):
    done = bench(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_too_little_memory_is_a_reason(compared, tmp_path):
    output = tmp_path / "result.json"
    done = bench("--quick", "--peers=numpy_dense", "--memory=0.00001", "--output", output)
    assert done.returncode == 0, done.stderr
    assert "--memory" in json.loads(output.read_text())["sides"]["numpy_dense"]["skipped"]["layer"]


def test_a_process_that_ends_otherwise_is_a_reason(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    context = OURS[0](1)._context
    timing = {"repeats": 1, "min_seconds": 1e-3, "pause_seconds": 0.0, "case_seconds": 1.0, "quick": True}
    found = compare._pair("numpy_dense", TINY, {}, context, 10**9, timing, {})
    assert found["sides"]["numpy_dense"]["skipped"]["routed"].startswith("ended with 1")


class Refuses(NumpyDense):
    """A peer that has no products by expert, computes wrong layers, and refuses products of more than 8 rows."""

    name, most_weights, extra_threads = "refuses", 8, 1000
    loads = 0

    def load(self, weight):
        self.loads += 1
        loaded = super().load(weight)
        prepare = loaded.prepare

        def few(x):
            if len(x) == 16:
                raise UnsupportedError("x: got 16 rows")
            return prepare(x)

        loaded.prepare = few
        return loaded

    def available_moe(self):
        return None

    def load_moe(self, gate_up, down):
        raise MemoryError("no room")


def test_what_a_peer_cannot_do_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(peers, "PEERS", (*PEERS, Refuses))
    settings = PairSettings("refuses", TINY, dict.fromkeys(PARTS, [1, 16]), 16, 2, "generic", 1, 1e-3, 0.0, 1.0, True)
    assert PairSettings.from_json(settings.to_json()) == settings
    measured = pair._Pair(settings)
    found = measured.measure()
    assert measured.peers["refuses"].loads == 8, "experts share a peer's weights where it asks for few"
    assert (found["sides"]["int8"]["threads"], found["sides"]["refuses"]["threads"]) == (2, 1)
    assert found["sides"]["refuses"]["skipped"] == {"projection 16": "x: got 16 rows", "layer": "MemoryError: no room"}
    assert {(case["part"], case["m"]) for case in found["cases"]} == {("projection", 1), ("routed", 1), ("routed", 16)}
    assert found["peak_ops_per_second"] is None, "generic has none"


def test_isa_reaches_the_peers(monkeypatch):
    monkeypatch.setenv("GGML_LIBRARY_DIR_AVX2", "/some/folder")
    environment = compare.isa_environment("avx2")
    assert environment["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert environment["GGML_LIBRARY_DIR"] == "/some/folder"
    assert compare.isa_environment(None) == {}


@pytest.mark.parametrize("ours", OURS, ids=lambda side: side.name)
def test_ours_are_as_accurate_as_they_say(rng, ours):
    peer = ours(num_threads=1)
    gate_up, down = (
        [quantised_normal_weight(rng, k, n, TINY.group_size, 0.02)[0] for _ in range(5)]
        for k, n in TINY.projections.values()
    )
    assert check(peer, gate_up[0], rng) > bound("float32", TINY.hidden)
    check_routed(peer, gate_up, 3, rng, peer.load_routed(gate_up))
    check_moe(peer, gate_up, down, 3, rng)


def test_check_routed_refuses_wrong_experts(rng):
    peer = OURS[0](num_threads=1)
    weights = [quantised_normal_weight(rng, 64, 32, 32)[0] for _ in range(5)]
    check_routed(peer, weights, 3, rng, peer.load_routed(weights))
    with pytest.raises(WrongResult, match="relative error"):
        check_routed(peer, weights, 3, rng, peer.load_routed(weights[::-1]))


def test_one_call_an_expert_gives_what_a_routed_product_gives(rng):
    peer = OURS[0](num_threads=1)
    weights = [quantised_normal_weight(rng, 64, 32, 32)[0] for _ in range(5)]
    check_routed(peer, weights, 3, rng, CallPerExpert(peer.load_all(weights)))


# ---------------------------------------------------------------------------------------------
# Bars


def spread(median):
    return {"median": median, "p10": 0.9 * median, "p90": 1.1 * median}


def made_up(ratios):
    """A document of ``{(part, m, peer): (ratio to int16, ratio to int8)}``; ours takes a microsecond a row."""
    accuracies = {"int16": "int16", "int8": "int8", "eight": "int8", "half": "bf16", "full": "float32"}
    return {
        "mode": "compare",
        "date": "2000-01-01",
        "machine": {"cpu": "a CPU", "threads": 2, "isa": "avx2", "load_average": 0.0, "limited_to": {}},
        "model": {"name": "made up", "num_experts": 8, "top_k": 2, "hidden": 64, "intermediate": 32, "group_size": 32},
        "sides": {
            name: {"library": f"lib{name}", "version": "1", "accuracy": accuracy}
            | {"errors": dict.fromkeys(PARTS, 1e-3), "fused": {}, "skipped": {}}
            for name, accuracy in accuracies.items()
        },
        "cases": [
            {
                "part": part,
                "m": m,
                "peer": peer,
                "flop": 1e6 * m,
                "weight_bytes": 5e5,
                "us": {"int16": spread(m), "int8": spread(m / 2), peer: spread(m * to_int16)},
                "ratio": {"int16": spread(to_int16), "int8": spread(to_int8)},
            }
            for (part, m, peer), (to_int16, to_int8) in ratios.items()
        ],
        "pairs": {"eight": {"read_bytes_per_second": 3e10, "peak_ops_per_second": 9e11}},
    }


def test_a_bar_is_held_against_the_fastest_peer_as_accurate():
    document = made_up(
        {
            ("projection", 1, "eight"): (1.05, 1.2),
            ("projection", 1, "half"): (1.5, 1.7),
            ("projection", 1, "full"): (1.4, 1.6),
        }
    )
    for name in ("int8", "int16"):
        assert not {"int8", "int16"} & set(bars.rivals(document, name, "projection"))
    assert bars.rivals(document, "int16", "projection") == ["half", "full"]
    assert bars.rivals(document, "int8", "projection") == ["eight", "half", "full"]
    document["sides"]["eight"]["errors"]["projection"] = 2.5e-3
    assert bars.rivals(document, "int8", "projection") == ["half", "full"], "weights rounded once more"
    document["sides"]["eight"]["errors"]["projection"] = 1.5e-3
    by_ours = {
        judged["ours"]: judged
        for judged in bars.judge(document)
        if (judged["part"], judged["first"]) == ("projection", 1)
    }
    assert (by_ours["int16"]["peer"], by_ours["int16"]["measured"]["median"]) == ("full", 1.4)
    assert (by_ours["int8"]["peer"], by_ours["int8"]["measured"]["median"]) == ("eight", 1.2)
    assert by_ours["int16"]["passed"] is by_ours["int8"]["passed"] is True


def test_the_fastest_peer_is_the_one_with_the_shortest_time():
    document = made_up({("layer", 4, "half"): (2.0, 3.0), ("layer", 4, "full"): (3.0, 4.0)})
    document["cases"][1]["ratio"]["int16"] = spread(0.5)  # our side was disturbed at the same time
    assert bars.fastest(document, "layer", "int16", 4) == ("half", spread(2.0))
    assert bars.fastest(document, "layer", "int16", 1) is None


def test_a_bar_over_several_cases_is_as_good_as_the_worst():
    document = made_up(
        {("routed", m, "half"): (ratio, ratio) for m, ratio in ((1, 3.0), (4, 1.05), (8, 2.0), (9, 0.1))}
    )
    (judged,) = bars.judge(document, [bars.Bar("routed", "int16", 1, 8, 1.1)])
    assert (judged["m"], judged["measured"]["median"], judged["passed"]) == (4, 1.05, False)


def test_bars_without_peers_are_neither_met_nor_missed():
    document = made_up({("layer", 1, "eight"): (9.0, 9.0)})
    judged = bars.judge(document)
    assert len(judged) == len(bars.BARS) == 18
    for one in judged:
        measured = (one["part"], one["ours"], one["first"]) == ("layer", "int8", 1)
        assert (one["measured"] is not None) == measured
        assert one["passed"] is (True if measured else None)
    assert bars.bars_table(judged).row_count == 18
    assert bars.judge(made_up({}))[0]["measured"] is None


def test_the_interval_of_a_median_holds_it_as_often_as_it_says(rng):
    drawn = rng.standard_exponential((2000, 21))
    held = [low <= np.log(2) <= high for low, high in map(median_interval, drawn)]
    assert 0.93 < np.mean(held) < 0.99
    assert median_interval([3.0]) == (3.0, 3.0)
    assert median_interval([2.0, 1.0, 3.0]) == (1.0, 3.0)


def test_every_bar_is_about_cases_that_are_measured_unless_told_otherwise():
    for bar in bars.BARS:
        cases = compare.ROWS if bar.part == "projection" else compare.TOKENS
        assert any(bar.first <= m <= bar.last for m in cases), bar


# ---------------------------------------------------------------------------------------------
# Pictures


def test_pictures_are_files(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    document = made_up(
        {(part, m, peer): (2.0, 3.0) for part in PARTS for m in (1, 16, 256) for peer in ("eight", "half", "full")}
    )
    paths = pictures.draw(document, tmp_path / "pictures")
    assert {path.name for path in paths} == {f"{name}.{kind}" for name in pictures.PICTURES for kind in ("png", "svg")}
    for path in paths:
        if path.suffix == ".svg":
            assert path.stat().st_size < 200_000
            assert "a CPU" not in path.name
            continue
        pixels = np.asarray(Image.open(path).convert("RGBA"))
        assert pixels.shape[1] > 1000
        assert (pixels[0, 0, 3], pixels[40, 40, 3]) == (0, 255), "a card on a transparent page"
        assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 50


def test_pictures_of_a_part_are_those_that_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    document = made_up({("layer", m, "half"): (2.0, 3.0) for m in (1, 16)})
    document["pairs"] = {}
    assert {path.stem for path in pictures.draw(document, tmp_path)} == {"layer", "speedup"}
    with pytest.raises(ValueError, match="no cases"):
        pictures.draw(made_up({}), tmp_path)


def test_pictures_are_drawn_from_a_saved_document(compared, tmp_path):
    pytest.importorskip("matplotlib")
    done = bench("pictures", compared[0], "--into", tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.iterdir()) == sorted(Path(line) for line in done.stdout.split())


def test_tables_tell_what_could_not_be_held_to_an_isa_or_was_disturbed(capsys):
    document = made_up({("projection", 1, "half"): (2.0, 3.0)})
    document["sides"]["half"]["library"] = "onnxruntime"
    document["machine"]["limited_to"] = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    document["pairs"] = {"half": {"pause_check": {"right_after": 9.0, "after_pause": 1.5}}}
    tables.print_document(document, console(), show=False)
    printed = capsys.readouterr().out
    assert "half: cannot be limited to an instruction set" in printed
    assert "half: after a call of the peer and the pause, this library takes 1.50 times as long" in printed


def test_documents_of_another_kind_are_refused(tmp_path):
    other = tmp_path / "other.json"
    other.write_text('{"mode": "sweep"}')
    with pytest.raises(ValueError, match="expected a file that python -m bench compare saved"):
        tables.read_document(other)


# ---------------------------------------------------------------------------------------------
# Costs


def machine(**more):
    kernel = {1: 1.0, 8: 2.0, 48: 8.0}
    return cost.Machine(
        **{"threads": 1, "compute_dtype": "int8", "read": 2.0, "start": 0.5, "kernel": kernel}
        | {"prepare": 0.0, "finish": 0.0, "overlap": {1: 16.0}}
        | more
    )


def test_rows_are_cut_into_blocks_as_the_library_cuts_them():
    assert machine().expert(1) == 1.0
    assert machine().expert(28) == pytest.approx(5.0)
    assert machine().expert(56) == pytest.approx(machine().block(24) + machine().block(32))
    assert machine().expert(96) == pytest.approx(2 * 8.0)


def test_experts_hit():
    model = MODELS["qwen3"]
    assert cost.experts_hit(model, 1) == pytest.approx(8)
    assert cost.experts_hit(model, 10**6) == pytest.approx(128)
    rng = np.random.default_rng(0)
    drawn = [len(np.unique(np.argsort(rng.random((16, 128)), axis=1)[:, :8])) for _ in range(200)]
    assert cost.experts_hit(model, 16) == pytest.approx(np.mean(drawn), rel=0.02)
    for tokens in (1, 16, 300):
        chances = cost.rows_of_an_expert(model, tokens)
        assert sum(chances.values()) == pytest.approx(1)
        assert sum(rows * chance for rows, chance in chances.items()) == pytest.approx(tokens * 8 / 128)
        assert 128 * (1 - chances[0]) == pytest.approx(cost.experts_hit(model, tokens))


def test_a_prediction_is_the_sum_of_its_terms():
    model = ModelShape("one", num_experts=1, top_k=1, hidden=8, intermediate=4)
    predicted = cost.predict(machine(prepare=0.25, finish=0.125), model, 1, {"gate_up": 2.0, "down": 1000.0})
    assert predicted["gate_up"] == pytest.approx(64 * 1.0), "arithmetic is longer"
    assert predicted["down"] == pytest.approx(1000 / 2), "reading is longer"
    assert predicted["prepare"] == 0.25 * (8 + 4)
    assert predicted["finish"] == 0.125 * 8
    assert predicted["total"] == pytest.approx(0.5 + 64 + 500 + 3 + 1)


@pytest.mark.parametrize("order", [0.8, 1.0, 2.5])
def test_overlap_is_found_again(order):
    both = machine(overlap={1: order}).together(3.0, 2.0, 5)
    assert cost.overlap_of(3.0, 2.0, both) == pytest.approx(order, rel=1e-6)
    assert cost.overlap_of(3.0, 2.0, 2.9) == pytest.approx(cost.MAX_OVERLAP)


def test_slices_hold_all_tokens():
    model = MODELS["qwen3"]
    assert cost.slices(model, 512) == [512]
    assert sum(cost.slices(model, 5000)) == 5000
    assert cost.slices(model, 1024) == [768, 256]


def test_costs_are_measured_and_predicted(tmp_path):
    output = tmp_path / "cost.json"
    done = bench("cost", "--quick", "--threads=1", "--compute-dtypes=int16", "--markdown", "--output", output)
    assert done.returncode == 0, done.stderr
    (one,) = json.loads(output.read_text())["runs"]
    parameters = one["parameters"]
    assert (parameters["threads"], parameters["compute_dtype"]) == (1, "int16")
    assert min(parameters["kernel"].values()) > 0
    assert parameters["read"] > 1e8
    assert [row["tokens"] for row in one["layers"]] == [1, 16]
    for row in one["layers"]:
        assert row["predicted"]["total"] > 0
        assert row["measured"] > 0
    assert "total ÷" in done.stdout
    assert "| tokens | experts hit | rows per expert | 1 thread, int16 |" in done.stdout
