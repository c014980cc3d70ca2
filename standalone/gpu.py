"""How one card is shared on one machine: the inference endpoint takes a part, training plans with the rest.

Asks `nvidia-smi` for the card's size, since this house knows no torch. No `nvidia-smi`, no card: nothing is set.
"""

import shutil
import subprocess
from functools import cache

SERVING_SHARE = 0.3


@cache
def serving_share_gib() -> float | None:
    """GiB of the smallest card that the endpoint may take beside a training worker; None on a machine without a GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    sizes_mib = [float(line) for line in done.stdout.split() if line.replace(".", "", 1).isdigit()]
    return SERVING_SHARE * min(sizes_mib) / 1024 if done.returncode == 0 and sizes_mib else None
