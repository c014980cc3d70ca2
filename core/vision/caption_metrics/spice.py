"""SPICE (Anderson et al. 2016, arXiv 1607.08822), where its program is there.

SPICE parses captions into scene graphs with Stanford CoreNLP: a Java program with models of some 400 MB, which is no part of
strop and can't be written anew in kind. An operator who has it names the folder that holds `spice-1.0.jar` and `lib/`; for
everyone else `why_no_spice` says in a sentence why the score is missing, and a report carries that sentence in its place.
"""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from core.errors import ArtifactError

JAR = "spice-1.0.jar"
_MODELS = "stanford-corenlp-*-models.jar"
_LONGEST_SECONDS = 3600


def why_no_spice(java: Path | None, folder: Path | None) -> str | None:
    """None where SPICE can be measured. `java` is the program, `folder` SPICE's own; None where the operator names none."""
    if folder is None:
        return "SPICE is not measured: the operator has named no folder with its program"
    if not (folder / JAR).is_file():
        return f"SPICE is not measured: its folder lacks {JAR}"
    if not any((folder / "lib").glob(_MODELS)):
        return f"SPICE is not measured: its folder lacks lib/{_MODELS}, the models of its parser"
    if java is None or not java.is_file():
        return "SPICE is not measured: there is no Java to run it"
    return None


def spice(predictions: Sequence[str], references: Sequence[Sequence[str]], java: Path, folder: Path) -> float:
    """0 .. 1, the mean F1 over the pictures, of raw texts. Starts a Java process, minutes long for thousands of pictures.

    Raises ArtifactError with the end of its output when the program fails or leaves no scores.
    """
    rows = [
        {"image_id": number, "test": prediction, "refs": list(own)}
        for number, (prediction, own) in enumerate(zip(predictions, references, strict=True))
    ]
    with tempfile.TemporaryDirectory() as scratch:
        asked, told = Path(scratch, "captions.json"), Path(scratch, "scores.json")
        asked.write_text(json.dumps(rows), encoding="utf-8")
        command = [str(java), "-Xmx8G", "-jar", JAR, str(asked), "-out", str(told), "-silent"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_LONGEST_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise ArtifactError(f"SPICE was stopped after {_LONGEST_SECONDS} seconds without scores") from None
        if done.returncode != 0 or not told.is_file():
            raise ArtifactError(
                f"SPICE ended with {done.returncode} and no scores: {(done.stderr or done.stdout)[-500:].strip()}"
            )
        found = json.loads(told.read_text(encoding="utf-8"))
    return sum(float(row["scores"]["All"]["f"]) for row in found) / len(rows)
