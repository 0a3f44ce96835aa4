"""Files of the hub's cache, for data/hub.py: locked while they are downloaded, renamed when they are whole, linked."""
import os
import secrets
import shutil
from contextlib import contextmanager, nullcontext

try:
    import fcntl
except ImportError:                     # Windows
    fcntl = None


def size_of(path):
    """The size of a file in bytes, or -1 if it does not exist."""
    return path.stat().st_size if path.is_file() else -1


@contextmanager
def locked(path, name):
    """Lock the partial file `path` for the length of a with block; waits while another process holds the lock.

    Windows and some network disks have no such locks. There, two processes that download the same file mix their bytes,
    see a wrong hash, and try again.
    """
    with open(path, "ab") if fcntl else nullcontext() as file:      # Windows cannot rename an open file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"hub: another process downloads {name}, waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except (AttributeError, OSError):
            pass
        yield
        path.unlink(missing_ok=True)            # the empty file of open(), if another process finished the download


@contextmanager
def renamed(path):
    """Yield a temporary path to write to, and rename it to `path` at the end, so that no half-written file is seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temp
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def link(blob, pointer):
    """Make `pointer` a relative link to `blob`, or a copy of it where links are not possible."""
    with renamed(pointer) as temp:
        try:
            os.symlink(os.path.relpath(blob, pointer.parent), temp)
        except OSError:                         # Windows without the privilege, Google Drive
            shutil.copyfile(blob, temp)
