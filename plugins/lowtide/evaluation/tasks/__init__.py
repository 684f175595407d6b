"""Items of evaluations: what rows may say, reading them, and what a set gives away."""
