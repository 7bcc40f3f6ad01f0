"""What goes wrong at the boundaries, as one small tree. Messages say what was expected, what came, what to do."""

LONGEST = 2000  # characters of a message


class MLXGPTError(Exception):
    """Something outside the program is not as it should be: a file, a folder, a download. Exit code 1.

    Its message is one line that a terminal can show, whatever names and values a file brought into it.
    """

    def __init__(self, message: object = ""):
        super().__init__(one_line(str(message)))


def one_line(text: str) -> str:
    """Line ends as spaces, what a terminal would obey written out; of what is endless, the beginning and the end."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 4 :]}"
    return "".join(" " if c == "\n" else c if c.isprintable() else repr(c)[1:-1] for c in text)


class ModelFolderError(MLXGPTError):
    """A model folder or hub repository that cannot be read as a GPT-2."""


class HubError(MLXGPTError):
    """Something that the Hugging Face hub does not give, or the way to it is broken."""


class CheckpointError(MLXGPTError):
    """A checkpoint that cannot be written, or read as it was written."""


class DataError(MLXGPTError):
    """Text that cannot be read or trained on."""


class UsageError(MLXGPTError, ValueError):
    """A setting the user can correct on the command line. Exit code 2."""


class TokenizerError(MLXGPTError):
    """A vocabulary that cannot be read, fetched or saved."""


class VerificationError(MLXGPTError):
    """A model that does not compute what its files say."""
