"""Pages for people, without any outside request: /docs (Swagger UI out of an installed package) and /problems/<code>."""

import base64
import hashlib
import html
import re
from pathlib import Path

import fastapi_offline
from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.staticfiles import StaticFiles
from starlette.responses import HTMLResponse

from api.errors import PROBLEMS
from core.errors import NotFound

STATIC_URL = "/static-docs"

router = APIRouter(include_in_schema=False)


def mount_assets(app: FastAPI) -> None:
    app.mount(STATIC_URL, StaticFiles(directory=Path(fastapi_offline.__file__).parent / "static"), name="static-docs")


@router.get("/docs")
async def show_docs(request: Request) -> HTMLResponse:
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=f"{request.app.title} API",
        swagger_js_url=f"{STATIC_URL}/swagger-ui-bundle.js",
        swagger_css_url=f"{STATIC_URL}/swagger-ui.css",
        swagger_favicon_url=f"{STATIC_URL}/favicon.png",
        swagger_ui_parameters={"validatorUrl": None, "persistAuthorization": False, "tryItOutEnabled": True},
    )
    # The page starts Swagger UI with one inline script; its digest, and nothing else, is allowed to run.
    scripts = re.findall(rb"<script>(.*?)</script>", page.body, re.S)
    digests = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'" for script in scripts)
    page.headers["Content-Security-Policy"] = (
        f"default-src 'self'; script-src 'self' {digests}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "base-uri 'none'; frame-ancestors 'none'"
    )
    return page


@router.get("/problems/{code}")
async def show_problem(code: str) -> HTMLResponse:
    if code not in PROBLEMS:
        raise NotFound("There is no such kind of problem")
    status, title, advice = PROBLEMS[code]
    shown = f"<h1>{html.escape(title)}</h1><p>{html.escape(advice)}</p><p>HTTP {status}, code <code>{code}</code></p>"
    return HTMLResponse(f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>{shown}</html>")
