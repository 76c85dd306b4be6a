"""The one error that users see as a single line: it names what is wrong and what mends it."""

import errno

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a system says of a file for which a disk has no room


class UserError(Exception):
    """Something outside the program is wrong: a file, a recipe key, a flag.

    The message names the thing and its remedy. The command line prints it without a traceback and exits with 2.
    """
