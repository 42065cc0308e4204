"""Python code in a process of its own."""

import json
import os
import subprocess
import sys
from typing import Any


def python(code: str, *args: object, timeout: float = 240, **env: str) -> tuple[str, str]:
    """Run code with arguments and further variables, warnings as errors; returns its stdout and stderr."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, args)]
    variables = {**os.environ, **env}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=timeout, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout, done.stderr


def in_new_process(code: str, *args: object, **env: str) -> tuple[Any, str]:
    """What code printed last, as JSON, and its stderr."""
    stdout, stderr = python(code, *args, timeout=300, **env)
    return json.loads(stdout.splitlines()[-1]), stderr
