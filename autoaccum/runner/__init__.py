"""Train with a plan, and recover from running out of memory."""
