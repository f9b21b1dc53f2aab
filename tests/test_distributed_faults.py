"""Hosts that do not run alike: lost ones, other arguments, other files; and the memory of a share."""

import mmap
import shutil
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import edit_json
from hosts import fake_groups, on_hosts, results_on_hosts
from layers import Layer

import marlin_cy
from marlin_cy.checkpoints.packed_writer import write_packed
from marlin_cy.checkpoints.partial_map import map_parts
from marlin_cy.decoder.load import load_model
from marlin_cy.distributed import Group
from marlin_cy.errors import CheckpointError, GroupError, UnsupportedError

MODEL = files("marlin_cy") / "data" / "tiny-qwen3-moe-gptq-int4"
OPTIONS = {"context_length": 64, "num_threads": 1}


@pytest.fixture
def layer(cpu_backend, rng):
    return Layer(rng).on(cpu_backend)


def inputs(layer, tokens=3):
    rng = np.random.default_rng(1)
    return rng.standard_normal((tokens, layer.hidden_size)), rng.standard_normal((tokens, layer.num_experts))


def run_layer(group, layer, x, logits):
    share = group.layer(layer)
    ctx = marlin_cy.get_backend("cpu").new_context(num_threads=1)
    return share(ctx, np.float32(x), np.float32(logits))


def assert_refused(errors, words):
    """On every host."""
    for error in errors:
        assert isinstance(error, GroupError)
        assert words in str(error)


class TestArguments:
    def test_communicator(self):
        with pytest.raises(TypeError, match="comm: got int without rank"):
            Group(3)

    @pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan"), "1"])
    def test_timeout(self, timeout):
        with pytest.raises(ValueError, match="timeout: got .*, expected a positive number"):
            fake_groups(1, timeout=timeout)

    def test_scheme(self):
        with pytest.raises(UnsupportedError, match="scheme: got 'experts', expected 'columns'"):
            fake_groups(1)[0].shard("experts")

    def test_more_hosts_than_columns(self, layer):
        with pytest.raises(ValueError, match="intermediate_size: got 5 hosts, expected at most 4: 64 columns"):
            fake_groups(5)[0].layer(layer)

    def test_more_hosts_than_heads(self):
        with pytest.raises(ValueError, match="heads: got 5 hosts, expected at most 4"):
            fake_groups(5)[0].shard().heads("heads", 4, 2)

    def test_a_share_of_a_share(self, layer):
        (group,) = fake_groups(1)
        with pytest.raises(ValueError, match="layer: is this host's share already"):
            group.layer(group.layer(layer))

    def test_a_backend_without_shares(self, opencl_backend):
        (group,) = fake_groups(1)
        with pytest.raises(UnsupportedError, match="shard: the opencl backend has none"):
            marlin_cy.open_checkpoint(MODEL, opencl_backend, shard=group.shard())


