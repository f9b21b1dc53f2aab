"""Headers of GGUF files: what is read, and what is refused with its reason."""

import struct

import numpy as np
import pytest

pytest.importorskip("gguf", reason="gguf is not installed")

from gguf_files import Entry, raw_header, write_gguf  # noqa: E402

from marlin_cy import open_checkpoint  # noqa: E402
from marlin_cy.checkpoints.gguf import package  # noqa: E402
from marlin_cy.checkpoints.gguf.files import find_gguf, model_files  # noqa: E402
from marlin_cy.checkpoints.gguf.metadata import Metadata  # noqa: E402
from marlin_cy.checkpoints.gguf.reader import read_header  # noqa: E402
from marlin_cy.errors import BackendUnavailable, CheckpointError, UnsupportedError  # noqa: E402

F32, Q4_0, Q2_K = 0, 2, 10
U8, U32, I32, FLOAT, BOOL, STRING, ARRAY = 0, 4, 5, 6, 7, 8, 9
FIELDS = {
    "general.architecture": "qwen3moe",
    "general.name": "näme",
    "qwen3moe.block_count": 2,
    "qwen3moe.rope.freq_base": 1e6,
    "a.flag": True,
    "tokenizer.ggml.tokens": ["a", "Ġb", ""],
    "tokenizer.ggml.scores": [0.5, -1.0],
    "tokenizer.ggml.token_type": [1, 3],
}


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


ARCHITECTURE = ("general.architecture", STRING, text("qwen3moe"))


@pytest.fixture
def write(tmp_path):
    """``write(fields, tensors, size=...)`` writes a file of these, and of zeros up to a size."""

    def written(fields=(ARCHITECTURE,), tensors=(), *, size=4096, name="model.gguf", **others):
        path = tmp_path / name
        path.write_bytes(raw_header(fields, tensors, **others).ljust(size, b"\0"))
        return path

    return written


def refused(path, message, error=CheckpointError):
    """Both by the reader and by ``open_checkpoint``."""
    for read in (read_header, open_checkpoint):
        with pytest.raises(error, match=message) as caught:
            read(path)
        assert str(path.name) in str(caught.value)


# ---------------------------------------------------------------------------------------------
# What is read


