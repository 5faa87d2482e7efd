"""The exception for bad input, how other errors are told, and the end of a process that a signal stops."""

import os
import signal


class UserError(ValueError):
    """Bad input that the user can correct.

    The message names the thing, the reason and the way out. The command line prints it without a traceback.
    """

    def within(self, path: str) -> "UserError":
        """The same error of a section at the dotted `path`, whose message starts with a key of that section."""
        return UserError(f"{path}.{self}")


def described(error: BaseException) -> str:
    """The kind of an error and what it says, on one line, for a message about other people's code."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def reason_of(error: BaseException, limit: int | None = None) -> str:
    """What an error says, on one line of at most `limit` characters; its kind where it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def ending_signals() -> list[signal.Signals]:
    """Signals that end a process: Ctrl-C, a scheduler, a terminal that closes. Those that the starter of this process
    has it ignore, as nohup does, are not among them.
    """
    found = [signal.SIGINT]
    return found + [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN]


def stopped_by(number: int) -> str:
    """How a signal ended this process, for a message."""
    return "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"


def exit_on_signals() -> None:
    """From now on a signal ends this process at once, with one line and exit code 128 + its number."""

    def end(number: int, _: object) -> None:
        os.write(2, f"{stopped_by(number)}\n".encode())
        os._exit(128 + number)

    for number in ending_signals():
        signal.signal(number, end)
