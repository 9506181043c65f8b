"""Readers of raw files: delimited text, JSON, Parquet; values, times and the counting of rows."""
