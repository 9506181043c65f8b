"""Reports for people: the explorer of semantic IDs."""
