"""Whole models in transformers, compared with the same weights dense, run by PyTorch alone."""

import copy
import functools
import pickle
import shutil
import subprocess
import sys
import threading
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from asserts import assert_close, relative_error
from checkpoint_files import edit_json, edit_tensor

import marlin_cy
from marlin_cy import cli
from marlin_cy.commands.run import BUILT_IN
from marlin_cy.errors import CheckpointError, UnsupportedError

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

import language_models  # noqa: E402
from language_models import WITH_QUANTISED_HEAD, load_reference, write_large, write_model  # noqa: E402
from transformers.initialization import no_init_weights  # noqa: E402

from marlin_cy.integrations.dequantized import dequantized_model  # noqa: E402
from marlin_cy.integrations.modules import MarlinLinear, array_of  # noqa: E402
from marlin_cy.integrations.transformers import load, weight_bytes  # noqa: E402

FOLDER = files("marlin_cy") / BUILT_IN
# Products are off by 5e-5 or less (asserts.gemm_bound), and a network of a few layers hands on what it gets; a weight
# in the wrong place would show as an error of 1.
RELATIVE_ERROR = 1e-3

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def built_in():
    """The built-in model, packed, in float32."""
    return load(FOLDER, dtype="float32", num_threads=1)


@pytest.fixture(scope="module")
def dense():
    """``dense(dtype)``: the built-in model with dense weights, by transformers."""
    return functools.cache(functools.partial(dequantized_model, FOLDER))


@pytest.fixture
def small(tmp_path):
    """The folder of a small Qwen3-MoE checkpoint, to be damaged."""
    return write_model(tmp_path, "qwen3_moe", dtype=torch.bfloat16)[0]


def held_out(rows, columns):
    """Tokens of the built-in model's held-out text, int64 ``[rows, columns]``."""
    text = np.frombuffer((FOLDER / "validation.txt").read_bytes(), np.uint8)[: rows * columns]
    return torch.from_numpy(text.astype(np.int64).reshape(rows, columns))


def error_of(logits, reference):
    return relative_error(logits.double().numpy(), reference.double().numpy())


def assert_same_weights(model, reference):
    """The same bits. PyTorch's products would differ, because their bits depend on a weight's address."""
    weights, expected = model.state_dict(), reference.state_dict()
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


# ---------------------------------------------------------------------------------------------
# The right numbers


