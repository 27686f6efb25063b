"""What travels: each job's plan, and what its steps make of it."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

SECONDS = ("reduce_seconds", "decode_seconds")
COUNTS = ("rows", "sent_rows", "raw_bytes", "raw_delta_bytes")


def upgrade() -> None:
    """Adds the columns."""
    op.add_column("jobs", sa.Column("wire_plan", sa.JSON))
    for name in SECONDS:
        op.add_column("metrics", sa.Column(name, sa.Double, nullable=False, server_default="0"))
    for name in COUNTS:
        op.add_column("metrics", sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))


def downgrade() -> None:
    """Drops them."""
    for name in (*SECONDS, *COUNTS):
        op.drop_column("metrics", name)
    op.drop_column("jobs", "wire_plan")
