# Coordinator, shard and the demo's worker: one image, since all three are the adashard-server
# distribution and differ in their command alone. Built from the root of the repository:
#
#   docker build -f docker/server.Dockerfile -t adashard .
#
# TORCH is what pip is asked for. The release is the one that the tests ran with. On x86-64 Linux
# the default index serves a build with CUDA; for a slim image, give the CPU index that PyTorch's
# own page of installation names: --build-arg TORCH='torch==2.13.0 --index-url ...'.

FROM python:3.11-slim-bookworm AS wheels
WORKDIR /build
COPY client client
COPY server server
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir dist ./client ./server


FROM python:3.11-slim-bookworm AS environment
ARG TORCH=torch==2.13.0
RUN python -m venv /opt/adashard
ENV PATH=/opt/adashard/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# The largest layer, and the one that changes least, comes first. TORCH may be several words.
# hadolint ignore=DL3013,SC2086
RUN pip install ${TORCH}
WORKDIR /build
COPY constraints.txt .
COPY --from=wheels /build/dist dist
RUN pip install -c constraints.txt dist/*.whl \
    && pip check \
    && pip uninstall --yes pip


FROM python:3.11-slim-bookworm AS server
LABEL org.opencontainers.image.title="adashard" \
      org.opencontainers.image.description="An optimizer as a service for PyTorch: coordinator and shards" \
      org.opencontainers.image.licenses="Apache-2.0"
# A fixed number, so that volumes keep their owner from one image to the next.
RUN groupadd --gid 10001 adashard \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin adashard \
    && install --directory --owner=10001 --group=10001 /var/lib/adashard
COPY --from=environment /opt/adashard /opt/adashard
# The root file system is read-only in docker-compose.yml: what needs a home finds it in /tmp.
ENV PATH=/opt/adashard/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 8080 50051 50052
ENTRYPOINT ["adashard"]
CMD ["--help"]