@pytest.mark.sampled(4)
@pytest.mark.parametrize("model_type", language_models.CONFIGS)
def test_every_family(tmp_path, model_type):
    """A model with its family's names gives the same outputs as transformers with the same weights, dense."""
    quantised, dense = write_model(tmp_path, model_type)
    tokens = torch.randint(1, language_models.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    reference = load_reference(dense)
    expected = reference(tokens).logits
    assert expected.std() > 0.5
    model = load(quantised, num_threads=1)
    assert type(model) is type(reference)
    assert error_of(model(tokens).logits, expected) < RELATIVE_ERROR
    assert_same_weights(dequantized_model(quantised), reference)


@pytest.mark.parametrize("kept", ["layers.1.mlp.experts", "layers.0.mlp", "self_attn", "shared_expert"])
def test_layers_that_are_not_quantised(tmp_path, kept):
    """They run as transformers' own, the others packed."""
    quantised, dense = write_model(tmp_path, "qwen2_moe", kept=[kept], mlp_only_layers=[])
    tokens = torch.arange(1, 25)[None]
    model = load(quantised, num_threads=1)
    assert any(kept in name and "_proj" in name for name, _ in model.named_parameters())
    reference = load_reference(dense)
    assert error_of(model(tokens).logits, reference(tokens).logits) < RELATIVE_ERROR
    assert_same_weights(dequantized_model(quantised), reference)


def test_quantised_head(tmp_path):
    quantised, dense = write_model(tmp_path, "qwen3_moe", not_quantised=WITH_QUANTISED_HEAD)
    tokens = torch.arange(1, 25)[None]
    model = load(quantised, num_threads=1)
    assert isinstance(model.lm_head, MarlinLinear)
    assert error_of(model(tokens).logits, load_reference(dense)(tokens).logits) < RELATIVE_ERROR


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss", "qwen3_5_moe"])
def test_packed_folders(tmp_path, model_type):
    """They give the same bits as the folder that they were made from, though its files are gone."""
    quantised, _ = write_model(tmp_path, model_type)
    tokens = torch.arange(1, 25)[None]
    expected, dense = load(quantised, num_threads=1)(tokens).logits, dequantized_model(quantised)
    assert cli.main(["pack", str(quantised), str(tmp_path / "packed")]) == 0
    shutil.rmtree(quantised)
    assert torch.equal(load(tmp_path / "packed", num_threads=1)(tokens).logits, expected)
    assert_same_weights(dequantized_model(tmp_path / "packed"), dense)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_activations_of_every_dtype(dense, dtype):
    """Packing adds little error to the rounding of activations, which dense weights have too."""
    tokens = held_out(2, 128)
    exact = dense(torch.float64)(tokens).logits
    rounded = error_of(dense(getattr(torch, dtype))(tokens).logits, exact)
    model = load(FOLDER, dtype=dtype, num_threads=1)
    assert model.dtype == getattr(torch, dtype)
    logits = model(tokens).logits
    assert logits.dtype == model.dtype
    assert error_of(logits, exact) < 1.5 * rounded + RELATIVE_ERROR


def test_int8_is_coarser(built_in, dense):
    tokens = held_out(1, 256)
    exact = dense(torch.float64)(tokens).logits
    coarse = error_of(load(FOLDER, dtype="float32", num_threads=1, compute_dtype="int8")(tokens).logits, exact)
    assert 10 * error_of(built_in(tokens).logits, exact) < coarse < 0.1


@pytest.mark.parametrize("threads", [1, 3])
def test_bits_do_not_depend_on_threads(built_in, threads):
    """PyTorch's part runs unchanged; the packed part gives the same bits with any number of threads."""
    tokens = held_out(1, 64)
    model = load(FOLDER, dtype="float32", num_threads=threads)
    assert torch.equal(model(tokens).logits, built_in(tokens).logits)


def test_on_opencl(dense, device_alone):
    tokens = held_out(1, 32)
    reference = dense(torch.float32)(tokens).logits
    model = load(FOLDER, device_alone, dtype="float32")
    assert error_of(model(tokens).logits, reference) < RELATIVE_ERROR


def test_greedy_text_is_that_of_the_dense_model(built_in, dense):
    """200 tokens of 10 prompts. Each has the dense model's largest logit after the tokens before it, or almost.

    Logits are off by less than RELATIVE_ERROR of their root mean square, which is below 10.
    """
    prompts = held_out(10, 64)
    texts = built_in.generate(prompts, max_new_tokens=200, do_sample=False, eos_token_id=None)
    logits = dense(torch.float32)(texts[:, :-1]).logits[:, 63:]
    gaps = logits.max(dim=-1).values - logits.gather(2, texts[:, 64:, None])[..., 0]
    assert gaps.shape == (10, 200)
    parted = (gaps > 0).any(dim=1).sum()
    print(f"of {len(prompts)} texts, {parted} part from the dense model's; the largest gap of logits: {gaps.max():.4f}")
    assert parted <= 2
    assert gaps.max() < 0.02


# ---------------------------------------------------------------------------------------------
# generate()


def test_cache_gives_what_no_cache_gives(built_in):
    prompt = held_out(1, 48)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        built_in.generate(prompt, use_cache=True, **options), built_in.generate(prompt, use_cache=False, **options)
    )


def test_batch_with_padding_gives_what_each_prompt_gives(built_in):
    lengths, width, new = (48, 17, 1, 33), 48, 24
    rows = held_out(len(lengths), width)
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    batch = built_in.generate(torch.where(mask == 1, rows, 256), attention_mask=mask, **options)
    for row, length, text in zip(rows, lengths, batch, strict=True):
        alone = built_in.generate(row[None, width - length :], **options)
        assert torch.equal(text[width:], alone[0, length:])


