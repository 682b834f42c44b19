"""Steps from each version of the tables to the next one. Alembic runs them; a database knows its version."""
