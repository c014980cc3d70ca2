"""What finished runs measured, beside what was planned for them: it refines the plans of their kind (core/plan/refine.py)."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "measured_peak",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("planned_gib", sa.Float(precision=53), nullable=False),
        sa.Column("measured_gib", sa.Float(precision=53), nullable=False),
        sa.Column("ratio", sa.Float(precision=53), nullable=False, comment="core.plan.refine.ratio_of"),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_measured_peak_job_id")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_measured_peak")),
    )
    op.create_index("ix_measured_peak_kind", "measured_peak", ["device", "base_model", "method", "at"])


def downgrade() -> None:
    op.drop_index("ix_measured_peak_kind", table_name="measured_peak")
    op.drop_table("measured_peak")
