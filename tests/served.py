"""Models and requests for the tests of serving."""

from importlib.resources import files

from fake_model import FakeModel

from marlin_cy.commands.options import BUILT_IN
from marlin_cy.decoder.cache import CacheFull, pages_of
from marlin_cy.decoder.generate import new_writer, tokenizer_of
from marlin_cy.decoder.sampling import SamplingParams
from marlin_cy.serve.request import Request

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


class FullModel(FakeModel):
    """A small model whose cache can be full. Sequences share no pages."""

    def forward_batch(self, pairs, *, all_logits=False):
        pairs = list(pairs)
        needed = sum(pages_of(len(one.tokens) + len(tokens)) - pages_of(len(one.tokens)) for one, tokens in pairs)
        if needed * 16 > self.free_tokens:
            raise CacheFull("cache: full")
        return super().forward_batch(pairs, all_logits=all_logits)


def built_in():
    """The folder of the built-in model."""
    return files("marlin_cy") / BUILT_IN


def chat_folder(path):
    """The built-in model with a chat template, in a new folder."""
    import json

    path.mkdir()
    for file in built_in().iterdir():
        if file.name != "tokenizer_config.json":
            (path / file.name).symlink_to(file)
    config = json.loads((built_in() / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return path


def request_for(model, prompt, max_new_tokens=None, *, top_scores=None, **sampling):
    """A request for the continuation of a text or of tokens."""
    tokenizer = tokenizer_of(model)
    tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    params = SamplingParams(**sampling)
    writer = new_writer(model, tokenizer, tokens, params, max_new_tokens, continues=True)
    return Request(tokens, writer, top_scores=top_scores)


def run(scheduler, arrivals=(), *, limit=10000):
    """Step until all requests have ended; gives the outputs of each request.

    Parameters
    ----------
    scheduler
    arrivals : mapping of int to list of Request
        By the number of the step before which they are submitted.
    """
    arrivals = dict(arrivals)
    outputs = {}
    for step in range(limit):
        if step in arrivals:
            scheduler.submit(arrivals.pop(step))
        if scheduler.idle and not arrivals:
            return outputs
        for output in scheduler.step():
            outputs.setdefault(output.request, []).append(output)
    raise AssertionError(f"requests have not ended after {limit} steps")


def text_of(outputs):
    """The text, the tokens and the reason of the end of a request's outputs."""
    pieces = [output.piece for output in outputs]
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    return "".join(piece.text for piece in pieces), [t for piece in pieces for t in piece.tokens], pieces[-1][2]
