"""What Alembic runs: the migrations, on the connection that `cola_server.jobs.database` opened."""

from alembic import context

from cola_server.jobs.tables import Table

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Table.metadata, render_as_batch=True
)
with context.begin_transaction():
    context.run_migrations()
