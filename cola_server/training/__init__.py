"""A job's way from its data to its adapter. Free of imports: the server listens before it loads torch."""