def test_fields_and_tensors(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_gguf(tmp_path / "a.gguf", FIELDS, {"x.weight": Entry(values), "y": Entry(values[0])})
    header = read_header(tmp_path / "a.gguf")
    for name, value in FIELDS.items():
        found = header.fields[name]
        assert found == value if isinstance(value, str | int | bool | float) else list(found) == value
    tensor = header.tensors["x.weight"]
    assert (tensor.type, tensor.shape, tensor.nbytes) == ("F32", (3, 4), 48)
    data = (tmp_path / "a.gguf").read_bytes()[tensor.begin : tensor.end]
    np.testing.assert_array_equal(np.frombuffer(data, np.float32).reshape(3, 4), values)


@pytest.mark.parametrize("version", [2, 3])
def test_versions(write, version):
    assert read_header(write(version=version)).fields["general.architecture"] == "qwen3moe"


def test_a_file_that_changes_is_read_again(write):
    path = write()
    assert "x" not in read_header(path).fields
    write([ARCHITECTURE, ("x", U32, struct.pack("<I", 7))], size=5000)
    assert read_header(path).fields["x"] == 7


def test_alignment(write):
    path = write([ARCHITECTURE, ("general.alignment", U32, struct.pack("<I", 1024))], [("x", [4], F32, 1024)])
    assert read_header(path).tensors["x"].begin == 2048


# ---------------------------------------------------------------------------------------------
# Damage


def test_every_truncation(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, FIELDS, {"x.weight": Entry(np.ones((3, 4)))})
    data = path.read_bytes()
    for size in range(read_header(path).tensors["x.weight"].end):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            read_header(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read|got 0 bytes"),
        (b"GGUF", "got 4 bytes, expected a GGUF file"),
        (b"GGML" + bytes(100), "got b'GGML' at the beginning"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    ],
)
def test_no_gguf(tmp_path, data, message):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    refused(path, message)


@pytest.mark.parametrize(
    ("version", "message"),
    [(1, "version 1 of GGUF"), (4, "version 4 of GGUF"), (0x03000000, "big-endian"), (0, "big-endian")],
)
def test_other_versions(write, version, message):
    refused(write(version=version), message, UnsupportedError)


@pytest.mark.parametrize("counts", [(1 << 63, 0), (0, 1 << 63), (200, 0), (0, 400), (2**64 - 1, 2**64 - 1)])
def test_impossible_counts(write, counts):
    refused(write([], counts=counts), "truncated, or damaged")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (("x", 13, b""), "x: got type 13 of a field"),
        (("x", ARRAY, struct.pack("<IQ", ARRAY, 1)), "x: got an array of type 9"),
        (("x", ARRAY, struct.pack("<IQ", U8, 1 << 62)), "truncated, or damaged: got 4611686018427387904 values of x"),
        (("x", ARRAY, struct.pack("<IQ", U32, 2000)), "truncated, or damaged: x has 8000 bytes"),
        (("x", ARRAY, struct.pack("<IQ", STRING, 1 << 40)), "truncated, or damaged"),
        (("x", ARRAY, struct.pack("<IQQ", STRING, 1, 1 << 40)), "x goes beyond the end of the file"),
        (("x", ARRAY, struct.pack("<IQQ", STRING, 1, 1) + b"\xff"), "x: not UTF-8"),
        (("x", STRING, struct.pack("<Q", 1 << 62)), "truncated, or damaged"),
        (("x", STRING, struct.pack("<Q", 1) + b"\xff"), "x: not UTF-8"),
        (("general.architecture", STRING, text("llama")), "general.architecture: there are two fields"),
        (("general.alignment", U32, struct.pack("<I", 24)), "general.alignment: got 24, expected a power of two"),
        (("general.alignment", U32, struct.pack("<I", 0)), "general.alignment: got 0"),
        (("general.alignment", STRING, text("32")), "general.alignment: got '32'"),
        ((b"\xff\xfe", U8, b"\0"), "a key: not UTF-8"),
    ],
)
def test_damaged_fields(write, field, message):
    refused(write([ARCHITECTURE, field]), message)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("x", [0, 4], F32, 0)], r"got sizes \[0, 4\]"),
        ([("x", [1 << 40, 1 << 40], F32, 0)], "expected positive ones of less than"),
        ([("x", [], F32, 0)], "got 0 dimensions, expected 1 to 4"),
        ([("x", [1] * 5, F32, 0)], "got 5 dimensions"),
        ([("x", [48, 4], Q4_0, 0)], "got rows of 48 values, expected a multiple of 32 for Q4_0"),
        ([("x", [4], F32, 4)], "got offset 4, expected a multiple of general.alignment, 32"),
        ([("x", [4], F32, 1 << 40)], "truncated, or damaged: 16 bytes at 1099"),
        ([("x", [1 << 20], F32, 0)], "truncated, or damaged: 4194304 bytes"),
        ([("x", [4], F32, 0), ("x", [4], F32, 32)], "there are two of this name"),
        ([("x", [64], F32, 0), ("y", [4], F32, 32)], "begins at .*, inside of 'x'"),
    ],
)
def test_impossible_tensors(write, tensors, message):
    path = write(tensors=tensors)
    refused(path, message)
    with pytest.raises(CheckpointError, match="tensor '[xy]'"):
        read_header(path)


@pytest.mark.parametrize("number", [4, 5, 1000, 2**32 - 1])
def test_types_of_tensors_that_do_not_exist(write, number):
    refused(write(tensors=[("x", [32], number, 0)]), f"tensor 'x': type {number} is not known", UnsupportedError)


# ---------------------------------------------------------------------------------------------
# Fields of the wrong kind


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("size", 0, "expected a positive integer"),
        ("size", True, "expected an integer"),
        ("size", "2", "expected an integer"),
        ("size", [2, 3], "expected the same value for all layers"),
        ("number", float("inf"), "expected a finite number"),
        ("number", "1", "expected a finite number"),
        ("text", 1, "expected a string"),
        ("flag", 1, "expected a truth value"),
        ("flags", [1.5], "expected an array of truth values"),
        ("strings", [1], "expected an array of strings"),
    ],
)
def test_fields_of_another_kind(tmp_path, method, value, message):
    path = tmp_path / "a.gguf"
    write_gguf(path, {"general.architecture": "llama", "llama.x": value}, {})
    with pytest.raises(CheckpointError, match=rf"llama\.x: got .*{message}"):
        getattr(Metadata(read_header(path)), method)("x")


def test_equal_values_for_all_layers(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, {"general.architecture": "llama", "llama.x": [0, 7, 7], "llama.y": [0, 0]}, {})
    fields = Metadata(read_header(path))
    assert (fields.size("x"), fields.integer("y"), fields.integer("z")) == (7, None, None)


def test_the_digits_of_a_float32(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, {"general.architecture": "llama", "llama.x": 1e-6, "llama.y": 3e38}, {})
    fields = Metadata(read_header(path))
    assert fields.number("x") == 1e-6
    assert fields.number("y") == pytest.approx(3e38)


