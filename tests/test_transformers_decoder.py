"""The decoder as a model of transformers: ``marlin_cy.integrations.decoder_model``."""

import copy
import gc
import pickle
import threading
from importlib.resources import files

import numpy as np
import pytest

from marlin_cy import cli, load_model
from marlin_cy.commands.run import BUILT_IN
from marlin_cy.decoder.cache import CacheFull
from marlin_cy.errors import CheckpointError, UnsupportedError

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

from family_models import write_family  # noqa: E402
from language_models import write_model  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from marlin_cy.integrations.decoder_cache import DecoderCache  # noqa: E402
from marlin_cy.integrations.decoder_model import CACHE  # noqa: E402
from marlin_cy.integrations.transformers import MarlinCyConfig  # noqa: E402

FOLDER = str(files("marlin_cy") / BUILT_IN)
OPTIONS = {"num_threads": 1, "context_length": 128, "cache_tokens": 1024}
TEXT = np.frombuffer(b"def quicksort(values):\n    if len(values) < 2:\n        return values\n", np.uint8).astype(
    np.int64
)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 256}

torch.set_num_threads(1)


def new_model(folder=FOLDER, **changes):
    config = MarlinCyConfig.for_folder(folder, decoder=True, **{**OPTIONS, **changes})
    return AutoModelForCausalLM.from_pretrained(folder, config=config)


@pytest.fixture(scope="module")
def shared():
    return new_model()


@pytest.fixture
def model(shared):
    """The model. After a test, all of its cache is free."""
    yield shared
    if free_tokens(shared) < OPTIONS["cache_tokens"]:
        gc.collect()  # a traceback may hold a cache
    assert free_tokens(shared) == OPTIONS["cache_tokens"]


def free_tokens(model):
    with model.decoder.using() as decoder:
        return decoder.free_tokens


@pytest.fixture(scope="module")
def plain():
    """The decoder without transformers."""
    return load_model(FOLDER, **OPTIONS)


def tokens(*rows):
    return torch.from_numpy(np.stack(rows))


def padded(lengths, *, left=True):
    """``(ids, mask)`` of prompts of these lengths."""
    ids = np.full((len(lengths), max(lengths)), 256)
    for row, length in zip(ids, lengths, strict=True):
        row[-length:] = TEXT[:length]
        if not left:
            row[:] = np.roll(row, length)
    return torch.from_numpy(ids), torch.from_numpy((ids != 256).astype(np.int64))


def logits_of(plain, ids):
    sequence = plain.new_sequence()
    logits = plain.forward(ids, sequence=sequence, all_logits=True)
    plain.free(sequence)
    return logits


def cache_of(output):
    return getattr(output, CACHE)


# ---------------------------------------------------------------------------------------------
# Logits


def test_logits_are_those_of_the_decoder(model, plain):
    expected = logits_of(plain, TEXT)
    found = model(tokens(TEXT)).logits
    assert found.dtype == torch.float32
    assert np.array_equal(found[0].numpy(), expected)
    assert np.array_equal(model(tokens(TEXT), logits_to_keep=1).logits[0].numpy(), expected[-1:])
    assert np.array_equal(model(tokens(TEXT), logits_to_keep=3, use_cache=False).logits[0].numpy(), expected[-3:])
    assert np.array_equal(model(tokens(TEXT), logits_to_keep=torch.tensor([0, 5])).logits[0].numpy(), expected[[0, 5]])
    assert np.array_equal(model(tokens(TEXT), return_dict=False)[0][0].numpy(), expected)


def test_logits_with_a_cache(model, plain):
    expected = logits_of(plain, TEXT)
    first = model(tokens(TEXT[:20]))
    assert cache_of(first).get_seq_length() == 20
    second = model(tokens(TEXT[20:]), **{CACHE: cache_of(first)})
    assert cache_of(second) is cache_of(first)
    assert np.array_equal(second.logits[0].numpy(), expected[20:])
    assert cache_of(model(tokens(TEXT), use_cache=False)) is None


@pytest.mark.parametrize("left", [True, False])
def test_padded_rows(model, plain, left):
    """Each row has the logits that it has alone, and padding has zeros."""
    lengths = (30, 7, 1)
    ids, mask = padded(lengths, left=left)
    found = model(ids, attention_mask=mask).logits.numpy()
    for row, kept, length in zip(found, mask.numpy() == 1, lengths, strict=True):
        assert np.array_equal(row[kept], logits_of(plain, TEXT[:length]))
        assert not row[~kept].any()


