"""Which collaboration each job is in."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Adds the column."""
    op.add_column("jobs", sa.Column("group_id", sa.String))
    op.create_index("ix_jobs_group_id", "jobs", ["group_id"])


def downgrade() -> None:
    """Drops it."""
    op.drop_index("ix_jobs_group_id", "jobs")
    op.drop_column("jobs", "group_id")
