"""Memory-mapped safetensors files: views, dtypes, alignment, and headers that contradict themselves."""

import json

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import header_bytes
from safetensors.numpy import save_file

from marlin_cy.checkpoints.safetensors import SafetensorsFile
from marlin_cy.errors import CheckpointError, UnsupportedError


def test_views(tmp_path):
    """Every dtype is read as it was written; views outlive the file, and survive a release."""
    rng = np.random.default_rng(0)
    dtypes = [np.float16, np.float32, np.float64, np.int8, np.uint8, np.int32, np.int64, np.bool_, ml_dtypes.bfloat16]
    tensors = {np.dtype(dtype).name: rng.integers(0, 2, (5, 3)).astype(dtype) for dtype in dtypes}
    tensors |= {"scalar": np.array(7.0), "empty": np.zeros((0, 4), np.int32)}
    save_file(tensors, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file.names) == set(tensors)
    views = {}
    for name, expected in tensors.items():
        views[name] = file.tensor(name)
        file.release(name)
        assert file.info(name).shape == expected.shape
        assert file.info(name).nbytes == expected.nbytes
    file.close()
    for name, expected in tensors.items():
        np.testing.assert_array_equal(views[name], expected)
        assert views[name].dtype == expected.dtype
        assert not views[name].flags.writeable
    with pytest.raises(ValueError, match="was closed"):
        file.tensor("float16")
    with pytest.raises(CheckpointError, match="tensor 'y': missing"):
        file.tensor("y")


def test_unaligned_tensors(tmp_path):
    """The format allows any offset; arrays are aligned all the same."""
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "I32", "shape": [2], "data_offsets": [1, 9]},
        "c": {"dtype": "F4", "shape": [2], "data_offsets": [9, 10]},
    }
    header_bytes(json.dumps(header).encode(), b"\x05" + np.array([1, -2], "<i4").tobytes() + b"\0")(tmp_path)
    file = SafetensorsFile(tmp_path / "model.safetensors")
    assert file.tensor("b").tolist() == [1, -2]
    assert file.tensor("b").flags.aligned
    with pytest.raises(UnsupportedError, match="tensor 'c': dtype F4 has no NumPy equivalent"):
        file.tensor("c")


def test_duplicate_names_in_the_header(tmp_path):
    """Whichever entry is believed, no view may reach beyond the file."""
    entry = b'"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}'
    for sizes in ((2, 2000), (2000, 2)):
        header_bytes(b"{%b,%b}" % tuple(entry % (size, size) for size in sizes), b"zz")(tmp_path)
        try:
            assert SafetensorsFile(tmp_path / "model.safetensors").tensor("a").tobytes() == b"zz"
        except CheckpointError:
            continue
