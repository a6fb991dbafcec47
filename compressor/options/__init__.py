"""What a run is told: its fields, the words they are chosen from, and recipes."""