def test_no_architecture(write):
    with pytest.raises(CheckpointError, match="general.architecture: missing"):
        open_checkpoint(write([]))


def test_an_architecture_that_is_not_known(write):
    path = write([("general.architecture", STRING, text("gpt2"))])
    with pytest.raises(UnsupportedError, match="general.architecture 'gpt2', supported: qwen2moe, qwen3moe"):
        open_checkpoint(path)


# ---------------------------------------------------------------------------------------------
# Paths


def test_the_parts_of_a_model(tmp_path):
    tensors = {f"t{number}": Entry(np.full(8, number, np.float32)) for number in range(5)}
    write_gguf(tmp_path / "m.gguf", FIELDS, tensors, split_max_tensors=2)
    parts = [tmp_path / f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert all(part.exists() for part in parts)
    for part in parts:
        header = read_header(part)
        assert list(header.tensors) == list(tensors)
        assert header.files == tuple(parts)
        assert header.fields["general.name"] == "näme"
    assert find_gguf(tmp_path) == parts[0]
    parts[1].rename(tmp_path / "away")
    refused_part = r"m-00002-of-00003\.gguf: No such file or directory \(part 2 of 3\)"
    for path in (parts[0], parts[2], tmp_path):
        with pytest.raises(CheckpointError, match=refused_part):
            open_checkpoint(path)


def test_parts_of_two_models(tmp_path):
    tensors = {f"t{number}": Entry(np.full(8, number, np.float32)) for number in range(4)}
    write_gguf(tmp_path / "m.gguf", FIELDS, tensors, split_max_tensors=2)
    first, second = (tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    first_data, second_data = first.read_bytes(), second.read_bytes()
    second.write_bytes(first_data)
    with pytest.raises(
        CheckpointError, match="split.no, split.count: got 0 and 2, expected 1 and 2 by the file's name"
    ):
        read_header(first)
    first.write_bytes(second_data)
    with pytest.raises(CheckpointError, match="split.no, split.count: got 1 and 2, expected 0 and 2"):
        read_header(first)


def test_one_part_alone_under_another_name(tmp_path):
    tensors = {f"t{number}": Entry(np.full(8, number, np.float32)) for number in range(4)}
    write_gguf(tmp_path / "m.gguf", FIELDS, tensors, split_max_tensors=2)
    (tmp_path / "m-00001-of-00002.gguf").rename(tmp_path / "renamed.gguf")
    with pytest.raises(
        CheckpointError, match="split.no, split.count: got 0 and 2, expected 0 and 1 by the file's name"
    ):
        read_header(tmp_path / "renamed.gguf")


def test_numbers_of_parts(tmp_path):
    assert model_files(tmp_path / "a.gguf") == (tmp_path / "a.gguf",)
    for name in ("m-00003-of-00002.gguf", "m-00000-of-00002.gguf"):
        with pytest.raises(CheckpointError, match="expected part 1 to 2"):
            model_files(tmp_path / name)


def test_folders(write, tmp_path):
    assert find_gguf(tmp_path) is None
    model = write()
    write(name="mmproj-model.gguf")
    assert find_gguf(tmp_path) == model
    assert find_gguf(tmp_path / "missing") is None
    other = write(name="other.gguf")
    refused_folder = r"got 2 GGUF models: model\.gguf, other\.gguf; open one by its own path"
    with pytest.raises(CheckpointError, match=refused_folder):
        open_checkpoint(tmp_path)
    other.unlink()
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"got model\.safetensors and model\.gguf, expected one format"):
        open_checkpoint(tmp_path)
    assert find_gguf(model) == model


def test_a_file_of_another_name(write):
    assert find_gguf(write(name="blob")) is not None


def test_no_such_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"x\.gguf: No such file"):
        open_checkpoint(tmp_path / "x.gguf")


def test_own_types_are_those_of_the_package():
    types = package._package().GGMLQuantizationType
    for number, found in package.OWN_TYPES.items():
        assert found == (types(number).name, *package._package().GGML_QUANT_SIZES[types(number)])


def test_without_the_package(write, monkeypatch):
    """It is needed for types that this library cannot read itself."""
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    for cached in (package._package, package.tensor_type):
        cached.cache_clear()
    assert package.tensor_type(F32) == ("F32", 1, 4)
    with pytest.raises(BackendUnavailable, match=r"pip install 'marlin-cy\[gguf\]'"):
        open_checkpoint(write(tensors=[("x", [256], Q2_K, 0)]))
