"""Model folders that tests write again and again: each is made once in a process, then copied."""

import functools
import shutil
import tempfile
from pathlib import Path


def written_once(write):
    """Decorate ``write(folder, *arguments, **options)``, which gives paths in the folder that it writes.

    A call with arguments of an earlier call copies the files of that call. A test may change its copy. Calls with a
    function among their arguments are not remembered: two functions may look alike.
    """
    root = tempfile.TemporaryDirectory()
    written = {}

    @functools.wraps(write)
    def copied(folder, *arguments, **options):
        if any(map(callable, (*arguments, *options.values()))):
            return write(folder, *arguments, **options)
        key = repr((arguments, sorted(options.items())))
        if key not in written:
            original = Path(root.name, str(len(written)))
            written[key] = original, write(original, *arguments, **options)
        original, paths = written[key]
        shutil.copytree(original, folder, dirs_exist_ok=True)
        return tuple(folder / path.relative_to(original) for path in paths)

    return copied
