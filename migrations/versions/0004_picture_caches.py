"""Jobs over pictures: how a model takes them, and the caches that the preparer makes of them.

Revision: 0004, after 0003.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column(
        "model",
        sa.Column("processor", sa.Text, nullable=True, comment="digest of how it takes pictures; null where it takes none"),
    )
    op.add_column("job_dataset", sa.Column("picture_key", sa.Text, nullable=True, comment="null for rows without pictures"))
    op.create_table(
        "picture_cache",
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("dataset_id", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["dataset_id"], ["dataset.id"], name=op.f("fk_picture_cache_dataset_id")),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_picture_cache_project_id")),
        sa.PrimaryKeyConstraint("key", "dataset_id", name=op.f("pk_picture_cache")),
    )
    op.create_index(op.f("ix_picture_cache_project_id"), "picture_cache", ["project_id"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_picture_cache_project_id"), table_name="picture_cache")
    op.drop_table("picture_cache")
    op.drop_column("job_dataset", "picture_key")
    op.drop_column("model", "processor")
