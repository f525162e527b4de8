"""The errors that a user is meant to read. Everything else is a defect and keeps its traceback."""


class UserError(Exception):
    """The user can mend this: the message says what was wrong, where, and what to do. Exit code 2."""


class RunError(Exception):
    """The run cannot go on: the message says why and which log tells more. Exit code 1."""


class AttemptError(RunError):
    """This attempt cannot go on, and another one may: its head, its store or its network failed."""
