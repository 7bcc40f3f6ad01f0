"""OpenAI's completions API over HTTP.

Read ``row``, ``batch`` and ``engine`` first, which compute; then ``limits``, ``request`` and ``answer``, which define
the API; ``service``, which connects them; and ``exchange``, ``app`` and ``server``, which implement HTTP.
"""
