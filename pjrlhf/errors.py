"""The exception for bad input."""


class UserError(ValueError):
    """Bad input that the user can correct.

    The message names the thing, the reason and the way out. The command line prints it without a traceback.
    """
