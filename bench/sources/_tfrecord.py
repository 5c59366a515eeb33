"""TFRecord framing and the protobuf wire format: as much as reading a known message by field numbers takes.

Everything works on memoryviews, so that walking a memory-mapped file touches only the pages it looks at. Whatever does
not fit the format raises ValueError with the reason; the caller knows which file it is.

Sources: the TFRecord layout in TensorFlow's "TFRecord and tf.train.Example" guide, protobuf's "Encoding" page.
"""

import mmap
import struct
from pathlib import Path

import numpy as np

VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5
FRAMING = 16  # bytes of a record beside its payload: 12 in front, 4 behind


def map_file(path: Path) -> memoryview:
    """A file's bytes, read only when looked at. Raises OSError, or ValueError for an empty file."""
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def payload(data: memoryview, offset: int) -> memoryview:
    """The payload of the record at `offset`. Its own checksum is not computed: that is slow here, and the zlib streams
    and JPEGs inside carry theirs."""
    if not 0 <= offset <= len(data) - FRAMING:
        raise ValueError(f"the record at byte {offset} is truncated: the file ends at byte {len(data)}")
    length, checksum = struct.unpack_from("<QI", data, offset)
    if masked_crc32c(data[offset : offset + 8]) != checksum:
        raise ValueError(f"the record's length at byte {offset} does not match its checksum: damaged, or no TFRecord")
    if length > len(data) - FRAMING - offset:
        raise ValueError(f"the record at byte {offset} says {length} bytes but the file ends at byte {len(data)}")
    return data[offset + 12 : offset + 12 + length]


def masked_crc32c(data: bytes | memoryview) -> int:
    """TFRecord's masked CRC-32C (Castagnoli), bit by bit: made for the 8 bytes of a length."""
    crc = 0xFFFFFFFF
    for byte in bytes(data):
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def fields(message: bytes | memoryview | int) -> dict[int, list]:
    """A message's fields by number, each a list in the order written: int (unsigned, 64 bits) for a varint,
    else a memoryview of the value's bytes. Fields that nobody asks for are only stepped over."""
    if isinstance(message, int):
        raise ValueError("a message is stored as a number; the record is damaged")
    message = memoryview(message)
    by_number, at, end = {}, 0, len(message)
    while at < end:
        tag, at = varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            value, at = varint(message, at)
        else:
            if kind == LENGTH_DELIMITED:
                length, at = varint(message, at)
            elif kind in (FIXED64, FIXED32):
                length = 8 if kind == FIXED64 else 4
            else:
                raise ValueError(f"field {number} has wire type {kind}; the message is damaged")
            if length > end - at:
                raise ValueError(f"field {number} says {length} bytes where {end - at} are left")
            value, at = message[at : at + length], at + length
        by_number.setdefault(number, []).append(value)
    return by_number


def last(message: dict[int, list], number: int, kind: type, what: str) -> int | memoryview:
    """The value of a field that is not repeated, from `fields`: of several the last counts, as the format says.

    kind: int for a varint, memoryview for anything else. Raises ValueError where the field is missing or of other kind.
    """
    values = message.get(number, [])
    if not values or not isinstance(values[-1], kind):
        raise ValueError(f"{what} is missing or not of its type")
    return values[-1]


def varint(message: memoryview, at: int) -> tuple[int, int]:
    """The varint at `at`, unsigned, and the place behind it."""
    value = 0
    for place, byte in enumerate(message[at : at + 10]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at + place + 1
    raise ValueError("a varint is truncated or longer than 10 bytes")


def fixed(values: list, dtype: str) -> np.ndarray:
    """A repeated fixed-size field, packed, unpacked or mixed: its `fields` values -> array of dtype "<f4" or "<f8"."""
    if any(isinstance(value, int) for value in values):
        raise ValueError(f"a field of {dtype} values holds a varint")
    joined = values[0] if len(values) == 1 else b"".join(values)
    if len(joined) % np.dtype(dtype).itemsize:
        raise ValueError(f"a field of {dtype} values has {len(joined)} bytes")
    return np.frombuffer(joined, dtype)


def varints(values: list) -> np.ndarray:
    """A repeated int32 or int64 field, packed, unpacked or mixed: its `fields` values -> int64 array."""
    parts = [unpack_varints(v) if not isinstance(v, int) else np.array([v], np.uint64).view(np.int64) for v in values]
    return np.concatenate([np.empty(0, np.int64), *parts])


def unpack_varints(data: bytes | memoryview) -> np.ndarray:
    """Consecutive varints -> int64 array, all at once."""
    octets = np.frombuffer(data, np.uint8)
    if not len(octets):
        return np.empty(0, np.int64)
    ends = np.flatnonzero(octets < 0x80)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1 if len(ends) else np.array([len(octets)])
    if octets[-1] >= 0x80 or lengths.max() > 10:
        raise ValueError("a packed varint is truncated or longer than 10 bytes")
    place = np.arange(len(octets)) - np.repeat(starts, lengths)
    bits = (octets & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.bitwise_or.reduceat(bits, starts).view(np.int64)
