"""New processes without the seconds that imports take: forked from one that has imported torch and transformers.

What runs in them sees arguments, environment, output and exit code as in an interpreter of its own. Where the imports
themselves matter, or what the environment makes of them, that is what a test needs (`conftest.run_python`).
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


_path = sys.path.copy()  # not what tests and libraries put there since
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torchvision", "transformers.image_processing_utils", "transformers.modeling_utils"])


def run_forked(program: Path | str, *arguments, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a program, a file or Python code, to its end; as `subprocess.run(capture_output=True, text=True)`."""
    command = [str(program) if isinstance(program, Path) else "-c", *map(str, arguments)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pipes = [multiprocessing.reduction.DupFd(file.fileno()) for file in (out, err)]
        process = _context.Process(
            target=_main, args=(program, command, _path, dict(os.environ), str(Path.cwd()), pipes)
        )
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(command, timeout)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(command, process.exitcode, *texts)


def _main(program: Path | str, command: list, path: list, environment: dict, folder: str, pipes: list) -> None:
    for target, pipe in zip((1, 2), pipes, strict=True):
        source = pipe.detach()
        os.dup2(source, target)
        os.close(source)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = command
    sys.path = [str(program.parent) if isinstance(program, Path) else "", *path]
    try:
        if isinstance(program, Path):
            runpy.run_path(str(program), run_name="__main__")
        else:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
