"""GPT-2, fast and readable. Read in this order: ``attention``, ``mlp``, ``block``, ``gpt``; then ``cache``.

Axis letters, the same in every comment of this package:

    B  batch: sequences side by side
    T  queries: the tokens that are being computed now
    S  keys: the tokens that may be looked at (S == T without a cache, S >= T with one)
    C  width of the residual stream (``n_embd``)
    H  heads (``n_head``)
    D  width of one head (C / H)
    V  vocabulary (``vocab_size``)
"""
