"""The project's exceptions, and how a failure of another library is told from a bug.

A message says what was expected, what was received, and the remedy.
"""

import os

MAX_LENGTH = 2000  # characters of a message
TRACEBACK = "MLX_GPT_TRACEBACK"  # set, every failure shows its traceback
# Python's own classes that a program without a bug can meet: the system's errors, MLX's (RuntimeError), numbers and
# nesting beyond a limit, and text that no encoding has. Libraries written in Rust raise a plain Exception.
# Parts of MLX's messages, of its allocator and of a failed command buffer of Metal.
NO_MEMORY = ("[malloc] Unable to allocate", "[metal::malloc]", "ErrorOutOfMemory")
TOO_LONG = ("ErrorImpactingInteractivity", "CallbackErrorTimeout")
LESS = "use a smaller model, batch or context, or --recompute; train --resume RUN continues from the last checkpoint"
RELAX = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"  # read by the driver of Apple's GPUs
OUTSIDE = (OSError, MemoryError, RuntimeError, OverflowError, UnicodeError)


class MLXGPTError(Exception):
    """An invalid file, folder or download. Exit code 1.

    The message is one printable line, whatever names and values of a file it quotes.
    """

    def __init__(self, message: object = ""):
        super().__init__(one_line(str(message)))


def one_line(text: str) -> str:
    """Return text with line ends as spaces and control characters escaped; long text loses its middle."""
    if len(text) > MAX_LENGTH:
        text = f"{text[: MAX_LENGTH // 2]} … {text[-MAX_LENGTH // 4 :]}"
    return "".join(" " if c == "\n" else c if c.isprintable() else repr(c)[1:-1] for c in text)


class Stopped(KeyboardInterrupt):
    """A signal has ended the command: Ctrl-C, SIGTERM or SIGHUP. Exit code 128 + ``signum``, as in a shell."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message)
        self.signum = signum


def explained(error: BaseException) -> str | None:
    """Return the line for a failure outside of this package; None for a bug in it, which shows its traceback.

    Outside are the classes of ``OUTSIDE``, and all that neither Python nor this package defines: those of Arrow, of
    safetensors, of rich, and panics of Rust, which are a ``BaseException``.
    """
    kind = type(error)
    library = kind.__module__.partition(".")[0]
    is_outside = kind is Exception or library not in ("builtins", "mlx_gpt") or isinstance(error, OUTSIDE)
    if os.environ.get(TRACEBACK) or not is_outside or isinstance(error, NotImplementedError):
        return None
    if isinstance(error, OSError):
        return f"{error.filename2 or error.filename or 'the disk'}: {error.strerror or error}"
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        return f"not enough memory{f' ({error})' if str(error) else ''}; {LESS}"
    if any(words in str(error) for words in TOO_LONG):
        return f"the GPU stopped a computation that took too long ({error}); {LESS}; {RELAX}=1 gives it more time"
    return f"{kind.__name__}: {error}; {TRACEBACK}=1 shows where"


class ModelFolderError(MLXGPTError):
    """A model folder or hub repository is not a readable GPT-2."""


class HubError(MLXGPTError):
    """The Hugging Face hub refused a request or cannot be reached."""


class CheckpointError(MLXGPTError):
    """A checkpoint cannot be written, or is damaged."""


class FolderInUseError(MLXGPTError):
    """Another process trains in a folder."""


class DataError(MLXGPTError):
    """Text cannot be read or trained on."""


class UsageError(MLXGPTError, ValueError):
    """An invalid setting, which the user can correct on the command line. Exit code 2."""


class TokenizerError(MLXGPTError):
    """A vocabulary cannot be read, downloaded or saved."""


class VerificationError(MLXGPTError):
    """A model does not compute what its files specify, or has a fault."""
