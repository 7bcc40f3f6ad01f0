"""OpenAI's completions API over HTTP.

Read in this order: ``row``, ``rules``, ``batch``, ``engine``, which know nothing of HTTP; ``limits``, ``request``,
``answer``, which know nothing of the model at work; ``job``, ``app``, ``server``, which bring them together.
"""