@pytest.mark.parametrize("family", ["qwen3_next", pytest.param("deepseek_v3", marks=pytest.mark.sweep)])
def test_families(tmp_path, family):
    folder = write_model(tmp_path, family)[0]
    ids = torch.arange(1, 20)[None]
    model, plain = new_model(folder), load_model(folder, **OPTIONS)
    assert np.array_equal(model(ids).logits[0].numpy(), logits_of(plain, ids[0].numpy()))
    found = model.generate(ids, max_new_tokens=5, **GREEDY | {"pad_token_id": 0})
    sequence, expected = plain.new_sequence(), []
    logits = plain.forward(ids[0].numpy(), sequence=sequence)
    for _ in range(5):
        expected.append(int(logits.argmax()))
        logits = plain.forward(expected[-1:], sequence=sequence)
    assert found[0, 19:].tolist() == expected


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["packed", "gguf"])
def test_other_folders(tmp_path, kind):
    if kind == "gguf":
        pytest.importorskip("gguf", reason="gguf is not installed")
        from gguf_files import write_gguf_model

        folder = write_gguf_model(tmp_path, "qwen3_moe")[0].parent  # with PEFT, AutoModel takes a file for a repository
    else:
        folder = tmp_path / "packed"
        assert cli.main(["pack", str(write_model(tmp_path, "qwen3_moe")[0]), str(folder)]) == 0
    ids = torch.arange(1, 12)[None]
    plain = load_model(folder, **OPTIONS)
    assert np.array_equal(new_model(folder)(ids).logits[0].numpy(), logits_of(plain, ids[0].numpy()))


# ---------------------------------------------------------------------------------------------
# generate()


def test_greedy_text_is_that_of_the_decoder(model, plain):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    (answer,) = pipeline("def f(", max_new_tokens=12, do_sample=False, return_full_text=False)
    assert answer["generated_text"] == "".join(piece.text for piece in plain.generate("def f(", max_new_tokens=12))


def test_batch_with_padding_gives_what_each_prompt_gives(model):
    lengths = (30, 7, 1)
    ids, mask = padded(lengths)
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=8, **GREEDY)
    for row, length in zip(batch, lengths, strict=True):
        alone = model.generate(tokens(TEXT[:length]), max_new_tokens=8, **GREEDY)
        assert torch.equal(row[30:], alone[0, length:])


def test_sampling_is_that_of_transformers(model):
    """The cache changes no token: the logits have the same bits without it."""
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        options = {**GREEDY, "do_sample": True, "temperature": 1.5, "top_p": 0.9, "num_return_sequences": 3}
        texts.append(model.generate(tokens(TEXT[:9]), max_new_tokens=10, use_cache=use_cache, **options))
    assert torch.equal(*texts)
    assert len({tuple(row) for row in texts[0].tolist()}) > 1


def test_beams_are_forks(model):
    """As without a cache, where no sequence is forked."""
    ids, mask = padded((20, 9))
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8, "attention_mask": mask}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_equal_prompts_run_once(model, monkeypatch):
    rows = []
    with model.decoder.using() as decoder:
        run = decoder.forward_batch
        monkeypatch.setattr(
            decoder, "forward_batch", lambda pairs, **options: rows.append(len(pairs)) or run(pairs, **options)
        )
    model.generate(tokens(TEXT[:9]), max_new_tokens=3, num_beams=4, **GREEDY)
    assert rows[0] == 1
    assert rows[1] == 4


@pytest.mark.parametrize("options", [{"assistant_model": True}, {"prompt_lookup_num_tokens": 4}])
def test_assisted_generation(model, options):
    """Tokens that are not accepted are taken back."""
    if "assistant_model" in options:
        options = {"assistant_model": model}
    greedy = {**GREEDY, "eos_token_id": 256, "max_new_tokens": 16}  # earlier versions look it up in candidates
    expected = model.generate(tokens(TEXT), **greedy)
    assert torch.equal(model.generate(tokens(TEXT), **options, **greedy), expected)


def test_chunked_prefill_and_a_cache_of_the_caller(model):
    expected = model.generate(tokens(TEXT), max_new_tokens=6, **GREEDY)
    assert torch.equal(model.generate(tokens(TEXT), max_new_tokens=6, prefill_chunk_size=16, **GREEDY), expected)
    prefix = cache_of(model(tokens(TEXT[:32])))
    for _ in range(2):
        twin = copy.deepcopy(prefix)
        assert torch.equal(model.generate(tokens(TEXT), max_new_tokens=6, **{CACHE: twin}, **GREEDY), expected)
    assert prefix.get_seq_length() == 32


def test_threads_take_turns(model):
    expected = [model.generate(tokens(TEXT[:length]), max_new_tokens=8, **GREEDY) for length in (5, 20)]
    found = [None, None]

    def work(number, length):
        found[number] = model.generate(tokens(TEXT[:length]), max_new_tokens=8, **GREEDY)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate((5, 20))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, found, expected))


# ---------------------------------------------------------------------------------------------
# The cache


def test_rows_of_a_cache(model, plain):
    """Rows that are reordered, repeated and dropped continue as alone."""
    cache = cache_of(model(tokens(TEXT[:9], TEXT[10:19], TEXT[20:29])))
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 5]))
    cache.crop(-2)
    assert (cache.get_seq_length(), cache.batch_size, cache.get_max_length()) == (7, 3, 128)
    found = model(tokens(TEXT[:3], TEXT[:3], TEXT[30:33]), **{CACHE: cache}).logits
    for row, (begin, after) in zip(found, ((20, 0), (20, 0), (0, 30)), strict=True):
        expected = logits_of(plain, [*TEXT[begin : begin + 7], *TEXT[after : after + 3]])
        assert np.array_equal(row.numpy(), expected[7:])
    cache.crop(4)
    assert cache.get_seq_length() == 4
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size) == (0, 0)


