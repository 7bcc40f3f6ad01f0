"""The built-in corpus: short stories whose best possible loss is known."""
