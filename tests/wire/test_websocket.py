"""WebSocket frames: where each begins and ends, whatever is in it and however it arrives."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.websocket import Frames, close_frame


def frame(size: int, *, masked: bool = False, first: int = 0x82, width: int = 0) -> bytes:
    """A frame of so many bytes; `width` has its length written longer than it need be."""
    mask = 0x80 if masked else 0
    if size < 126 and not width:
        head = bytes((first, mask | size))
    elif size < 65536 and width < 8:
        head = bytes((first, mask | 126)) + struct.pack("!H", size)
    else:
        head = bytes((first, mask | 127)) + struct.pack("!Q", size)
    return head + (b"\xff\x00\x81\x7f" if masked else b"") + b"\x88" * size


SIZES = [0, 1, 2, 125, 126, 127, 200]
FRAMES = [frame(size, masked=masked, width=width) for size in SIZES for masked in (False, True) for width in (0, 2, 8)]  # fmt: skip


def boundaries(data: list[bytes]) -> set[int]:
    """After how many bytes a frame ends, and none goes on."""
    ends, at = {0}, 0
    for one in data:
        at += len(one)
        ends.add(at)
    return ends


@pytest.mark.parametrize("before", [0, 1])
def test_where_frames_end_is_known_after_every_byte(before: int) -> None:
    for one in FRAMES:
        data = [frame(3, masked=True)] * before + [one, frame(0)]
        stream, ends = b"".join(data), boundaries(data)
        bytewise = Frames()
        for at in range(len(stream) + 1):
            assert bytewise.at_boundary is (at in ends), at
            whole = Frames()
            whole.feed(stream[:at])
            assert whole.at_boundary is (at in ends), at
            bytewise.feed(stream[at : at + 1])


@pytest.mark.parametrize("one", FRAMES)
def test_what_is_left_of_a_frame_and_not_what_follows_it(one: bytes) -> None:
    stream = frame(1) + one + frame(5) + frame(2, masked=True)
    for at in range(1, len(one)):
        frames = Frames()
        frames.feed(frame(1) + one[:at])
        rest = stream[3 + at :]
        assert frames.until_boundary(rest) == len(one) - at, at
        assert frames.at_boundary, at


def test_at_a_boundary_nothing_is_left_of_a_frame() -> None:
    frames = Frames()
    assert frames.until_boundary(frame(5)) == 0
    frames.feed(frame(5))
    assert frames.until_boundary(frame(5)) == 0


def test_all_belongs_to_a_frame_that_goes_on() -> None:
    for size in (200, 70_000, 1 << 40):
        frames = Frames()
        frames.feed(frame(min(size, 100), first=0x01)[:1])
        head = frame(0, width=8)[1:2] + struct.pack("!Q", size)
        assert frames.until_boundary(head + b"x" * 150) == 9 + 150
        assert not frames.at_boundary


def test_a_large_frame_is_followed_to_its_end() -> None:
    frames = Frames()
    data = frame(1 << 20, masked=True) + frame(0)
    for at in range(0, len(data), 65536):
        frames.feed(data[at : at + 65536])
    assert frames.at_boundary


@given(st.lists(st.sampled_from(FRAMES), min_size=1, max_size=5), st.data())
def test_frames_are_followed_in_whatever_pieces_they_arrive(
    data: list[bytes], draw: st.DataObject
) -> None:
    stream, ends = b"".join(data), boundaries(data)
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    frames = Frames()
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        frames.feed(stream[begin:end])
        assert frames.at_boundary is (end in ends)


@given(st.binary(max_size=60), st.data())
def test_bytes_that_are_no_frames_mean_the_same_in_whatever_pieces(
    data: bytes, draw: st.DataObject
) -> None:
    at = draw.draw(st.integers(0, len(data)))
    whole, split = Frames(), Frames()
    whole.feed(data)
    split.feed(data[:at])
    split.feed(data[at:])
    assert whole.at_boundary is split.at_boundary
    assert whole.until_boundary(bytes(300)) == split.until_boundary(bytes(300))


def test_a_close_frame_says_that_the_server_goes_away() -> None:
    assert close_frame(masked=False) == b"\x88\x02" + struct.pack("!H", 1001)
    masked = close_frame(masked=True)
    assert masked[:2] == b"\x88\x82" and len(masked) == 8
    assert bytes(a ^ b for a, b in zip(masked[6:], masked[2:4], strict=True)) == struct.pack(
        "!H", 1001
    )


def test_each_close_frame_has_a_mask_of_its_own() -> None:
    assert len({close_frame(masked=True) for _ in range(20)}) > 1


@pytest.mark.parametrize("masked", [False, True])
def test_a_close_frame_is_a_frame(masked: bool) -> None:
    frames = Frames()
    frames.feed(close_frame(masked=masked))
    assert frames.at_boundary
