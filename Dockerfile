# astrobio in a container, without root. Two images from one file:
#   docker build --target cpu  -t astrobio:cpu  .
#   docker build --target cuda -t astrobio:cuda .     (needs the NVIDIA driver and container toolkit to run, not to build)
#   docker run --rm -v astrobio:/workspace astrobio:cpu train
#   docker run --rm --gpus all --shm-size=8g -p 127.0.0.1:8888:8888 -e ASTROBIO_LAB_IP=0.0.0.0 -e JUPYTER_TOKEN -v astrobio:/workspace astrobio:cuda lab
# What is kept lies in /workspace: cache/ (planet runs), runs/, notebooks/. Packages are pinned by hash in pod/*.lock (pod/lock.sh writes them).
FROM python:3.11-slim-bookworm AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# a compiler, for the kernels in C; tini, so that signals reach trainings and no process is left behind
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ tini \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --create-home astro \
 && install -d -o astro -g astro /workspace
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    ASTROBIO_CACHE=/workspace/cache ASTROBIO_RUNS=/workspace/runs WANDB_MODE=offline
WORKDIR /opt/astrobio

FROM base AS cpu
COPY pod/cpu.lock pod/
RUN pip install --require-hashes --only-binary :all: --extra-index-url https://download.pytorch.org/whl/cpu -r pod/cpu.lock
COPY . .
RUN pip install --no-deps . && install -m 755 pod/entry.sh /usr/local/bin/astrobio-pod
USER 1000
WORKDIR /workspace
VOLUME /workspace
EXPOSE 8888
ENTRYPOINT ["tini", "-g", "--", "astrobio-pod"]
CMD ["--help"]

FROM base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY pod/cuda.lock pod/
RUN pip install --require-hashes --only-binary :all: -r pod/cuda.lock
COPY . .
RUN pip install --no-deps . && install -m 755 pod/entry.sh /usr/local/bin/astrobio-pod
USER 1000
WORKDIR /workspace
VOLUME /workspace
EXPOSE 8888
ENTRYPOINT ["tini", "-g", "--", "astrobio-pod"]
CMD ["--help"]
