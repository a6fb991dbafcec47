"""What families are made of: the interface, sizes, layouts, the mathematics of mixers, and surgery by one table."""
