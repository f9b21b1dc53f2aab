"""The scheduler on models of several families, and on OpenCL devices."""

import threading

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from asserts import relative_error  # noqa: E402
from served import built_in, request_for, run, text_of, watched  # noqa: E402

from marlin_cy.decoder.detokenize import TextStream  # noqa: E402
from marlin_cy.decoder.load import load_model  # noqa: E402
from marlin_cy.decoder.sampling import SamplingParams  # noqa: E402
from marlin_cy.decoder.writer import Writer  # noqa: E402
from marlin_cy.serve.engine import Engine  # noqa: E402
from marlin_cy.serve.request import Request  # noqa: E402
from marlin_cy.serve.scheduler import Scheduler  # noqa: E402

FAMILIES = ("qwen3_next", "deepseek_v3", "gpt_oss")
"""One with recurrent state, one with a latent cache, one with windows."""


def request_of(model, prompt, count, seed):
    """A request to a model without a tokenizer."""
    params = SamplingParams(temperature=1.0, seed=seed)
    stream = TextStream(lambda token: b"<%d>" % token)
    return watched(Request(prompt, Writer(params, model.vocab_size, prompt, stream, frozenset(), count, 100)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_in_every_family(tmp_path, rng, family):
    """With requests that wait, share, are put back, and continue each other."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")
    from language_models import VOCABULARY, write_model

    folder = write_model(tmp_path / family, family)[0]
    model = load_model(folder, cache_tokens=128, num_threads=1)
    prompts = [rng.integers(1, VOCABULARY, int(size)).tolist() for size in (20, 50, 7, 40)]
    prompts += [prompts[1][:33] + prompts[0], prompts[3]]
    expected = []
    for seed, prompt in enumerate(prompts):
        scheduler = Scheduler(model, max_sequences=1)
        request = request_of(model, prompt, 30, seed)
        run(scheduler, {0: [request]})
        scheduler.close()
        expected.append(request.rows)
    scheduler = Scheduler(model, max_sequences=4)
    requests = [request_of(model, prompt, 30, seed) for seed, prompt in enumerate(prompts)]
    run(scheduler, {0: requests[:2], 2: requests[2:5], 40: requests[5:]})
    assert scheduler.counts().put_back > 0
    # A conversation: the whole of a sequence that was kept, and more.
    first = request_of(model, prompts[0], 9, 1)
    text_of(run(scheduler, {0: [first]})[first])
    longer = request_of(model, [*first.tokens, 5, 6, 7], 9, 2)
    run(scheduler, {0: [longer]})
    assert longer.known == len(first.tokens)
    scheduler.close()
    again = request_of(model, [*first.tokens, 5, 6, 7], 9, 2)
    run(scheduler, {0: [again]})
    for request, rows in zip([*requests, longer], [*expected, again.rows], strict=True):
        assert len(request.rows) == len(rows)
        assert all(np.array_equal(a, b) for a, b in zip(request.rows, rows, strict=True))
    scheduler.close()
    assert model.free_tokens == 128


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore::pyopencl.CompilerWarning")
def test_a_device_on_the_thread_of_the_engine(device_alone):
    """The model was loaded on another thread. Its first logits are those of the CPU, up to rounding."""
    pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")
    prompts = ["def f(", "import numpy", "def f(x):\n    return"]
    cpu = load_model(built_in(), context_length=128, num_threads=1)
    model = load_model(built_in(), device_alone, context_length=128, cache_tokens=512)
    requests = [watched(request_for(model, prompt, 12)) for prompt in prompts]
    outputs, ended = {}, threading.Event()

    def deliver(new):
        for output in new:
            outputs.setdefault(output.request, []).append(output)
        if all(request in outputs and outputs[request][-1].last for request in requests):
            ended.set()

    engine = Engine(Scheduler(model, max_sequences=2), deliver)
    engine.start()
    engine.submit(requests)
    assert ended.wait(300)
    engine.close()
    assert engine.error is None
    for request, prompt in zip(requests, prompts, strict=True):
        assert text_of(outputs[request])[2] in ("length", "stop")
        sequence = cpu.new_sequence()
        expected = cpu.forward(list(prompt.encode()), sequence=sequence)
        assert relative_error(request.rows[0].view(np.float32), expected) < 2e-3
        cpu.free(sequence)
