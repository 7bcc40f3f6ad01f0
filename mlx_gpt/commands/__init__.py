"""The commands of ``mlx-gpt``, one per file: a dataclass whose fields are the flags, run by calling it.

Other modules are imported when a command runs, so that ``mlx-gpt --help`` starts quickly.
"""
