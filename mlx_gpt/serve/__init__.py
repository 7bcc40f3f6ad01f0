"""OpenAI's completions API over HTTP.

Read in this order: ``row``, ``rules``, ``batch``, ``engine``, which know nothing of HTTP; ``limits``, ``request``,
``answer``, which know nothing of the model at work; ``service``, which brings them together; ``exchange``, ``app``,
``server``, which speak HTTP.
"""
