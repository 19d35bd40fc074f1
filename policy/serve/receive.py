"""Whole messages from a websocket in a bounded number of pieces: empty ones reach no limit of bytes, and websockets before 17.4 does not count them."""
from websockets.asyncio.connection import Connection
from websockets.exceptions import ConnectionClosedError

PIECES = 64  # our own messages come in one


async def receive(ws: Connection) -> bytes | str:
    """The next message. ConnectionClosed, also when it comes in more pieces than PIECES, which ends the connection."""
    parts: list[bytes | str] = []
    async for part in ws.recv_streaming():
        parts.append(part)
        if len(parts) > PIECES:
            ws.transport.abort()
            raise ConnectionClosedError(None, None)
    if len(parts) == 1:
        return parts[0]
    return "".join(map(str, parts)) if isinstance(parts[0], str) else b"".join(part for part in parts if isinstance(part, bytes))
