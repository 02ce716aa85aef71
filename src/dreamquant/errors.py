"""The tree of errors.

    DreamQuantError              anything a user can cause; the CLI prints it in one line and exits with status 2
    ├── ModelError               the network cannot be read, or is not one this package can work on
    │   └── UnsupportedOperator  an operator has no counterpart, on the way in or on the way out
    ├── OptionError              an unknown name, or a value that is impossible here
    ├── DataError                samples or labelled data cannot be read, or do not fit the network
    ├── OutputError              the result cannot be written where it should go
    └── VerificationError        the file that was written does not do what was measured

Every message says what was given, what is known, and why it cannot work.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class DreamQuantError(Exception):
    """Base of all errors that a user can cause."""


class ModelError(DreamQuantError):
    """The network cannot be read, or is not one this package can work on."""


class UnsupportedOperator(ModelError):  # noqa: N818 - the operator is what is wrong
    """An operator has no counterpart in the inner graph or in the output format."""


class OptionError(DreamQuantError):
    """An unknown name, or a value that is impossible here."""


class DataError(DreamQuantError):
    """Samples or labelled data cannot be read, or do not fit the network."""


class OutputError(DreamQuantError):
    """The result cannot be written where it should go."""


class VerificationError(DreamQuantError):
    """The file that was written does not do what was measured."""


def unknown(what: str, given: str, known: Iterable[str]) -> str:
    """One sentence for an unknown name: what was given, the nearest known one, and all that are known."""
    names = sorted(known)
    near = get_close_matches(given, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {given!r}{hint} (known: {', '.join(names) or 'none'})"


@contextmanager
def blamed(kind: type[DreamQuantError], what: str) -> Iterator[None]:
    """Whatever the bytes of an input lead to, inside the libraries that read it, is an error of `kind`, after `what`."""
    try:
        yield
    except DreamQuantError:
        raise
    except Exception as error:
        raise kind(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeError):
        return "it is no text (UTF-8)"
    told = str(getattr(error, "strerror", None) or error)
    line = next((line.strip() for line in told.splitlines() if line.strip()), "")
    return line or type(error).__name__


def printable(text: str) -> str:
    """A text in one line, with what a terminal would not show, or would obey, written as escapes."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in line)
