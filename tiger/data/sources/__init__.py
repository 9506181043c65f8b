"""Data sources, one module per kind: `data.kind` names the module. The contract is in `base`."""
