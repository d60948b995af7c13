"""What the checks need of a compiled kernel's ELF file: its arrays and the line of an address."""

import struct
from dataclasses import dataclass


@dataclass(frozen=True)
class Symbol:
    name: str
    address: int
    size: int


class Elf:
    """Sections and symbols of a 64-bit little-endian shared object."""

    def __init__(self, path):
        with open(path, "rb") as f:
            self.data = f.read()
        offset, size, count, names = self._header()
        headers = [
            struct.unpack_from("<IIQQQQIIQQ", self.data, offset + i * size) for i in range(count)
        ]
        strings = headers[names][4]
        self.sections = {self._string(strings + h[0]): h for h in headers}

    def _header(self):
        offset = struct.unpack_from("<Q", self.data, 40)[0]
        return (offset, *struct.unpack_from("<HHH", self.data, 58))

    def _string(self, at):
        return self.data[at : self.data.index(b"\0", at)].decode()

    def section(self, name):
        header = self.sections.get(name)
        return self.data[header[4] : header[4] + header[5]] if header else b""

    def symbols(self):
        table = self.sections[".symtab"]
        strings = self.sections[".strtab"][4]
        for at in range(table[4], table[4] + table[5], 24):
            name, _, _, _, address, size = struct.unpack_from("<IBBHQQ", self.data, at)
            yield Symbol(self._string(strings + name), address, size)

    def address_of(self, name):
        return next(s.address for s in self.symbols() if s.name == name)

    def image_size(self):
        """Bytes from the start of the loaded object to its end."""
        return max(h[3] + h[5] for h in self.sections.values() if h[3])

    def shared_arrays(self):
        """The threadgroup arrays, in order of address, under the names of the kernel's text."""
        header = self.sections.get("metalsim_shared")
        if header is None:
            return []
        start, end = header[3], header[3] + header[5]
        found = [
            s
            for s in self.symbols()
            if start <= s.address < end and s.size and not s.name.endswith("metalsim_fence")
        ]
        found.sort(key=lambda s: s.address)
        return [Symbol(_plain_name(s.name), s.address, s.size) for s in found]

    def line_of(self, address):
        """(file, line) of an instruction, from .debug_line; None if it has none."""
        best = None
        for row_address, file, line, end in _rows(self.section(".debug_line")):
            if row_address > address and best and not best[2]:
                return best[:2] if best[1] else None
            best = (file, line, end) if row_address <= address else None
        return None


def _plain_name(mangled):
    # The last <length><name> of a mangled local: _ZZ...E5tile_ is `tile_`.
    at = len(mangled)
    while (at := mangled.rfind("E", 0, at)) >= 0:
        digits = ""
        for c in mangled[at + 1 :]:
            if not c.isdigit():
                break
            digits += c
        if digits:
            start = at + 1 + len(digits)
            return mangled[start : start + int(digits)]
    return mangled


def _leb(data, at, signed=False):
    result = shift = 0
    while True:
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    if signed and byte & 0x40:
        result -= 1 << shift
    return result, at


def _rows(data):
    """Rows (address, file, line, end of sequence) of a DWARF 4 line table."""
    unit = 0
    while unit < len(data):
        length = struct.unpack_from("<I", data, unit)[0]
        end = unit + 4 + length
        version, header_length = struct.unpack_from("<HI", data, unit + 4)
        if version != 4:
            raise ValueError(f"line table of DWARF {version}, expected 4")
        program = unit + 10 + header_length
        least, _, _, line_base, line_range, opcode_base = struct.unpack_from(
            "<BBBbBB", data, unit + 10
        )
        lengths = data[unit + 16 : unit + 15 + opcode_base]
        at = unit + 15 + opcode_base
        while data[at]:
            at = data.index(0, at) + 1
        at += 1
        files = [""]
        while data[at]:
            stop = data.index(0, at)
            files.append(data[at:stop].decode().rsplit("/", 1)[-1])
            at = stop + 1
            for _ in range(3):
                _, at = _leb(data, at)
        yield from _program(data, program, end, files, least, line_base, line_range, lengths)
        unit = end


def _program(data, at, end, files, least, line_base, line_range, lengths):
    opcode_base = len(lengths) + 1
    address, file, line = 0, 1, 1
    while at < end:
        op = data[at]
        at += 1
        if op >= opcode_base:
            advance, step = divmod(op - opcode_base, line_range)
            address += advance * least
            line += line_base + step
            yield address, files[file], line, False
        elif op == 0:
            size, at = _leb(data, at)
            if data[at] == 1:
                yield address, files[file], line, True
                address, file, line = 0, 1, 1
            elif data[at] == 2:
                address = struct.unpack_from("<Q", data, at + 1)[0]
            at += size
        elif op == 1:
            yield address, files[file], line, False
        elif op == 2:
            advance, at = _leb(data, at)
            address += advance * least
        elif op == 3:
            step, at = _leb(data, at, signed=True)
            line += step
        elif op == 4:
            file, at = _leb(data, at)
        elif op == 8:
            address += (255 - opcode_base) // line_range * least
        elif op == 9:
            address += struct.unpack_from("<H", data, at)[0]
            at += 2
        else:
            for _ in range(lengths[op - 1]):
                _, at = _leb(data, at)
