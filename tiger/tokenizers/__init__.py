"""Tokenizers, one module per kind: `tokenizer.kind` names the module. The contract is in `base`."""
