"""Check a model's numbers and measure its quality. Read ``reference``, ``layers`` and ``verify``, then ``evaluate``."""
