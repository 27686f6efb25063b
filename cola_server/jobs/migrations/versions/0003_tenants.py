"""Whose each file and job is. What is there already is the tenant `default`'s; a key is unique within its tenant."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Adds the columns, and puts tenants before keys."""
    for table in ("files", "jobs"):
        op.add_column(table, sa.Column("tenant", sa.String, nullable=False, server_default="default"))
        op.create_index(f"ix_{table}_tenant", table, ["tenant"])
        rows = sa.table(table, sa.column("tenant"), sa.column("idempotency_key"))
        op.execute(rows.update().values(idempotency_key=rows.c.tenant + "/" + rows.c.idempotency_key))


def downgrade() -> None:
    """Drops them, and forgets the keys of other tenants than `default`."""
    for table in ("jobs", "files"):
        rows = sa.table(table, sa.column("tenant"), sa.column("idempotency_key"))
        key = sa.func.substr(rows.c.idempotency_key, len("default/") + 1)
        op.execute(rows.update().values(idempotency_key=sa.case((rows.c.tenant == "default", key))))
        op.drop_index(f"ix_{table}_tenant", table)
        op.drop_column(table, "tenant")
