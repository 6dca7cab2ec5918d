"""``POST``, ``GET`` and ``DELETE /v1/mpoe/experts``: experts come and go while vLLM serves.

A plugin of vLLM's group ``vllm.endpoint_plugins``, which loads what ``VLLM_PLUGINS`` names alone.
"""

import asyncio
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from mpoe.models.expert_files import Expert
from mpoe_vllm.mixture import ExpertSet, Refused

ROUTE = "/v1/mpoe/experts"


def _refusal(status: int, message: str) -> JSONResponse:
    """In the form of OpenAI's errors."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": status}
    return JSONResponse({"error": error}, status)


class Experts:
    """The plugin; see `vllm.plugins.endpoint_plugins.interface`."""

    name = "mpoe"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.lock = asyncio.Lock()  # one change at a time
        self.engine: Any = None
        self.experts: Any = None

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Read the statistics of the composed folder.

        Raises:
            TypeError, ValueError: as `ExpertSet`; several API servers, which would not know of one
                another's changes.
        """
        if (getattr(args, "api_server_count", None) or 1) > 1:
            raise ValueError(
                f"mpoe's endpoint needs --api-server-count 1; got {args.api_server_count}"
            )
        config = engine_client.vllm_config
        values = config.model_config.hf_config.to_dict()
        folder = Path(config.model_config.model)
        self.engine = engine_client
        self.experts = await asyncio.to_thread(ExpertSet, folder, values, config.additional_config)

    def attach_router(self, app: FastAPI) -> None:
        """Add the three routes."""
        app.get(ROUTE)(self.shown)
        app.post(ROUTE)(self.add)
        app.delete(f"{ROUTE}/{{name}}")(self.remove)

    async def shown(self) -> JSONResponse:
        """The experts, and how many there is room for."""
        return JSONResponse(self.experts.shown())

    async def add(self, request: Request) -> JSONResponse:
        """``{"path": "law.expert"}`` or ``{"name": "law"}``, relative to the server's folder."""
        try:
            body = await request.json()
        except ValueError:
            body = None
        known = body if isinstance(body, Mapping) else {}
        path = known.get("path")
        if path is None and isinstance(known.get("name"), str):
            path = f"{known['name']}.expert"
        if len(known) != 1 or not isinstance(path, str):
            return _refusal(400, 'body must be {"path": "FILE"} or {"name": "NAME"}')
        return await self._change(lambda: self.experts.with_file(path))

    async def remove(self, name: str) -> JSONResponse:
        """The expert of a name."""
        return await self._change(lambda: self.experts.without(name))

    async def _change(self, wanted: Callable[[], dict[int, Expert]]) -> JSONResponse:
        """Check, solve the routers, then pause the engine between two steps for as long as copying
        takes. Requests under way go on with the new set: vLLM reads their tokens again."""
        async with self.lock:
            try:
                after = await asyncio.to_thread(wanted)
                changes = await asyncio.to_thread(self.experts.changes, after)
            except Refused as refused:
                return _refusal(refused.status, str(refused))
            await self.engine.pause_generation(mode="keep", clear_cache=True)
            try:
                await self.engine.collective_rpc("mpoe_replace_experts", args=(changes,))
                self.experts.by_slot = after
            finally:
                await self.engine.resume_generation()
        return JSONResponse(self.experts.shown())