def test_threads_generate_at_once(built_in):
    """Each thread has its own context, so no call is refused, and every thread gets the same result as alone."""
    prompts = held_out(4, 32)
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    expected = [built_in.generate(prompt[None], **options) for prompt in prompts]
    results, contexts, together = [None] * 4, [None] * 4, threading.Barrier(4)
    runner = built_in.model.layers[0].mlp.experts.packed

    def work(i):
        together.wait()
        with torch.no_grad():
            results[i] = built_in.generate(prompts[i][None], **options)
        contexts[i] = runner.contexts.ctx

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result, reference in zip(results, expected, strict=True):
        assert torch.equal(result, reference)
    assert len(set(map(id, [*contexts, runner.contexts.ctx]))) == 5


# ---------------------------------------------------------------------------------------------
# The model as an object


def test_no_weight_is_where_it_should_not_be(built_in):
    names = {name for name, _ in built_in.named_parameters()}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.3.mlp.gate.weight"} <= names
    assert not any("experts" in name or "_proj" in name for name in names)
    assert not any(parameter.requires_grad for parameter in built_in.parameters())
    assert not any(tensor.is_meta for tensor in [*built_in.parameters(), *built_in.buffers()])
    assert not built_in.training
    with no_init_weights():
        fresh = type(built_in)(built_in.config)
    assert torch.equal(built_in.model.rotary_emb.inv_freq, fresh.model.rotary_emb.inv_freq)


def test_configs_are_those_of_the_folder(built_in):
    assert built_in.generation_config.pad_token_id == 256
    assert built_in.config.quantization_config["group_size"] == 128
    assert built_in.name_or_path == str(FOLDER)
    assert '"model_type": "qwen3_moe"' in str(built_in.config)
    assert "MarlinLinear(in_features=256, out_features=128)" in str(built_in)


def test_dtype_is_that_of_the_files(small):
    assert load(small).dtype == torch.bfloat16
    edit_json(small, "config.json", dtype="float32")
    assert load(small).dtype == torch.bfloat16


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_dense_weights_are_views_of_the_file(small):
    maps = {}
    model = load(small)
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split(maxsplit=5)
        begin, end = (int(address, 16) for address in span.split("-"))
        maps[range(begin, end)] = path
    for name, parameter in model.named_parameters():
        (path,) = (path for span, path in maps.items() if parameter.data_ptr() in span)
        assert path == str(small / "model.safetensors"), name


def test_weight_bytes(built_in):
    packed, dense = weight_bytes(built_in)
    assert dense == sum(parameter.nbytes for parameter in built_in.parameters())
    layer = built_in.model.layers[0]
    experts, query = layer.mlp.experts.packed.layer, layer.self_attn.q_proj.packed.layer
    assert packed > 4 * (experts.gate_up.metadata.packed_bytes + experts.down.metadata.packed_bytes)
    assert packed > 4 * query.metadata.packed_bytes


def test_tied_embeddings(tmp_path):
    quantised, dense = write_model(tmp_path, "qwen3_moe", tie_word_embeddings=True)
    model = load(quantised, num_threads=1)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert weight_bytes(model)[1] == sum(parameter.nbytes for parameter in model.parameters())
    tokens = torch.arange(1, 24)[None]
    assert error_of(model(tokens).logits, load_reference(dense)(tokens).logits) < RELATIVE_ERROR


def test_copies_share_packed_weights(built_in):
    twin = copy.deepcopy(built_in)
    assert twin.lm_head.weight.data_ptr() != built_in.lm_head.weight.data_ptr()
    for mine, its in zip(built_in.model.layers, twin.model.layers, strict=True):
        assert mine.mlp.experts.packed is its.mlp.experts.packed
        assert mine.self_attn.q_proj.packed is its.self_attn.q_proj.packed
    tokens = held_out(1, 16)
    assert torch.equal(twin(tokens).logits, built_in(tokens).logits)


def test_it_cannot_be_saved_or_pickled(built_in, tmp_path):
    with pytest.raises(ValueError, match="marlin_cy and is not serializable"):
        built_in.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="cannot be pickled"):
        pickle.dumps(built_in.model.layers[0].self_attn.q_proj)


