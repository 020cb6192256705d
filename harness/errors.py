"""The one exception that a person is meant to read."""


class UserError(Exception):
    """Bad input, in one line that names the thing, the place and the way out.

    The command line prints the message as it stands and exits with code 2; a traceback would only
    hide it. Anything else that escapes is a defect of the harness and keeps its traceback.
    """
