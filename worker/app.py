"""`celery -A worker.app worker -Q gpu -c 1` (one per GPU slot) or `-Q prepare`: the workers of the service."""

from store.settings import get_settings
from worker.processes import make_worker

app = make_worker(get_settings())
