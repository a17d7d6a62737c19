"""Publishing: a folder is made beside its place and put there whole, in one step."""

import contextlib
import ctypes
import errno
import fnmatch
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

from .errors import ConversionError, listed


try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

# What a converted folder may hold: nothing else is ever deleted
OWN_FILES = (
    *("config.json", "preprocessor_config.json", "conversion.json", "model.safetensors", "model-*-of-*.safetensors"),
    *("model.safetensors.index.json", "*_mambavision*.py", "selective_scan*.py", "winograd.py", "fusion_triton.py"),
    *("operators.py", "README.md", "LICENSE", "requirements.txt", ".gitattributes"),
)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of file systems that have none, such as some of networks


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
        self.lock: int | None = None
        self.ours = False  # whether the workshop is this run's to clear away
        self.held = contextlib.ExitStack()  # the signals, from publishing to leaving

    def __enter__(self) -> "Workshop":
        """
        Raises:
            ConversionError: the target is there and not to be overwritten, or another run is making it.
            OSError: the workshop cannot be made.
        """
        try:
            with _signals_wait():
                self._open()
            return self
        except BaseException:
            self._close(published=False)
            raise

    def __exit__(self, kind, error, traceback) -> None:
        self._close(published=kind is None)

    def publish(self) -> None:
        """Put the new folder in the target's place, when all of it has reached the disk."""
        for file in self.new.iterdir():
            with file.open("r+b") as written:
                os.fsync(written.fileno())
        self.held.enter_context(_signals_wait())
        if not self.overwrite and os.name == "nt" and self.target.exists():
            self.target.rmdir()  # Windows renames nothing onto an empty folder
        if not self.overwrite or not self.target.exists():
            self.new.rename(self.target)  # fails where something has come into an empty folder meanwhile
        elif not exchange(self.new, self.target):
            self.target.rename(self.old)
            self.new.rename(self.target)

    def _open(self) -> None:
        self.created = [parent for parent in reversed(self.target.parents) if not parent.exists()]
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._lock()
        if self.old.exists() and not self.target.exists():
            self.old.rename(self.target)  # a run was killed between the two renames of `publish`
        for leftover in (self.new, self.old):
            if leftover.exists():
                try:
                    shutil.rmtree(leftover)
                except OSError as error:
                    raise ConversionError(
                        f"{leftover} is left from an earlier run and cannot be deleted: {error.strerror}"
                    ) from error
        self._check_target()
        self.new.mkdir()

    def _check_target(self) -> None:
        try:
            str(self.target).encode()
        except UnicodeEncodeError:
            raise ConversionError(f"{str(self.target)!a} is no name in UTF-8: choose another") from None
        if os.path.ismount(self.target):
            raise ConversionError(f"{self.target} is a mount point, which cannot be replaced: name a folder in it")
        here = Path.cwd()
        if self.target in (here, *here.parents):
            raise ConversionError(
                f"{self.target} is or holds the current folder, which cannot be replaced: name another"
            )
        if not self.target.exists() or (self.target.is_dir() and not any(self.target.iterdir())):
            return  # an empty folder holds nothing to lose
        if not self.overwrite:
            raise ConversionError(f"{self.target} exists: choose another folder, or replace it with --overwrite")
        if not (self.target / "config.json").is_file():
            raise ConversionError(f"{self.target} is not a model's folder, and --overwrite replaces nothing else")
        foreign = [
            path.name
            for path in sorted(self.target.iterdir())
            if not path.is_file() or not any(fnmatch.fnmatch(path.name, pattern) for pattern in OWN_FILES)
        ]
        if foreign:
            raise ConversionError(
                f"{self.target} holds what no conversion wrote and --overwrite would delete: {listed(foreign)}; choose"
                " another folder"
            )

    def _lock(self) -> None:
        while not self.ours:
            self.path.mkdir(exist_ok=True)
            if fcntl is None:
                self.ours = True
                return
            lock = None
            try:
                lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.ours = os.fstat(lock).st_ino == self.path.stat().st_ino
            except FileNotFoundError:
                pass  # the run before has just removed the workshop: make it anew
            except BlockingIOError:
                raise ConversionError(f"another conversion to {self.target} is running") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                self.ours = True
            finally:
                if self.ours:
                    self.lock = lock
                elif lock is not None:
                    os.close(lock)

    def _close(self, published: bool) -> None:
        with self.held, _signals_wait():
            if self.ours:
                self._remove()
            if not published:
                for parent in reversed(self.created):
                    with contextlib.suppress(OSError):  # it is in use by now
                        parent.rmdir()

    def _remove(self) -> None:
        if self.old.exists() and not self.target.exists():
            self.old.rename(self.target)  # an error between the two renames of `publish`
        for folder in (self.new, self.old):
            shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                print(f"note: {folder} could not be deleted", file=sys.stderr)
        with contextlib.suppress(OSError):
            self.path.rmdir()
        if self.lock is not None:
            os.close(self.lock)


@contextlib.contextmanager
def _signals_wait():
    """Ctrl-C and SIGTERM take effect after the block: their exception within it would leave the workshop behind."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no signal's handler runs in this thread
        return
    arrived = []
    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not None:  # of another language's code: not to be put back from here
            handlers[number] = signal.signal(number, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in arrived:
            signal.raise_signal(number)


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
    # EPERM is also how a sandbox refuses a call that it does not know; where it means the folders, renaming says so too
    if failed and code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EXDEV):
        raise OSError(code, os.strerror(code), str(b))
    return not failed
