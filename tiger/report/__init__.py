"""Reports: the explorer of semantic IDs."""
