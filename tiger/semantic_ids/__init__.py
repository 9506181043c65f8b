"""Codes -> unique semantic IDs: collision policies and the trie of all IDs."""
