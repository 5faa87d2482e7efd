"""The one exception for input a person can mend."""


class UserError(ValueError):
    """Bad input: the message names the thing, the reason and the way out; `main` prints it without a traceback."""
