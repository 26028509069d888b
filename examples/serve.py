"""Serve one Stable Diffusion model over HTTP, with settings per request; explained in agentsd/SERVING.md.

pip install -e ".[app]" && python examples/serve.py
curl localhost:8000/images --json '{"prompt": "a zebra", "patch": {"preset": "fast"}}' -o zebra.png
"""

import argparse
import asyncio
import io
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, field_validator

import agentsd
from agentsd.config import make_config
from agentsd.images.generate import cached_calls

log = logging.getLogger("serve")


class ImageRequest(BaseModel, extra="forbid"):
    """What a client may ask for; anything else is answered with status 422 and the reason."""

    prompt: str = Field(min_length=1, max_length=1000)
    seed: int = Field(0, ge=0, lt=2**63)
    steps: int = Field(25, ge=1, le=100)
    guidance: float = Field(5.0, ge=0, le=30)
    height: int = Field(512, ge=64, le=1024, multiple_of=8)
    width: int = Field(512, ge=64, le=1024, multiple_of=8)
    patch: dict[str, Any] | None = {"preset": "fast"}  # arguments of apply_patch; null: the unpatched model

    @field_validator("patch")
    @classmethod
    def _checked_before_it_waits(cls, patch):
        try:
            patch is None or make_config(**patch)
        except TypeError as error:
            raise ValueError(str(error)) from error  # answered with status 422, as a ValueError is
        return patch


def _where(location: tuple[str | int, ...]) -> str:
    """The field's name, or "body", where text that is no JSON has only a position."""
    return [part for part in location if isinstance(part, str)][-1]


def make_app(pipe: Any, most_waiting: int = 32) -> FastAPI:
    app = FastAPI(title="agentsd")
    # The lock: one thread changes the patch and runs the pipeline, one request at a time, in order of arrival.
    worker = ThreadPoolExecutor(max_workers=1)
    waiting, current = 0, None

    def make_image(request: ImageRequest) -> tuple[bytes, float, dict[str, int] | None]:
        nonlocal current
        start = time.perf_counter()
        if request.patch != current:
            agentsd.remove_patch(pipe) if request.patch is None else agentsd.apply_patch(pipe, **request.patch)
            current = request.patch
        image = pipe(
            request.prompt, num_inference_steps=request.steps, guidance_scale=request.guidance, height=request.height,
            width=request.width, generator=torch.Generator().manual_seed(request.seed),
        ).images[0]  # fmt: skip
        image.save(png := io.BytesIO(), "png")
        return png.getvalue(), time.perf_counter() - start, cached_calls(pipe)

    @app.post("/images")
    async def images(request: ImageRequest) -> Response:
        nonlocal waiting
        if waiting >= most_waiting:
            raise HTTPException(503, "too many requests are waiting", headers={"Retry-After": "10"})
        waiting, arrived = waiting + 1, time.perf_counter()
        try:
            png, ran, calls = await asyncio.get_running_loop().run_in_executor(worker, make_image, request)
        except ValueError as error:  # what only this model refuses: a size, a setting
            raise HTTPException(422, str(error)) from error
        finally:
            waiting -= 1
        log.info("waited %.2f s, ran %.2f s, %s, %s", time.perf_counter() - arrived - ran, ran, calls, request)
        return Response(png, media_type="image/png")

    @app.exception_handler(RequestValidationError)
    async def refuse(_: Any, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": [f"{_where(one['loc'])}: {one['msg']}" for one in error.errors()]}, 422)

    @app.get("/health")
    async def health() -> dict[str, int]:
        return {"waiting": waiting}

    return app


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Serve one Stable Diffusion model over HTTP.")
    parser.add_argument("--model", default="demo", help="demo, a folder or a Hugging Face id (default: demo)")
    parser.add_argument("--port", type=int, default=8000, help="port on 127.0.0.1; 0 takes a free one (default: 8000)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    logging.captureWarnings(True)  # agentsd says as warnings what it could not do
    pipe = agentsd.load_pipeline(options.model, scheduler="ddim")
    pipe.set_progress_bar_config(disable=True)
    uvicorn.run(make_app(pipe), host="127.0.0.1", port=options.port)


if __name__ == "__main__":
    main()
