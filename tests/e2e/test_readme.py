"""The README's examples, executed as they stand against a live stack; only addresses and the key's place are put in."""

import os
import re
import subprocess
import sys

from standalone.stack import Stack
from tests.conftest import ROOT
from tests.e2e.service import Service


def block(language: str, first: str) -> str:
    """The first code block of a language that begins so."""
    blocks: list[str] = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return next(text for text in blocks if text.startswith(first))


def in_this_stack(text: str, stack: Stack) -> str:
    for written, real in {
        "http://127.0.0.1:8000": stack.api_url,
        "http://127.0.0.1:8001": stack.serving_url,
        ".strop/api_key": str(stack.api_key_file),
    }.items():
        assert written in text or written.endswith("8001")
        text = text.replace(written, real)
    return text


def test_the_curl_and_python_examples_do_what_they_say(stack: Stack, service: Service) -> None:
    script = in_this_stack(block("bash", "API="), stack)
    environment = os.environ | {"no_proxy": "127.0.0.1"}
    shell = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr + done.stdout[-3000:]
    assert '"usable_rows":175' in done.stdout.replace(" ", "")
    assert done.stdout.count("event: step") == 20
    assert '"completion_tokens"' in done.stdout.splitlines()[-1]
    assert "first" in service.served_models()

    program = [sys.executable, "-c", in_this_stack(block("python", "from pathlib"), stack)]
    told = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 0, told.stderr
    assert "/tunning" in told.stdout
    assert "/data/datasets" in told.stdout
    assert re.search(r"job_\w+: loss [\d.]+ -> [\d.]+ in 20 steps", told.stdout)
    assert ".tar.gz" in told.stdout
