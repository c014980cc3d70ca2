"""How fast pictures are trained on: `python -m benchmarks.vision --cases jpeg-pipeline`, here and on a GPU.

A case is a line of TARGETS and of `_measure`. `jpeg-pipeline` is of one CPU core and needs no GPU: see benchmarks/pictures.py.
"""

import argparse
import sys
import tempfile
import traceback
from pathlib import Path

from benchmarks.results import FOLDER, Results

TARGETS: dict[str, tuple[str, float, float]] = {
    "jpeg-pipeline": ("samples_per_core_second", 300, 500),
}
"""Case -> (metric, must, aim)."""
CASES = ["jpeg-pipeline"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--pictures", type=int, default=200, help="of jpeg-pipeline's shards together")
    parser.add_argument("--turns", type=int, default=7, help="repetitions that are measured")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result file")
    parser.add_argument("--commit", help="of the tree, where git can't say")
    arguments = parser.parse_args()
    failed = []
    for case in arguments.cases.split(","):
        with tempfile.TemporaryDirectory(prefix="strop-vision-") as work:
            try:
                _measure(case, Path(work), arguments)
            except Exception as error:
                traceback.print_exc()
                failed.append(f"{case}: {type(error).__name__}: {error}")
    if failed:
        sys.exit("; ".join(failed))


def _measure(case: str, work: Path, arguments: argparse.Namespace) -> None:
    if case != "jpeg-pipeline":
        raise ValueError(f"no such case; there are {', '.join(CASES)}")
    import PIL

    from benchmarks import pictures

    results = Results(
        "vision", "one CPU core", folder=arguments.out, commit=arguments.commit, versions={"pillow": PIL.__version__}
    )
    _, must, aim = TARGETS[case]
    pictures.measure(results, case, must, aim, work, pictures=arguments.pictures, turns=arguments.turns)


if __name__ == "__main__":
    main()
