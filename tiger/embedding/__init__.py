"""Item texts -> embeddings: the text encoder, and reading and importing vectors."""
