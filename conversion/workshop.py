"""Publishing: a folder is made beside its place and put there whole, in one step."""

import contextlib
import ctypes
import errno
import os
import shutil
from pathlib import Path

from .errors import ConversionError


try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


class Workshop:
    """A folder beside the target, `.NAME.partial`, in which the new one is made.

    A run that is killed, at any moment, leaves the target as it was or new and whole. What it leaves in the workshop is
    cleared away by the next run to the same target. A lock keeps two runs to one target apart.
    """

    def __init__(self, target: Path, overwrite: bool):
        self.target = target
        self.overwrite = overwrite
        self.path = target.parent / f".{target.name}.partial"
        self.new = self.path / "mambavision"  # transformers names the modules by the folder that it loads
        self.old = self.path / "replaced"
        self.created: list[Path] = []

    def __enter__(self) -> "Workshop":
        """
        Raises:
            ConversionError: the target is there and not to be overwritten, or another run is making it.
            OSError: the workshop cannot be made.
        """
        self.created = [parent for parent in reversed(self.target.parents) if not parent.exists()]
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._remove_created)
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._lock()
            on_error.callback(self._remove)
            if self.old.exists() and not self.target.exists():
                self.old.rename(self.target)  # a run was killed between the two renames of `publish`
            for leftover in (self.new, self.old):
                if leftover.exists():
                    shutil.rmtree(leftover)
            self._check_target()
            self.new.mkdir()
            on_error.pop_all()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._remove()
        if kind is not None:
            self._remove_created()

    def publish(self) -> None:
        """Put the new folder in the target's place, when all of it has reached the disk."""
        for file in self.new.iterdir():
            with file.open("r+b") as written:
                os.fsync(written.fileno())
        if not self.target.exists():
            self.new.rename(self.target)
        elif not exchange(self.new, self.target):
            self.target.rename(self.old)
            self.new.rename(self.target)

    def _check_target(self) -> None:
        if self.target.exists():
            if not self.overwrite:
                raise ConversionError(f"{self.target} exists: choose another folder, or replace it with --overwrite")
            if not (self.target / "config.json").is_file():
                raise ConversionError(f"{self.target} is not a model's folder, and --overwrite replaces nothing else")

    def _lock(self) -> None:
        while True:
            self.path.mkdir(exist_ok=True)
            if fcntl is None:
                return
            self.lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(self.lock).st_ino == self.path.stat().st_ino:
                    return
            except FileNotFoundError:
                pass  # the run before has just removed the workshop: make it anew
            except BlockingIOError:
                os.close(self.lock)
                raise ConversionError(f"another conversion to {self.target} is running") from None
            os.close(self.lock)

    def _remove(self) -> None:
        if self.old.exists() and not self.target.exists():
            self.old.rename(self.target)  # an error between the two renames of `publish`
        for folder in (self.new, self.old):
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()
        if fcntl is not None:
            os.close(self.lock)

    def _remove_created(self) -> None:
        for parent in reversed(self.created):
            with contextlib.suppress(OSError):  # it is in use by now
                parent.rmdir()


def exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step, by renameat2 on Linux or renamex_np on macOS.

    Returns:
        False where the system or the file system cannot.
    """
    if os.name != "posix":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    swap = 2  # RENAME_EXCHANGE, and RENAME_SWAP
    if hasattr(libc, "renameat2"):
        at_cwd = -100
        failed = libc.renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), swap)
    elif hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(os.fsencode(a), os.fsencode(b), swap)
    else:
        return False
    code = ctypes.get_errno()
    if failed and code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(code, os.strerror(code), str(b))
    return not failed
