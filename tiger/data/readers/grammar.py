"""Patterns of fields and records of text tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
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
            fields.append(self._unquoted(value))
            if record[at : at + len(self.separator)] != self.separator:
                return fields
            at += len(self.separator)

    def records(self, text: bytes) -> Iterator[bytes]:
        """Yield the well-formed records of a text, without their line ends."""
        if not self.quote:
            yield from text.removesuffix(b"\n").split(b"\n")
            return
        at = 0
        while at < len(text):
            match = self.record.match(text, at)
            end = match.end() if match else len(text)
            yield text[at:end].removesuffix(b"\n")
            at = end

    def split_open(self, record: bytes, width: int) -> list[bytes]:
        """Return up to `width` fields, the last of which is the rest of the record, unless that is one quoted field."""
        if not self.quote or self.quote not in record:
            return record.split(self.separator, width - 1)
        fields: list[bytes] = []
        at = 0
        while len(fields) < width - 1:
            match = self.field.match(record, at)
            fields.append(self._unquoted(match.group() if match else b""))
            at = match.end() if match else at
            if record[at : at + len(self.separator)] != self.separator:
                return fields
            at += len(self.separator)
        rest = record[at:]
        return [*fields, self._unquoted(rest) if self.field.fullmatch(rest) else rest]

    def _unquoted(self, value: bytes) -> bytes:
        if self.quote and value[:1] == self.quote:
            return value[1:-1].replace(self.quote * 2, self.quote)
        return value

    def first_record(self, text: bytes) -> bytes | None:
        """Return the first record that is not blank, None if the text has none."""
        text = text.lstrip(b"\n")
        if not text:
            return None
        match = self.record.match(text + b"\n")
        return (match.group() if match else text.partition(b"\n")[0]).rstrip(b"\n")
