"""A plan beside what a running cluster does: how far off it was, why, and how fast its engines really are."""
