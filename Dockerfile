# The two processes that need no GPU library: `--target api` (control plane, migrations, operator's commands) and
# `--target prepare` (validation and tokenising). Neither image holds torch.

FROM python:3.12.12-slim-bookworm AS python
ENV PATH=/opt/strop/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    STROP_HOME=/var/lib/strop
# The folders exist in the image so that volumes mounted on them belong to the service's user.
RUN groupadd --gid 10001 strop \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/strop --shell /usr/sbin/nologin strop \
    && install -d -o 10001 -g 10001 -m 0750 /var/lib/strop /var/lib/strop/files /var/lib/strop/scratch
WORKDIR /app

FROM python AS build-api
RUN python -m venv /opt/strop
COPY pyproject.toml constraints.txt README.md LICENSE alembic.ini ./
COPY core core
COPY store store
COPY migrations migrations
COPY api api
RUN pip install --no-cache-dir --constraint constraints.txt --editable '.[api,s3]'

FROM python AS build-prepare
RUN python -m venv /opt/strop
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY core core
COPY store store
COPY worker worker
RUN pip install --no-cache-dir --constraint constraints.txt --editable '.[prepare,s3]'

FROM python AS api
COPY --from=build-api /opt/strop /opt/strop
COPY --from=build-api /app /app
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
CMD ["uvicorn", "api.app:create_app", "--factory", "--host", "0.0.0.0", "--port", "8000", "--timeout-graceful-shutdown", "10"]

FROM python AS prepare
COPY --from=build-prepare /opt/strop /opt/strop
COPY --from=build-prepare /app /app
USER 10001:10001
# A worker answers no probe: its lease does. One that stops renewing loses its work to another.
HEALTHCHECK NONE
CMD ["celery", "-A", "worker.app", "worker", "-Q", "prepare", "-c", "1", "-n", "preparer@%h", "--without-gossip", "--without-mingle"]
