"""A model for several clients at once: the OpenAI interface over HTTP.

::

    HTTP ── api ── service ── engine (a thread) ── scheduler ── model.forward_batch
                     │                                │
                 tokenizer                     running requests, a queue, kept prefixes

``scheduler`` knows neither threads nor HTTP, ``engine`` no HTTP. Everything above ``engine`` runs on the event loop.
"""
