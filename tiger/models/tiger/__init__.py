"""TIGER: the encoder-decoder that generates semantic IDs, its batches and its constrained beam search."""
