"""The project's own upkeep: ahead-of-time compilation, device runs, sanitizers and README's table."""
