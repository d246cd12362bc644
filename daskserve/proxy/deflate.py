"""Compressed messages of WebSockets, inflated in slices: 16 KiB can become 16 MiB."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from websockets.extensions import Extension
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import CTRL_OPCODES, Frame, Opcode

#: So much goes in and comes out at once.
SLICE_BYTES = 64 * 1024
#: What is left out at the end of a message (RFC 7692, 7.2.2).
_END = b"\x00\x00\xff\xff"


@dataclass
class PackedFrame(Frame):
    """A frame whose data has come and is compressed."""

    rest: memoryview = memoryview(b"")
    inflated: bytes | bytearray | None = None


class Deflate(Extension):
    """The extension of one connection; what comes is left to `inflate`."""

    name = PerMessageDeflate.name

    def __init__(self, whole: PerMessageDeflate) -> None:
        self._whole = whole
        self._packed = False

    def encode(self, frame: Frame) -> Frame:
        """Compress what is sent."""
        return self._whole.encode(frame)

    def decode(self, frame: Frame, *, max_size: int | None = None) -> Frame:
        """Mark a frame that is compressed."""
        if frame.opcode in CTRL_OPCODES:
            return frame
        first = frame.opcode is not Opcode.CONT
        if first:
            self._packed = frame.rsv1
        if not self._packed:
            return frame
        rsv1 = frame.rsv1 and not first  # which is an error
        data = bytes(frame.data) + _END if frame.fin else frame.data
        return PackedFrame(
            frame.opcode,
            data,
            frame.fin,
            rsv1,
            frame.rsv2,
            frame.rsv3,
            memoryview(data),
        )

    def inflate(self, frame: PackedFrame) -> bool:
        """Inflate one slice; return whether it was the last.

        Raises
        ------
        zlib.error
            It is not compressed.
        """
        whole = self._whole
        if frame.inflated is None and (
            # Behind the last block of all, zlib would only collect what comes.
            whole.decoder.eof
            if not whole.remote_no_context_takeover
            else frame.opcode is not Opcode.CONT
        ):
            whole.decoder = zlib.decompressobj(wbits=-whole.remote_max_window_bits)
        piece = frame.rest[:SLICE_BYTES]
        out = whole.decoder.decompress(piece, SLICE_BYTES)
        frame.rest = frame.rest[len(piece) - len(whole.decoder.unconsumed_tail) :]
        if frame.inflated is None:
            frame.inflated = out
        else:  # it grows in place: many slices would leave holes in the memory
            if isinstance(frame.inflated, bytes):
                frame.inflated = bytearray(frame.inflated)
            frame.inflated += out
        # What comes out may be all there was room for, with nothing left to go in.
        return whole.decoder.eof or (not frame.rest and len(out) < SLICE_BYTES)
