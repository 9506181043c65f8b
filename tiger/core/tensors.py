"""Tensors in the safetensors format, as pieces: tables of many GB are written without a second copy of them.

The bytes are those of `safetensors.torch.save`: the length of the header in 8 bytes, the header as JSON, padded with
blanks to a multiple of 8 bytes, and the tensors, those of larger types first, so that all are aligned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

_NAMES = {  # in the order of the file
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}


def safetensors_pieces(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """Return the content of a safetensors file, in pieces that share the memory of tensors on the CPU."""
    header: dict[str, object] = {}
    pieces: list[bytes | memoryview] = []
    begin = 0
    for name in sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name)):
        tensor = tensors[name].detach().cpu().contiguous()
        end = begin + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        pieces.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *pieces]
