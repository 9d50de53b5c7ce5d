"""Image files byte by byte, for depths and modes that Pillow reads but does not write."""

import struct
import zlib


def png(depth, color, rows, transparent=None, chunks=()):
    """A PNG whose rows are packed bytes; `color`: 0 gray, 2 RGB, 3 palette of red and green, 4 gray and alpha."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    width = len(rows[0]) * 8 // (depth * channels)
    content = [(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, color, 0, 0, 0))]
    content += [(b"PLTE", bytes([255, 0, 0, 0, 255, 0]))] if color == 3 else []
    content += [(b"tRNS", transparent)] if transparent is not None else []
    content += [*chunks, (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in content]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(width, pixels, bits, order="<", photometric=1, sample_format=1, alpha=None):
    """An uncompressed gray TIFF of one row; `alpha`: 1 for a premultiplied second channel, 2 for a plain one."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1 if alpha is None else 2, 278: 1}
    tags |= {279: len(pixels), **({} if alpha is None else {338: alpha}), 339: sample_format}
    tags[273] = 8 + 2 + 12 * len(tags) + 4  # where the pixels begin
    entries = b""
    for tag, value in tags.items():
        each_channel = tag in (258, 339) and alpha is not None
        value = struct.pack(f"{order}2H", value, value) if each_channel else struct.pack(f"{order}I", value)
        entries += struct.pack(f"{order}HHI", tag, 3 if each_channel else 4, 2 if each_channel else 1) + value
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8)
    return head + struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0) + pixels


def words(*values, order=">"):
    """Numbers of 16 bits."""
    return struct.pack(f"{order}{len(values)}H", *values)
