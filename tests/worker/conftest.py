from collections.abc import Iterator

import pytest

from store.db import Database
from store.settings import Settings
from tests.worker.service import Service


@pytest.fixture
def service(settings: Settings, database: Database) -> Iterator[Service]:
    service = Service(settings, database)
    yield service
    service.close()
