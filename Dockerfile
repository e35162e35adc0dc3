# kdbench with all that constraints.txt pins, for the clusters of clusters/: `--target cpu` or `--target gpu`.
# clusters/containers.md says how to build it. The build was never run so far; hadolint and tests/clusters read it.
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
# torch from PyPI holds CUDA and runs on CPUs too. The index of torch's CPU wheels makes an image that is some 4 GB smaller.
ARG TORCH_INDEX=""
# What Ray's autoscaler needs on a cloud: boto3, or google-api-python-client.
ARG CLOUD_PACKAGES=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH}
WORKDIR /opt/kdbench
COPY constraints.txt ./
RUN if [ -n "${TORCH_INDEX}" ]; then PIP_INDEX_URL="${TORCH_INDEX}" pip install --constraint constraints.txt torch torchvision; fi
COPY pyproject.toml README.md LICENSE ./
COPY kdbench ./kdbench
# ${CLOUD_PACKAGES} is a list, so it is not quoted.
# hadolint ignore=SC2086
RUN pip install --constraint constraints.txt '.[onnx,s3]' ${CLOUD_PACKAGES}

FROM python:${PYTHON} AS runtime
# bash, ssh and rsync: Ray's cluster launcher; wget: KubeRay's health checks; tini: children that ended are not left behind.
# Their versions are those of the Debian release in the base's tag.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y openssh-client procps rsync tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home --shell /bin/bash kdbench \
    && install -d -o kdbench -g kdbench -m 700 /home/kdbench/.ray \
    && install -d -o kdbench -g kdbench /shared
# Ray's launcher and KubeRay run login shells, which begin with a PATH of their own and add to it what this file says.
# hadolint ignore=SC2016
RUN echo 'PATH=/opt/venv/bin:$PATH' > /etc/profile.d/kdbench.sh
COPY --from=build /opt/venv /opt/venv
COPY experiments /opt/kdbench/experiments
ENV PATH=/opt/venv/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    KDBENCH_RESULTS=/shared/results \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    MLFLOW_DISABLE_TELEMETRY=true
# By its number: Kubernetes sees from it that this is not root.
USER 1000
WORKDIR /home/kdbench
CMD ["kdbench", "--help"]

FROM runtime AS cpu

FROM runtime AS gpu
# Read by NVIDIA's container toolkit, which brings the driver's own libraries from the machine.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
