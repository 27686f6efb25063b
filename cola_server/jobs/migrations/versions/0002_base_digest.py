"""The digest of the base model that each job began on."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Adds the column."""
    op.add_column("jobs", sa.Column("base_digest", sa.String))


def downgrade() -> None:
    """Drops it."""
    op.drop_column("jobs", "base_digest")
