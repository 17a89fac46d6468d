"""The exit codes of every command, for scripts. They do not change.

0  done
1  something that should not happen
2  the command line or the request is wrong: change it
3  the setup is wrong: a port, a file, a URL, a model
4  unavailable or overloaded: the same command may succeed later
5  the deadline passed
130  interrupted (Ctrl-C)
"""

from protos import errors

OK = 0
OTHER = 1
INVALID = 2
SETUP = 3
UNAVAILABLE = 4
DEADLINE = 5
INTERRUPTED = 130

_BY_CLASS: tuple[tuple[type[errors.DiptychError], int], ...] = (
    (errors.FixTheRequest, INVALID),
    (errors.FixTheSetup, SETUP),
    (errors.TryAgain, UNAVAILABLE),
    (errors.DeadlineExceeded, DEADLINE),
)


def exit_code(error: errors.DiptychError) -> int:
    """The code for an error: that of its branch of the tree."""
    return next((code for cls, code in _BY_CLASS if isinstance(error, cls)), OTHER)
