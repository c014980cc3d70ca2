"""Alembic's entry: runs the migrations on DATABASE_URL, or on the connection that the caller hands over."""

from alembic import context
from sqlalchemy import Connection, create_engine

from store.db import database_url
from store.settings import get_settings
from store.tables import Base


def run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=Base.metadata, compare_type=True, compare_server_default=True)
    with context.begin_transaction():
        context.execute("SET lock_timeout = '10s'")  # a migration never queues behind a long reader with all others behind it
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    engine = create_engine(database_url(get_settings()))
    with engine.connect() as own:
        run(own)
        own.commit()
    engine.dispose()