def test_a_cache_that_is_full(model):
    """A call that fails leaves the cache as it was."""
    cache = cache_of(model(tokens(*[TEXT[:40]] * 2)))
    with pytest.raises(CacheFull, match="cache_tokens"):
        model(tokens(*[np.roll(TEXT, number) for number in range(20)]))
    with pytest.raises(ValueError, match="context has 128 positions"):
        model(tokens(*[np.tile(TEXT, 3)[:100]] * 2), **{CACHE: cache})
    assert cache.get_seq_length() == 40
    model(tokens(*[TEXT[:5]] * 2), **{CACHE: cache})
    assert cache.get_seq_length() == 45


# ---------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, UnsupportedError, "row 0 has zeros between ones"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, UnsupportedError, r"attention_mask: got shape \(1, 1, 4, 4\)"),
        ({"position_ids": torch.tensor([[1, 2, 3, 4]])}, UnsupportedError, "position_ids: expected those that follow"),
        ({"position_ids": torch.tensor([[1, 2]])}, ValueError, "position_ids: got shape"),
        ({"labels": torch.tensor([[1]])}, UnsupportedError, "labels: the decoder does not support it"),
        ({"output_hidden_states": True}, UnsupportedError, "output_hidden_states"),
        ({"cache": transformers.DynamicCache()}, UnsupportedError, "got a DynamicCache, expected a DecoderCache"),
        ({"input_ids": None, "inputs_embeds": torch.ones(1, 4, 256)}, UnsupportedError, "inputs_embeds"),
        ({"input_ids": torch.tensor([[1, 2, 3, 9999]])}, IndexError, "got id 9999"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, ValueError, "input_ids"),
    ],
)
def test_arguments(model, options, error, words):
    with pytest.raises(error, match=words):
        model(**{"input_ids": torch.tensor([[1, 2, 3, 4]]), **options})


def test_caches_that_do_not_fit(model):
    ids, mask = padded((9, 4))
    cache = cache_of(model(ids, attention_mask=mask))
    with pytest.raises(UnsupportedError, match="attention_mask: differs"):
        model(ids[:, :1], attention_mask=torch.ones(2, 10), **{CACHE: cache})
    with pytest.raises(ValueError, match="got 1 rows, expected 2"):
        model(ids[:1], **{CACHE: cache})
    with pytest.raises(UnsupportedError, match="of this model"):
        new_model()(ids, **{CACHE: cache})
    with pytest.raises(UnsupportedError, match="takes no keys"):
        cache.update(None, None, 0)
    with pytest.raises(UnsupportedError, match="cache_implementation: got 'static'"):
        model.generate(ids, attention_mask=mask, cache_implementation="static", max_new_tokens=2)


def test_state_cannot_be_taken_back(tmp_path):
    model = new_model(write_model(tmp_path, "qwen3_next")[0])
    ids = torch.arange(1, 9)[None]
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids, max_new_tokens=4, assistant_model=model)
    cache = cache_of(model(ids))
    assert not cache.is_croppable
    with pytest.raises(UnsupportedError, match="recurrent state"):
        cache.crop(-1)
    beams = {"num_beams": 3, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dtype": "bfloat16"}, UnsupportedError, "dtype: got bfloat16, expected 'auto'"),
        ({"attn_implementation": "sdpa"}, UnsupportedError, "attn_implementation: got 'sdpa'"),
        ({"device_map": "cuda"}, UnsupportedError, "device_map: got 'cuda'"),
        ({"abacus": 1}, TypeError, "abacus: the decoder has no such option"),
    ],
)
def test_options_of_from_pretrained(options, error, words):
    config = MarlinCyConfig.for_folder(FOLDER, decoder=True)
    with pytest.raises(error, match=words):
        AutoModelForCausalLM.from_pretrained(FOLDER, config=config, **options)


def test_options_of_load_model(tmp_path):
    with pytest.raises(ValueError, match="cache_dtype: got 'int3'"):
        new_model(cache_dtype="int3")
    with pytest.raises(TypeError, match="decoder: got 'yes', expected a bool"):
        MarlinCyConfig.for_folder(FOLDER, decoder="yes")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        MarlinCyConfig.for_folder(tmp_path, decoder=True)


def test_a_family_that_the_decoder_lacks(tmp_path):
    with pytest.raises(UnsupportedError, match="decoder"):
        new_model(write_family(tmp_path, "jamba")[0])


def test_what_the_model_cannot_do(model, tmp_path):
    for refused in (lambda: model.save_pretrained(tmp_path), lambda: pickle.dumps(model), lambda: copy.deepcopy(model)):
        with pytest.raises(UnsupportedError, match="cannot be"):
            refused()
    with pytest.raises(UnsupportedError, match="continuous batching"):
        model.generate_batch(inputs=[[1, 2]])
    assert isinstance(cache_of(model(tokens(TEXT[:3]))), DecoderCache)
    assert "marlin_cy_decoder" in repr(model.config)
