"""The project's exceptions. A message says what was expected, what was received, and the remedy."""

MAX_LENGTH = 2000  # characters of a message


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
    """A model does not compute what its files specify."""
