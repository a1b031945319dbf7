"""A lock on a folder, which the kernel releases however the process ends."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Locks a folder inside the block.

    The lock is on the folder itself: a lock file could be deleted while it is held, and the next
    process would lock a new one. File systems that lock no folders, such as NFS, are not locked.

    Raises:
      BlockingIOError: Another process, or another block of this one, holds the lock; or the folder
        was removed and made again meanwhile.
      OSError: The folder cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            raise BlockingIOError
        yield
    finally:
        os.close(descriptor)
