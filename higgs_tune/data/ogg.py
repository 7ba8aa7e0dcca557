"""Recognise an Ogg file that holds several recordings in a row; libsndfile reads only the first."""

_HEADER_BYTES = 27  # of a page, before the sizes of its segments
_BEGINS = 2  # flag of a stream's first page


def is_joined_ogg(content: bytes) -> bool:
    """Whether a stream begins after another one's pages, as in files that were joined.

    Streams that play at the same time all begin before any of them goes on.

    Source: RFC 3533, sections 4 and 6.
    """
    place, goes_on = 0, False
    while content[place : place + 4] == b"OggS" and place + _HEADER_BYTES <= len(content):
        begins = bool(content[place + 5] & _BEGINS)
        if begins and goes_on:
            return True
        goes_on = not begins
        sizes = place + _HEADER_BYTES
        data = sizes + content[sizes - 1]
        place = data + sum(content[sizes:data])
    return False
