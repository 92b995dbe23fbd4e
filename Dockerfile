# docker build -t shardq .
# docker run --gpus all -v "$PWD":/work shardq quantize MODEL --config w4a16-vllm
# Several GPUs: docker run --gpus all --shm-size 8g --entrypoint shardq-ranks -v "$PWD":/work shardq \
#     --nproc-per-node 8 --no-python shardq quantize MODEL --config w4a16-vllm

FROM python:3.12-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY shardq shardq
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# torch's wheels bring CUDA's libraries, so the smallest of NVIDIA's runtime images is enough.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04
# The training step is compiled on the spot, which takes a C++ compiler and Python's headers. No versions are pinned, as
# Ubuntu keeps only the newest.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/shardq
ENV PATH=/opt/shardq/bin:$PATH \
    HF_HOME=/cache/huggingface
COPY tools/constraints.txt /wheels/constraints.txt
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir -c /wheels/constraints.txt \
        "$(echo /wheels/shardq-*.whl)[onnx,gguf]" \
    && mkdir -p /cache/huggingface \
    && chmod 1777 /cache/huggingface
WORKDIR /work
ENTRYPOINT ["shardq"]
CMD ["--help"]
