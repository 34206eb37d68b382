"""What was drawn and what came, as pure accounts: no process, no torch. Runs in: both."""
