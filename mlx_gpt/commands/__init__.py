"""The verbs of ``mlx-gpt``, a file each: a dataclass whose fields are the flags, and what it does when called.

What a verb needs beyond its flags is imported when it runs, so that ``mlx-gpt --help`` stays quick.
"""