def test_progress(small):
    seen = []
    load(small, progress=lambda done, total, description: seen.append((done, total, description)))
    done, totals, descriptions = zip(*seen, strict=True)
    linears, layers, experts = 8, 2, 4
    assert set(totals) == {linears + layers}
    assert list(done) == sorted(set(done))
    assert len(done) == linears + layers * experts
    assert done[-1] == linears + layers
    assert {"model.layers.0.self_attn.q_proj", "layer 1"} <= set(descriptions)


@pytest.mark.parametrize("bars", [True, False])
def test_transformers_is_left_as_it_was(small, bars, capsys):
    """Its settings are, and it prints nothing while it loads."""
    log = transformers.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    try:
        (log.enable_progress_bar if bars else log.disable_progress_bar)()
        load(small)
        assert (log.get_verbosity(), log.is_progress_bar_enabled()) == (before[0], bars)
    finally:
        (log.enable_progress_bar if before[1] else log.disable_progress_bar)()
    assert capsys.readouterr() == ("", "")


@pytest.mark.sweep
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory(tmp_path):
    """A checkpoint of more than 200 MB: at most so much memory while it is loaded and run, and so much afterwards."""
    size = write_large(tmp_path / "large", layers=4, experts=64)
    assert size > 200e6
    code = f"""
import torch
from marlin_cy.integrations.transformers import load
torch.set_num_threads(1)
def memory(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))
before = memory("VmRSS")
model = load({str(tmp_path / "large")!r}, num_threads=1)
after = memory("VmRSS")
with torch.no_grad():
    assert model(torch.arange(16)[None]).logits.isfinite().all()
print(after - before, memory("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    resident, peak = (int(number) / size for number in done.stdout.split())
    print(f"resident {resident:.3f}, peak {peak:.3f} times the checkpoint")
    assert resident < 1.15
    assert peak < 1.3


# ---------------------------------------------------------------------------------------------
# MarlinLinear


@pytest.mark.parametrize("shape", [(256,), (0, 256), (1, 256), (3, 1, 256), (2, 3, 5, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_takes_any_leading_dimensions(built_in, dense, shape, dtype):
    module = built_in.model.layers[0].self_attn.k_proj
    weight = dense(torch.float32).model.layers[0].self_attn.k_proj.weight
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = module(x)
    assert out.dtype == dtype
    expected = x.float() @ weight.T
    assert out.shape == expected.shape
    roundoff = torch.finfo(dtype).eps
    bound = roundoff * expected.abs() + 2e-4 * x.float().norm(dim=-1, keepdim=True) * weight.norm(dim=1) + 1e-7
    assert_close(out.float().numpy(), expected.numpy(), bound.numpy())


def test_linear_takes_rows_that_are_not_contiguous(built_in):
    module = built_in.model.layers[0].self_attn.k_proj
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(256, 6).to(dtype).T
        assert not x.is_contiguous()
        assert torch.equal(module(x), module(x.contiguous()))


def test_experts_take_rows_that_are_not_contiguous(built_in):
    experts = built_in.model.layers[0].mlp.experts
    x, ids, weights = torch.randn(256, 3).T, torch.tensor([[0, 7], [3, 3], [5, 1]]), torch.rand(2, 3).T
    assert torch.equal(experts(x, ids, weights), experts(x.contiguous(), ids, weights.contiguous()))


def test_input_is_not_copied():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensor = torch.arange(8).to(dtype)
        array = array_of(tensor)
        assert array.ctypes.data == tensor.data_ptr()
        assert array.dtype.name == str(dtype).removeprefix("torch.")
        assert array.astype(np.float32).tolist() == list(range(8))


def test_linear_refuses(built_in):
    module = built_in.model.layers[0].self_attn.k_proj
    with pytest.raises(ValueError, match="input: got 128 columns, expected 256"):
        module(torch.zeros(2, 128))
    with pytest.raises(TypeError, match="float64"):
        module(torch.zeros(2, 256, dtype=torch.float64))
    with torch.enable_grad(), pytest.raises(UnsupportedError, match="without gradients"):
        module(torch.zeros(2, 256, requires_grad=True))


# ---------------------------------------------------------------------------------------------
# Refusals

QUERY = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("model.norm.weight", lambda array: None, ["'model.norm.weight'", "missing"]),
        ("lm_head.weight", lambda array: None, ["'lm_head.weight'", "missing"]),
        ("model.norm.weight", lambda array: array[:32], ["'model.norm.weight'", "(32,)", "(64,)"]),
        ("model.layers.0.abacus.weight", lambda array: np.ones(3, np.float32), ["abacus", "no such weight"]),
        (f"{QUERY}.bias", lambda array: np.ones(64, np.float16), [f"'{QUERY}.bias'", "no bias"]),
        (f"{QUERY}.qweight", lambda array: None, [f"'{QUERY}.weight'", "missing"]),
    ],
)
def test_wrong_tensors(small, name, change, words):
    edit_tensor(small, name, change)
    with pytest.raises(CheckpointError) as refused:
        load(small)
    for word in words:
        assert word in str(refused.value)


def test_linear_of_another_size(small):
    """q_proj's tensors in k_proj's place."""
    for part in ("qweight", "scales", "qzeros"):
        held = {}
        edit_tensor(small, f"{QUERY}.{part}", lambda array, held=held: held.setdefault("array", array))
        edit_tensor(small, f"{QUERY}.{part}".replace("q_proj", "k_proj"), lambda array, held=held: held["array"])
    with pytest.raises(CheckpointError, match="k_proj.*got 64 to 64 features, expected 64 to 32"):
        load(small)


def test_bias_that_is_missing(tmp_path):
    quantised, _ = write_model(tmp_path, "qwen2_moe")
    edit_tensor(quantised, f"{QUERY}.bias", lambda array: None)
    with pytest.raises(CheckpointError, match=f"'{QUERY}.bias'.*missing"):
        load(quantised)


def test_bias_of_zeros_that_the_model_lacks(small):
    """As AutoGPTQ writes them."""
    expected = load(small)(torch.arange(9)[None]).logits
    edit_tensor(small, f"{QUERY}.bias", lambda array: np.zeros(64, np.float16))
    assert torch.equal(load(small)(torch.arange(9)[None]).logits, expected)


def test_linear_layer_that_the_model_lacks(small):
    tensors = {}
    for part in ("qweight", "scales", "qzeros", "g_idx"):
        edit_tensor(small, f"{QUERY}.{part}", lambda array, part=part: tensors.setdefault(part, array))
        edit_tensor(small, f"model.layers.1.abacus.{part}", lambda array, part=part: tensors[part])
    with pytest.raises(CheckpointError, match="layers.1.abacus: .* no such linear layer"):
        load(small)


def test_config_that_transformers_refuses(small):
    edit_json(small, "config.json", num_attention_heads="four")
    with pytest.raises(CheckpointError, match="config.json: transformers .*num_attention_heads"):
        load(small)


def test_generation_config_that_is_none(small):
    (small / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="generation_config.json"):
        load(small)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dtype": "float64"}, ValueError, "dtype: got float64, expected one of float32"),
        ({"dtype": torch.int8}, ValueError, "dtype: got torch.int8"),
        ({"dtype": 16}, TypeError, "dtype: got int"),
        ({"backend": 3}, TypeError, "backend: got int"),
        ({"backend": "abacus"}, ValueError, "abacus"),
        ({"progress": 3}, TypeError, "progress: got int"),
        ({"num_threads": 0}, ValueError, "num_threads: got 0"),
        ({"abacus": 1}, TypeError, "abacus"),
    ],
)
def test_wrong_arguments(small, options, error, words):
    with pytest.raises(error, match=words):
        load(small, **options)


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="config.json"):
        load(tmp_path / "none")


def test_dense_backend_only_keeps_weights():
    from marlin_cy.integrations.dequantized import DenseBackend

    with pytest.raises(UnsupportedError, match="does not compute"):
        DenseBackend().new_context()
    assert isinstance(DenseBackend(), marlin_cy.Backend)
