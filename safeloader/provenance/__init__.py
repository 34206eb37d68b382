"""What is kept of a run: recorder, table, trace. Runs in: main."""
