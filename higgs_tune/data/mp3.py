"""Measure the length of an MP3 by its frames, because its header may state less, or nothing.

libsndfile reads as many samples as the first frame states: too few from joined files, and from files with a
variable bitrate that were written to a pipe.
"""

_SYNC = 0x7FF  # the first 11 bits of a frame
_LAYER_3 = 1
_RESERVED = 1  # a version that does not exist
_RATES_HZ = (44_100, 48_000, 32_000)
_RATE_SHIFT = {3: 0, 2: 1, 0: 2}  # MPEG 1, 2 and 2.5
_KBPS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KBPS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_TAG_PLACES = (13, 21, 36)  # offsets of the Xing or LAME tag, in a frame that holds only the tag
_HEADER_BYTES = 4


def mp3_seconds(content: bytes) -> float:
    """Seconds of all layer III frames, including decoder delay and padding; 0 without such frames.

    Source: ISO/IEC 11172-3, 2.4.1.3, and 13818-3 for the low rates.
    """
    place, seconds = _id3_bytes(content), 0.0
    while place + _HEADER_BYTES <= len(content):
        found = _frame(content, place)
        if found is None or not _frame_follows(content, place + found[0]):
            place += 1
            continue
        size, length_s = found
        is_tag = any(
            content[place + at : place + at + 4] in (b"Xing", b"Info") for at in _TAG_PLACES
        )
        seconds += 0.0 if is_tag else length_s
        place += size
    return seconds


def _id3_bytes(content: bytes) -> int:
    """Bytes of the ID3 tag before the frames; its size field uses seven bits of each byte."""
    if content[:3] != b"ID3" or len(content) < 10:
        return 0
    return 10 + sum(
        byte << shift for byte, shift in zip(content[6:10], (21, 14, 7, 0), strict=True)
    )


def _frame(content: bytes, place: int) -> tuple[int, float] | None:
    """Bytes and seconds of the frame whose header is at `place`; None if there is no header."""
    header = int.from_bytes(content[place : place + _HEADER_BYTES], "big")
    version, layer = header >> 19 & 3, header >> 17 & 3
    bitrate, rate = header >> 12 & 15, header >> 10 & 3
    is_header = header >> 21 == _SYNC and layer == _LAYER_3 and version != _RESERVED
    if not is_header or bitrate in (0, 15) or rate == 3:
        return None
    rate_hz = _RATES_HZ[rate] >> _RATE_SHIFT[version]
    num_samples = 1152 if version == 3 else 576
    kbps = (_KBPS_1 if version == 3 else _KBPS_2)[bitrate]
    padding = header >> 9 & 1
    return num_samples // 8 * 1000 * kbps // rate_hz + padding, num_samples / rate_hz


def _frame_follows(content: bytes, place: int) -> bool:
    """Whether a frame, a tag or the end is at `place`; otherwise what came before was not a frame."""
    rest = content[place : place + _HEADER_BYTES]
    is_tag = rest[:3] in (b"TAG", b"ID3") or rest == b"APET"
    return len(rest) < _HEADER_BYTES or is_tag or _frame(content, place) is not None
