"""What one would write with FastAPI to do the same. `python bench/peer_fastapi.py PORT [REDIS]`."""

import sys
import time

import redis.asyncio
import uvicorn
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

app = FastAPI()
seen: dict[int, set[int]] = {}
store = redis.asyncio.Redis.from_url(sys.argv[2]) if len(sys.argv) > 2 else None


@app.get("/api/verve/accept", response_class=PlainTextResponse)
async def accept(id: int) -> str:  # noqa: A002 - the parameter's name
    minute = int(time.time()) // 60
    if store is None:
        seen.setdefault(minute, set()).add(id)
    else:
        await store.sadd(f"peer:{minute}", id)
    return "ok"


uvicorn.run(
    app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False, loop="uvloop", http="httptools"
)
