# The command ood-heatmap in a container.
#     docker build -t ood-heatmap .
#     docker build -t ood-heatmap:cuda --build-arg FAISS=cuda .
#     docker run --rm -u "$(id -u):$(id -g)" -v "$PWD:/data" ood-heatmap demo runs/demo
# With a GPU (NVIDIA Container Toolkit on the host): add --gpus all, and --shm-size 8g, which
# processes that decode images share.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:${PYTHON}-slim
# cpu or cuda; PyTorch for CUDA brings its own libraries, so the base image needs none
ARG FAISS=cpu
COPY --from=build /wheels /wheels
# PyTorch's own index has the wheels without CUDA
RUN if [ "$FAISS" = cpu ]; then \
        pip install --no-cache-dir torch torchvision \
            --index-url https://download.pytorch.org/whl/cpu; \
    fi \
    && pip install --no-cache-dir "$(echo /wheels/ood_heatmap-*.whl)[${FAISS},export,timm]" \
    && rm -r /wheels
# an image has no user of the number that `docker run -u` names: what is cached goes here
ENV HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib TORCH_HOME=/data/.cache/torch
WORKDIR /data
ENTRYPOINT ["ood-heatmap"]
CMD ["--help"]
