"""What a run costs, what takes its time, and what went wrong."""
