"""The exception for bad input, and the end of a process that Ctrl-C stops."""

import os
import signal


class UserError(ValueError):
    """Bad input that the user can correct.

    The message names the thing, the reason and the way out. The command line prints it without a traceback.
    """


def exit_on_interrupt() -> None:
    """From now on Ctrl-C ends this process at once, with one line and exit code 130."""
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))
