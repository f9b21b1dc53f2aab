"""Children of ``fork``, for scripts that tests run in an interpreter of their own."""

import os
import traceback


def in_child(function):
    """Call a function in a child of ``fork``; fails if the child does."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0, "the child failed"
