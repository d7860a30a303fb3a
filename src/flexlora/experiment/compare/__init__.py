"""Many runs side by side: the grid, its cells, and what the numbers allow one to say."""
