"""Small data sets drawn on the spot, for demos and tests on machines without data."""
