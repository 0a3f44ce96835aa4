"""Files that are whole or not there at all, and folders that one process at a time works on."""
import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path

try:
    import fcntl
except ImportError:                     # Windows
    fcntl = None


def write_json(path, document):
    write_whole(path, [json.dumps(document, indent=1).encode()])


def write_whole(path, chunks):
    """Write the chunks (bytes or arrays) to a temporary file, and rename it to `path` once it is safe on the disk: a
    crash leaves the old file as it was."""
    path = Path(path)
    temp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temp, "wb") as file:
            file.writelines(chunks)                 # frees each chunk before it takes the next; a loop would hold two
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
        sync_folder(path.parent)
    finally:
        temp.unlink(missing_ok=True)


def remove_temporary(folder):
    """Remove the temporary files and folders that killed processes have left below a folder. No other process may be
    writing to it."""
    for path in list(Path(folder).rglob(".*")):
        if re.fullmatch(r"\..+\.(tmp|old)-\d+", path.name):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def sync_folder(folder):
    """Flush the names in a folder to the disk, so that a crash does not undo a rename. Windows does so by itself, and
    cannot open folders."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def hash_of(path, size=None):
    """The SHA-256 of a file, in hex, or of its first `size` bytes. None if there is no file, or a shorter one."""
    if not path.is_file():
        return None
    found, left = hashlib.sha256(), path.stat().st_size if size is None else size
    with open(path, "rb") as file:
        while left and (chunk := file.read(min(left, 1 << 24))):
            found.update(chunk)
            left -= len(chunk)
    return None if left else found.hexdigest()


# -- one process at a time -----------------------------------------------------------------------------------------

@contextlib.contextmanager
def alone(folder):
    """Lock the stage in `folder` for a with block; waits while another process has the lock."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "a+b", buffering=0) as file:
        if not locked(file):
            file.seek(0)
            print(f"{folder.name}: process {file.read().decode()} works on it; waiting until it is done", flush=True)
            while not locked(file):
                time.sleep(.2)
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        yield                           # closing the file unlocks it, and so does the end of the process


def locked(file):
    """Try to lock an open file. False if another process has locked it."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt
            file.seek(1 << 20)          # a byte behind the text, which others may read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    return True
