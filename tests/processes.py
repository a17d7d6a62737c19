"""New processes without the seconds that imports take: forked from one that has imported torch and transformers.

What runs in them sees arguments, environment, output and exit code as in an interpreter of its own. Where the imports
themselves matter, or what the environment makes of them, that is what a test needs (`conftest.run_python`).
"""

import atexit
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


_templates: dict[Path | None, subprocess.Popen] = {}


def run_forked(
    program: Path | str, *arguments, overlay: Path | None = None, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Run a program, a file or Python code, to its end; as `subprocess.run(capture_output=True, text=True)`.

    With `overlay`, packages in that folder come before the installed ones.
    """
    if overlay not in _templates:
        environment = {**os.environ, "PYTHONPATH": str(overlay or "")}
        _templates[overlay] = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True
        )  # fmt: skip
    template = _templates[overlay]
    command = [str(program) if isinstance(program, Path) else "-c", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("out", "err")]
        job = {
            "code": None if isinstance(program, Path) else program,
            "argv": command,
            "folder": str(Path.cwd()),
            "environment": dict(os.environ),
            "outputs": [str(path) for path in outputs],
        }
        template.stdin.write(json.dumps(job) + "\n")
        template.stdin.flush()
        if not select.select([template.stdout], [], [], timeout)[0]:
            os.killpg(template.pid, signal.SIGKILL)
            del _templates[overlay]
            raise subprocess.TimeoutExpired(command, timeout)
        answer = template.stdout.readline()
        if not answer:
            del _templates[overlay]
            raise RuntimeError(f"the process to fork from ended with {template.wait()}; its stderr says why")
        return subprocess.CompletedProcess(command, int(answer), *(path.read_text() for path in outputs))


def _template() -> None:
    """Imports; then forks for each job, which is a line on stdin, and answers with its exit code."""
    sys.path.pop(0)  # this file's folder
    for name in ("torchvision", "transformers.image_processing_utils", "transformers.modeling_utils"):
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = _run(**json.loads(line))
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # to take all modules apart first would take a second
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(code: str | None, argv: list[str], folder: str, environment: dict, outputs: list[str]) -> int:
    """The exit code."""
    for target, path in enumerate([os.devnull, *outputs]):
        source = os.open(path, os.O_RDONLY if target == 0 else os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(source, target)
        os.close(source)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = argv
    sys.path.insert(0, "" if code else str(Path(argv[0]).parent))
    try:
        if code:
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    _template()
