"""What a run or a sweep came to, from the files that it left. Knows no model and no trainer."""
