"""The schema's history, in Alembic's form; `cola_server.jobs.database` brings a database up to date when it opens it.

A new one: change `tables.py`, add `versions/NNNN_what.py` with `down_revision` set to the newest there is.
"""