class TestHeads:
    @pytest.mark.parametrize(("heads", "keys"), [(4, 2), (8, 8), (12, 3), (6, 1), (16, 2), (7, 7)])
    def test_every_head_is_on_one_host_with_its_key(self, heads, keys):
        for size in range(1, heads + 1):
            shares = [group.shard().heads("heads", heads, keys) for group in fake_groups(size)]
            cut = shares[0][0]
            assert cut[0] == 0 and cut[-1] == heads and (np.diff(cut) > 0).all()
            for rank, (other, begin, end) in enumerate(shares):
                np.testing.assert_array_equal(other, cut)
                queries = np.arange(cut[rank], cut[rank + 1])
                # The plan's rule, on the host's own heads.
                found = begin + np.arange(len(queries)) // (len(queries) // (end - begin))
                np.testing.assert_array_equal(found, queries // (heads // keys))


class TestOtherArguments:
    def check(self, layer, change, words):
        def run(group):
            x, logits = inputs(layer)
            return run_layer(group, layer, *change(x, logits, group.rank))

        assert_refused(on_hosts(2, run), words)

    def test_rows(self, layer):
        self.check(
            layer,
            lambda x, logits, rank: (x[rank:], logits[rank:]),
            "hidden_states: rank 1 has other values than rank 0",
        )

    def test_values(self, layer):
        self.check(
            layer, lambda x, logits, rank: (x, logits + rank), "router_logits: rank 1 has other values than rank 0"
        )

    def test_tokens(self):
        def run(group):
            model = load_model(MODEL, group=group, **OPTIONS)
            return model.forward([1, 2, 3 + group.rank])

        assert_refused(on_hosts(2, run), "step: tokens: rank 1 has other values than rank 0")

    def test_options(self):
        def run(group):
            return load_model(MODEL, group=group, cache_tokens=64 + group.rank, **OPTIONS)

        assert_refused(on_hosts(2, run), "load_model: cache_tokens: rank 1 has other values")

    def test_calls(self, layer):
        def run(group):
            return run_layer(group, layer, *inputs(layer)) if group.rank else group.agree("another call", {})

        assert_refused(on_hosts(2, run), "rank 1 is in another call than rank 0")


class TestOtherFiles:
    def run(self, folders):
        return on_hosts(2, lambda group: load_model(folders[group.rank], group=group, **OPTIONS))

    def test_config(self, tmp_path):
        folder = shutil.copytree(MODEL, tmp_path / "other")
        edit_json(folder, "config.json", rope_theta=5.0)
        assert_refused(self.run([MODEL, folder]), "open_checkpoint: config.json: rank 1 has other values")

    def test_weights(self, tmp_path):
        folder = shutil.copytree(MODEL, tmp_path / "other")
        data = bytearray((folder / "model.safetensors").read_bytes())
        with marlin_cy.open_checkpoint(MODEL) as checkpoint:
            begin = checkpoint.tensor_info(checkpoint.tensor_names[0]).begin
        data[begin] ^= 1
        (folder / "model.safetensors").write_bytes(data)
        assert_refused(self.run([MODEL, folder]), "open_checkpoint: bytes of tensors: rank 1 has other values")

    def test_missing(self, tmp_path):
        first, second = self.run([MODEL, tmp_path / "missing"])
        assert isinstance(second, (CheckpointError, OSError))
        assert isinstance(first, GroupError)
        assert "rank 1 has failed" in str(first)


class TestLostHosts:
    def test_before_a_call(self, layer):
        def run(group):
            if group.rank:
                return None
            start = time.monotonic()
            with pytest.raises(GroupError, match="rank 0 got no answer from the other hosts within 0.2 s"):
                run_layer(group, layer, *inputs(layer))
            assert time.monotonic() - start < 10
            with pytest.raises(GroupError, match="got no answer"):  # at once: the host stays lost
                group.agree("anything", {})
            return True

        assert on_hosts(2, run, timeout=0.2)[0] is True

    @pytest.mark.parametrize("exchanges", [1, 3, 7])
    def test_during_a_step(self, exchanges):
        """A host is lost after some exchanges of a step: the others' call fails, on all their threads."""

        def run(group):
            model = load_model(MODEL, group=group, context_length=64, num_threads=2)
            model.forward([1, 2, 3])
            if group.rank:
                left = iter(range(exchanges))
                gather = group.gather

                def stops(*arguments):
                    if next(left, None) is None:
                        raise GroupError("stopped by the test")
                    gather(*arguments)

                group.gather = stops
            sequence = model.new_sequence()
            with pytest.raises(GroupError, match="stopped by the test" if group.rank else "got no answer"):
                model.forward([4, 5], sequence=sequence)
            return sequence.length

        assert on_hosts(2, run, timeout=0.5) == [0, 0]


class TestMemory:
    def test_of_a_layer(self, cpu_backend, rng):
        layer = Layer(rng, experts=3, hidden=320, inner=224, shared=96).on(cpu_backend)
        for size in (2, 3, 4):
            shares = [group.layer(layer) for group in fake_groups(size)]
            for name in ("gate_up", "down"):
                whole = getattr(layer, name)
                parts = [getattr(share, name).metadata.packed_bytes for share in shares]
                tiles = whole.store.layout.tile_stride * whole.num_experts * (2 if name == "gate_up" else 1)
                assert sum(parts) == whole.metadata.packed_bytes
                assert max(parts) <= whole.metadata.packed_bytes / size + tiles

    def test_of_a_model(self):
        whole = load_model(MODEL, **OPTIONS)
        for model in results_on_hosts(2, lambda group: load_model(MODEL, group=group, **OPTIONS)):
            assert model.cache_bytes == whole.cache_bytes / 2
            for layer, part in zip(whole.plan.layers, model.plan.layers, strict=True):
                for name in ("q", "k", "v", "o"):
                    found, expected = getattr(part.mixer, name), getattr(layer.mixer, name)
                    assert found.metadata.packed_bytes == expected.metadata.packed_bytes / 2
                bytes_of = [
                    sum(stack.metadata.packed_bytes for _, stack in ffn.layer.plan.stacks())
                    for ffn in (part.ffn, layer.ffn)
                ]
                assert bytes_of[0] == bytes_of[1] / 2

    def test_of_a_packed_folder(self, tmp_path, cpu_backend):
        """Only the pages with this host's tiles are mapped, and their bytes are those of the file."""
        write_packed(marlin_cy.open_checkpoint(MODEL), tmp_path / "packed")
        whole = marlin_cy.open_checkpoint(tmp_path / "packed", cpu_backend).moe_layer(0)

        def run(group):
            with marlin_cy.open_checkpoint(tmp_path / "packed", cpu_backend, shard=group.shard()) as checkpoint:
                return checkpoint.moe_layer(0).gate_up.store, group.layer(whole).gate_up.store

        for rank, (mapped, copied) in enumerate(results_on_hosts(2, run)):
            assert mapped.nbytes == copied.nbytes
            assert not mapped.data.flags.writeable
            # Of each expert: gates of both hosts, ups of both hosts.
            half = copied.layout.expert_stride // 2
            found = mapped.data.reshape(mapped.num_experts, 2, 2, half)[:, :, rank]
            np.testing.assert_array_equal(found, copied.data.reshape(mapped.num_experts, 2, half))


class TestPartialMap:
    def test_bytes(self, tmp_path, rng):
        data = rng.integers(0, 256, 100_000, np.uint8)
        (tmp_path / "file").write_bytes(data.tobytes())
        begin, parts = 4160, [(0, 10), (9000, 9001), (30_000, 50_000), (50_100, 60_000)]
        found = map_parts(tmp_path / "file", begin, 70_000, parts)
        assert found.shape == (70_000,) and not found.flags.writeable
        for first, end in parts:
            np.testing.assert_array_equal(found[first:end], data[begin + first : begin + end])

    @pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
    def test_other_pages_are_not_mapped_and_all_are_given_back(self, tmp_path):
        page = mmap.PAGESIZE
        (tmp_path / "file").write_bytes(bytes(20 * page))

        def mapped():
            lines = Path("/proc/self/maps").read_text().splitlines()
            spans = [line.split()[0].split("-") for line in lines if line.endswith(str(tmp_path / "file"))]
            return sum(int(end, 16) - int(begin, 16) for begin, end in spans)

        found = map_parts(tmp_path / "file", 64, 18 * page, [(page, page + 1), (5 * page, 7 * page)])
        assert found[5 * page] == 0
        assert mapped() == 4 * page
        del found
        assert mapped() == 0

    def test_too_many_maps(self, tmp_path):
        (tmp_path / "file").write_bytes(bytes(100))
        with pytest.raises(MemoryError, match="could not map 4503599627370496 bytes"):
            map_parts(tmp_path / "file", 0, 1 << 52, [(0, 1)])
