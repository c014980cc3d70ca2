"""The real worker with fake children: `celery -A tests.worker.fake_app worker -Q gpu -c 1`."""

import sys

from store.settings import get_settings
from worker.processes import make_worker

app = make_worker(
    get_settings(),
    train=(sys.executable, "-m", "tests.worker.fake_child"),
    prepare=(sys.executable, "-m", "tests.worker.fake_preparer"),
)
