"""Ways to damage the bytes of any file."""

from __future__ import annotations

import random


def cut(data: bytes, rng: random.Random) -> bytes:
    """Truncate the data."""
    return data[: rng.choice([rng.randrange(len(data) + 1), rng.randrange(min(len(data), 64) + 1), len(data) - 1])]


def flip(data: bytes, rng: random.Random) -> bytes:
    """Flip some bits, near the start or anywhere."""
    changed = bytearray(data)
    reach = rng.choice([min(64, len(data)), min(600, len(data)), len(data)])
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        changed[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, rng: random.Random) -> bytes:
    """Overwrite a range with zeros, ones or noise."""
    at, length = rng.randrange(len(data)), rng.choice([1, 2, 4, 16, 200])
    filler = rng.choice([bytes(length), b"\xff" * length, rng.randbytes(length)])
    return (data[:at] + filler + data[at + length :])[: max(len(data), at + length)]


def remove(data: bytes, rng: random.Random) -> bytes:
    """Remove a range."""
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.choice([1, 3, 16, 500]) :]


def repeat(data: bytes, rng: random.Random) -> bytes:
    """Repeat a range many times."""
    at = rng.randrange(len(data))
    end = at + rng.choice([1, 8, 100, 1000])
    return data[:end] + data[at:end] * rng.choice([1, 3, 100]) + data[end:]


def insert(data: bytes, rng: random.Random) -> bytes:
    """Insert noise."""
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.choice([1, 2, 7, 300])) + data[at:]


def swap(data: bytes, rng: random.Random) -> bytes:
    """Exchange two ranges."""
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    length = rng.choice([1, 4, 50])
    return data[:a] + data[b : b + length] + data[a + length : b] + data[a : a + length] + data[b + length :]


def append(data: bytes, rng: random.Random) -> bytes:
    """Append data."""
    return data + rng.choice([b"\0" * 100, rng.randbytes(500), data])


WAYS = (cut, flip, overwrite, remove, repeat, insert, swap, append)


def damage(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Damage the data in one or two ways. Returns the name of the first, and the data."""
    first = rng.choice(WAYS)
    damaged = first(data, rng) if data else data
    if rng.random() < 0.2 and damaged:
        damaged = rng.choice(WAYS)(damaged, rng)
    return first.__name__, damaged
