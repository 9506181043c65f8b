"""Patterns of fields and records of text tables."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Grammar:
    """Patterns of fields and records for one separator and quote."""

    separator: bytes
    quote: bytes
    field: re.Pattern[bytes]
    run: re.Pattern[bytes]
    record: re.Pattern[bytes]
    open: re.Pattern[bytes]

    @classmethod
    def of(cls, separator: str, quote: str) -> Grammar:
        """Compile the patterns; an empty `quote` means that fields are not quoted."""
        s, q = re.escape(separator.encode()), re.escape(quote.encode())
        if not quote:
            field, record = rb"[^%b\n]*+" % s, rb"[^\n]*+\n"
            never = re.compile(rb"(?!)")
            return cls(separator.encode(), b"", re.compile(field), re.compile(rb"(?:%b)++" % record), never, never)
        plain = rb"[^%b%b\n][^%b\n]*+" % (q, s, s)
        one_line = rb"(?:%b[^%b\n]*+(?:%b%b[^%b\n]*+)*+%b|%b|)" % (q, q, q, q, q, q, plain)
        many = rb"(?:%b[^%b]*+(?:%b%b[^%b]*+)*+%b|%b|)" % (q, q, q, q, q, q, plain)
        return cls(
            separator.encode(),
            quote.encode(),
            re.compile(many),
            re.compile(rb"(?:[^%b\n]*+\n|%b(?:%b%b)*+\n)++" % (q, one_line, s, one_line)),
            re.compile(rb"%b(?:%b%b)*+\n" % (many, s, many)),
            re.compile(rb"(?:%b%b)*+%b[^%b]*+(?:%b%b[^%b]*+)*+%b?\Z" % (many, s, q, q, q, q, q, q)),
        )

    def split(self, record: bytes) -> list[bytes]:
        """Return the fields of one well-formed record, without its line end."""
        fields, at = [], 0
        while True:
            match = self.field.match(record, at)
            value = match.group() if match else b""
            at += len(value)
            if self.quote and value[:1] == self.quote:
                value = value[1:-1].replace(self.quote * 2, self.quote)
            fields.append(value)
            if record[at : at + len(self.separator)] != self.separator:
                return fields
            at += len(self.separator)

    def first_record(self, text: bytes) -> bytes | None:
        """Return the first record that is not blank, None if the text has none."""
        text = text.lstrip(b"\n")
        if not text:
            return None
        match = self.record.match(text + b"\n")
        return (match.group() if match else text.partition(b"\n")[0]).rstrip(b"\n")
