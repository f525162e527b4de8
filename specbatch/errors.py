"""Errors that are shown to the user as a message. Every other exception is a defect and keeps its traceback."""


class UserError(Exception):
    """A mistake that the user can correct: the message says what is wrong, where, and what to do. Exit code 2."""


class RunError(Exception):
    """The run can't continue: the message says why, and which log has more. Exit code 1."""


class EngineIncomplete(RunError):
    """One of the nodes of an engine is lost: the remaining ones end as if they were lost too, and whoever notices it
    restarts all of them."""


class AttemptError(RunError):
    """This attempt can't continue, but another one may: its head, its store or its network failed."""
