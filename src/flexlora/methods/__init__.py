"""Server rules: one file per paper."""
