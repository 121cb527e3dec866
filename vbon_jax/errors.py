"""The one error that means: what the user gave is wrong, not the program."""


class InputError(ValueError):
    """Bad input from the user: the command line shows its text as one line and exits with code 2.

    The text names the thing, its value, and what to do about it.
    """
