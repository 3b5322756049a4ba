"""What one would write with aiohttp to do the same. `python bench/peer_aiohttp.py PORT [REDIS]`."""

import asyncio
import sys
import time

import redis.asyncio
import uvloop
from aiohttp import web

seen: dict[int, set[int]] = {}
store = redis.asyncio.Redis.from_url(sys.argv[2]) if len(sys.argv) > 2 else None


async def accept(request: web.Request) -> web.Response:
    try:
        number = int(request.query["id"])
    except (KeyError, ValueError):
        return web.Response(status=400, text="failed")
    minute = int(time.time()) // 60
    if store is None:
        seen.setdefault(minute, set()).add(number)
    else:
        await store.sadd(f"peer:{minute}", number)
    return web.Response(text="ok")


app = web.Application()
app.add_routes([web.get("/api/verve/accept", accept)])
asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)
