"""What evaluate.py stands on: numbers about videos, their table and page, and the data sets that others measure on."""
