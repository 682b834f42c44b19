"""Reads what a shared library exports, and writes a library that exports the same names and does nothing.

Of ELF (64 bits, little endian) only what the dynamic loader of glibc needs: https://refspecs.linuxfoundation.org/elf/,
for the version tables the Linux Standard Base, "Symbol Versioning". Standard library only: it runs inside a build.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

PAGE = 4096
SYMBOL = struct.Struct("<IBBHQQ")  # name, info, other, section, value, size
DYNSYM, STRTAB, HASH, VERDEF, VERSYM = 11, 3, 5, 0x6FFFFFFD, 0x6FFFFFFF
RETURNS_AN_ERROR = b"\xb8\xe7\x03\x00\x00\xc3"  # x86-64: mov eax, 999; ret
MACHINE_X86_64 = 62


@dataclass(frozen=True)
class Export:
    """A defined symbol; `version` is empty where the library has no versions."""

    name: str
    info: int
    version: str


class NotStubbableError(ValueError):
    """The file is not a 64-bit x86 shared library with an ordinary symbol table."""


def exports(library: Path) -> list[Export]:
    """The symbols that a library defines for others. Raises NotStubbableError."""
    with library.open("rb") as file:
        header = file.read(64)
        if header[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", header, 18)[0] != MACHINE_X86_64:
            raise NotStubbableError(f"{library} is not a library for x86-64")
        offset, size, count = struct.unpack_from("<Q", header, 40)[0], *struct.unpack_from("<HH", header, 58)
        file.seek(offset)
        headers = [struct.unpack_from("<IIQQQQIIQQ", file.read(size)) for _ in range(count)]

        def content(kind: int) -> tuple[bytes, int]:
            found = next((h for h in headers if h[1] == kind), None)
            if found is None:
                return b"", 0
            file.seek(found[4])
            return file.read(found[5]), found[6]

        symbols, strings_at = content(DYNSYM)
        if not symbols:
            raise NotStubbableError(f"{library} has no table of symbols")
        file.seek(headers[strings_at][4])
        strings = file.read(headers[strings_at][5])
        versions, (numbers, _) = _versions(content(VERDEF)[0], strings), content(VERSYM)
    out = []
    for index, (name, info, _, section, _, _) in enumerate(SYMBOL.iter_unpack(symbols)):
        if section and info >> 4:  # defined, and not local
            number = struct.unpack_from("<H", numbers, 2 * index)[0] & 0x7FFF if numbers else 1
            out.append(Export(_text(strings, name), info, versions.get(number, "")))
    return out


def _versions(table: bytes, strings: bytes) -> dict[int, str]:
    """Number -> name of the versions that a library defines; number 1 is the library itself."""
    out, at = {}, 0
    while table:
        _, _, number, _, _, first, following = struct.unpack_from("<HHHHIII", table, at)
        if number > 1:
            out[number] = _text(strings, struct.unpack_from("<I", table, at + first)[0])
        if not following:
            break
        at += following
    return out


def _text(strings: bytes, at: int) -> str:
    return strings[at : strings.index(b"\0", at)].decode()


def stub(soname: str, exported: list[Export]) -> bytes:
    """A library of this name in which every function returns the error 999 and every variable is eight zero bytes."""
    strings = bytearray(b"\0")

    def text(value: str) -> int:
        at = len(strings)
        strings.extend(value.encode() + b"\0")
        return at

    names = [text(e.name) for e in exported]
    soname_at = text(soname)
    versions = sorted({e.version for e in exported if e.version})
    verdef = _verdef([soname, *versions], [soname_at, *(text(v) for v in versions)]) if versions else b""
    numbers = [versions.index(e.version) + 2 if e.version else 1 for e in exported]
    versym = struct.pack(f"<{len(exported) + 1}H", 0, *numbers) if versions else b""
    count = len(exported) + 1
    table = struct.pack(f"<II{1 + count}I", 1, count, min(1, len(exported)), 0, *range(2, count), 0)[: 4 * (3 + count)]

    parts: dict[str, bytes] = {"code": RETURNS_AN_ERROR, "hash": table, "versym": versym, "verdef": verdef}
    parts["strings"] = bytes(strings)
    at, body = 64 + 56 * 4, bytearray()
    places: dict[str, int] = {}
    for name, data in parts.items():
        body += b"\0" * (-(at + len(body)) % 8)
        places[name] = at + len(body)
        body += data
    body += b"\0" * (-(at + len(body)) % 8)
    places["symbols"] = at + len(body)
    zeros = -(-(places["symbols"] + SYMBOL.size * count) // PAGE) * PAGE
    body += SYMBOL.pack(0, 0, 0, 0, 0, 0)
    for name_at, e in zip(names, exported, strict=True):
        is_data = e.info & 15 == 1
        body += SYMBOL.pack(name_at, e.info, 0, 1, zeros if is_data else places["code"], 8)
    entries = [(14, soname_at), (4, places["hash"]), (5, places["strings"]), (6, places["symbols"])]
    entries += [(10, len(strings)), (11, SYMBOL.size)]
    if versions:
        entries += [(0x6FFFFFF0, places["versym"]), (0x6FFFFFFC, places["verdef"]), (0x6FFFFFFD, len(versions) + 1)]
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in [*entries, (0, 0)])
    end = at + len(body)
    segments = [
        (1, 5, 0, end),  # read and execute
        (1, 6, zeros, 8 + len(dynamic)),  # read and write: the variables' zeros, then the dynamic section
        (2, 6, zeros + 8, len(dynamic)),
        (0x6474E551, 6, 0, 0),  # the stack is not executable
    ]
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, MACHINE_X86_64, 1, 0, 64, 0, 0, 64, 56, len(segments), 64, 0, 0)
    header += b"".join(struct.pack("<IIQQQQQQ", kind, flags, o, o, o, n, n, PAGE) for kind, flags, o, n in segments)
    return header + bytes(body) + bytes(zeros - end) + bytes(8) + dynamic


def _verdef(names: list[str], strings_at: list[int]) -> bytes:
    out = b""
    for number, (name, at) in enumerate(zip(names, strings_at, strict=True), 1):
        following = 28 if number < len(names) else 0
        out += struct.pack("<HHHHIII", 1, int(number == 1), number, 1, _elf_hash(name), 20, following)
        out += struct.pack("<II", at, 0)
    return out


def _elf_hash(name: str) -> int:
    value = 0
    for byte in name.encode():
        value = (value << 4) + byte
        value = (value ^ (value & 0xF0000000) >> 24) & 0x0FFFFFFF
    return value
