"""An adapter version may come from the operator's import: it has no job.

Revision: 0003, after 0002.
"""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.alter_column("adapter_version", "job_id", nullable=True)


def downgrade() -> None:
    # Without a job, the older schema has no place for them; their files stay in the storage.
    op.execute("DELETE FROM deployment USING adapter_version v WHERE v.job_id IS NULL"
               " AND deployment.adapter_id = v.adapter_id AND deployment.version = v.version")  # fmt: skip
    op.execute("DELETE FROM adapter_version WHERE job_id IS NULL")
    op.alter_column("adapter_version", "job_id", nullable=False)
